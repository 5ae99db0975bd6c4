"""Documents from JSON lines whose shards are one zstd frame each, which cannot be entered in the middle."""

import io
import itertools
import random
from collections.abc import Iterator

import msgspec
import zstandard

from bench._peers.documents import counted
from bench._peers.workload import Workload

__all__ = ["BUFFER_ROWS"]

BUFFER_ROWS = 10_000


def shuffle_buffer(work: Workload) -> Iterator[int]:
    """Decode the shards in random order as streams, through one shuffle buffer of 10,000 rows."""
    decode = msgspec.json.Decoder().decode
    rng = random.Random(0)
    rows = (decode(line) for line in _endless_lines(work, rng))
    buffer = list(itertools.islice(rows, BUFFER_ROWS))

    def shuffled() -> Iterator[object]:
        for row in rows:
            position = int(rng.random() * BUFFER_ROWS)
            served = buffer[position]
            buffer[position] = row
            yield served

    yield from counted(shuffled())


def _endless_lines(work: Workload, rng: random.Random) -> Iterator[bytes]:
    shards = sorted(work.compressed.iterdir())
    while True:
        rng.shuffle(shards)
        for shard in shards:
            with shard.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
                yield from io.BufferedReader(reader, 1 << 20)


def huggingface(work: Workload) -> Iterator[int]:
    """Stream the shards with `load_dataset(streaming=True)` and a shuffle buffer of 10,000 rows."""
    import datasets

    files = sorted(map(str, work.compressed.iterdir()))
    dataset = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
    dataset = dataset.shuffle(seed=0, buffer_size=BUFFER_ROWS)
    while True:
        yield from counted(dataset)
