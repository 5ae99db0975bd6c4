"""Documents: rows of JSON lines as dicts, in batches of 256, by bare loops and by other systems.

Each function is run in the environment of its system, so it imports that library itself.
"""

import itertools
import json
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench._peers.workload import ROWS_PER_BATCH, Workload, load_order

__all__ = ["MappedRows", "counted", "grain", "huggingface", "in_file_order", "in_our_order", "lines", "litdata"]

Decode = Callable[[bytes], Any]
LITDATA_CHUNK = "64MB"


def in_file_order(work: Workload) -> Iterator[int]:
    """Decode every line, in the order of the files; nothing is shuffled."""
    decode = msgspec.json.Decoder().decode
    while True:
        yield from counted(decode(line) for line in lines(work.jsonl))


def in_our_order(work: Workload) -> Iterator[int]:
    """Read every row with one positioned read, in the order in which Mixtera-HPC serves it."""
    decode = msgspec.json.Decoder().decode
    for rows in positioned_reads(work.folder / "order-documents.npz"):
        yield len([decode(row) for row in rows])


def torchdata(work: Workload, decoder: str) -> Iterator[int]:
    """Shuffle all rows of mapped files with a StatefulDataLoader in one process."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    decode = {"json": json.loads, "msgspec": msgspec.json.Decoder().decode}[decoder]
    loader = StatefulDataLoader(MappedRows(work.jsonl, decode), ROWS_PER_BATCH, shuffle=True, collate_fn=list)
    while True:
        yield from map(len, loader)


def litdata(work: Workload) -> Iterator[int]:
    """Shuffle chunks, and rows inside of them, with a StreamingDataset over optimized data."""
    import litdata as library

    folder = work.own("litdata") / "documents"
    if not (folder / "index.json").exists():
        shards = sorted(map(str, work.jsonl.iterdir()))
        library.optimize(_lines_of, shards, str(folder), chunk_bytes=LITDATA_CHUNK, num_workers=1)
    dataset = library.StreamingDataset(str(folder), shuffle=True, seed=0)
    decode = msgspec.json.Decoder().decode
    while True:
        yield from counted(map(decode, dataset))


def _lines_of(path: str) -> Iterator[bytes]:
    """Yield the lines of a shard, for LitData's `optimize`. Dicts would be stored leaf by leaf, and read slower."""
    with Path(path).open("rb") as file:
        yield from file


def huggingface(work: Workload) -> Iterator[int]:
    """Shuffle all rows of an Arrow table with `Dataset.shuffle`."""
    import datasets

    datasets.disable_progress_bars()
    files = sorted(map(str, work.jsonl.iterdir()))
    cache = str(work.own("huggingface"))
    dataset = datasets.load_dataset("json", data_files=files, split="train", cache_dir=cache).shuffle(seed=0)
    while True:
        for batch in dataset.iter(ROWS_PER_BATCH):
            yield len(batch["text"])


def grain(work: Workload) -> Iterator[int]:
    """Shuffle all rows of mapped files with a MapDataset; reading threads as by default."""
    import grain as library

    dataset = library.MapDataset.source(MappedRows(work.jsonl, msgspec.json.Decoder().decode)).seed(0).shuffle()
    dataset = dataset.repeat().batch(ROWS_PER_BATCH, batch_fn=list)
    yield from map(len, dataset.to_iter_dataset())


def lines(folder: Path) -> Iterator[bytes]:
    """Yield all lines of all files of a folder."""
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            yield from file


def counted(rows: Any) -> Iterator[int]:
    """Group rows into batches; yield the sizes of the batches."""
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, ROWS_PER_BATCH)):
        yield len(batch)


def positioned_reads(path: Path, rows_per_batch: int = ROWS_PER_BATCH) -> Iterator[list[bytes]]:
    """Yield batches of raw rows in a recorded order, again and again."""
    order = load_order(path)
    descriptors = [os.open(shard, os.O_RDONLY) for shard in order.shards]
    places = list(zip(order.shard.tolist(), order.length.tolist(), order.offset.tolist(), strict=True))
    while True:
        for first in range(0, len(places), rows_per_batch):
            group = places[first : first + rows_per_batch]
            yield [os.pread(descriptors[shard], length, offset) for shard, length, offset in group]


class MappedRows:
    """Random access to the rows of JSON lines in mapped files, for libraries that want `__getitem__`."""

    def __init__(self, folder: Path, decode: Decode) -> None:
        self._decode = decode
        self._maps: list[mmap.mmap] = []
        bounds: list[Any] = []
        for number, path in enumerate(sorted(folder.iterdir())):
            with path.open("rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            ends = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n")) + 1
            starts = np.concatenate([[0], ends[:-1]])
            bounds += zip(itertools.repeat(number), starts.tolist(), ends.tolist(), strict=False)
            self._maps.append(content)
        self._bounds = bounds

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, row: int) -> Any:
        shard, start, end = self._bounds[row]
        return self._decode(self._maps[shard][start:end])

    def __getitems__(self, rows: list[int]) -> list[Any]:
        """Return several rows; torch's loaders call this once per batch."""
        return [self[row] for row in rows]
