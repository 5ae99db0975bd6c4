"""The corpus of the benchmark, in every form that some system reads; made once and kept."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench._corpus import make_once, make_tokenizer, shard_rows, zst_frames
from bench._peers.packed import gigatoken_encoder
from bench._peers.workload import Workload
from bench._results import OUT
from mixtera_hpc.testing.megatron import write_megatron

__all__ = ["NUM_SHARDS", "document_bounds", "make_corpora"]

NUM_SHARDS = 10
MORE_SHARDS = (300, 5000)
SHARDS_PER_DOMAIN = 60
FRAME_ROWS = 256
LENGTHS = "lengths.npz"


def make_corpora(num_rows: int) -> Workload:
    """Write the corpus in all forms, unless it exists."""
    folder = OUT / "peers" / f"corpus-{num_rows}"
    work = Workload(folder=folder, tokenizer=make_tokenizer(), num_rows=num_rows)
    make_once(work.jsonl, functools.partial(_write_jsonl, num_rows))
    for count in MORE_SHARDS:
        make_once(folder / f"jsonl-{count}", functools.partial(_write_more_shards, work, count))
    make_once(work.compressed, functools.partial(_write_zst, work, num_rows))
    make_once(folder / "zst-frames", functools.partial(_write_zst, work, FRAME_ROWS))
    make_once(work.tokens, functools.partial(_write_tokens, work, 1))
    make_once(folder / "tokens-420", functools.partial(_write_tokens, work, SHARDS_PER_DOMAIN))
    return work


def _write_jsonl(num_rows: int, folder: Path) -> None:
    for number in range(NUM_SHARDS):
        rows = shard_rows(number, num_rows // NUM_SHARDS, parts=True)
        (folder / f"shard-{number:05d}.jsonl").write_bytes(b"".join(rows))


def _write_more_shards(work: Workload, count: int, folder: Path) -> None:
    """Write the same rows to more shards."""
    rows = list(_rows(work))
    for number, chosen in enumerate(np.array_split(np.arange(len(rows)), count)):
        (folder / f"shard-{number:05d}.jsonl").write_bytes(b"".join(rows[chosen[0] : chosen[-1] + 1]))


def _write_zst(work: Workload, frame_rows: int, folder: Path) -> None:
    """Compress every shard in frames of `frame_rows` rows, or as a single frame."""
    for shard in sorted(work.jsonl.iterdir()):
        rows = shard.read_bytes().splitlines(keepends=True)
        (folder / f"{shard.name}.zst").write_bytes(zst_frames(rows, frame_rows))


def _write_tokens(work: Workload, shards_per_domain: int, folder: Path) -> None:
    """Write Megatron files; every document ends with the end-of-text token."""
    encode, eos_id = gigatoken_encoder(work)
    end = np.array([eos_id], "<u2")
    documents: dict[str, list[NDArray[np.uint16]]] = {}
    for line in _rows(work):
        row = json.loads(line)
        tokens = np.concatenate([encode(row["text"]).astype("<u2"), end])
        documents.setdefault(row["meta"]["redpajama_set_name"], []).append(tokens)
    lengths: dict[str, NDArray[np.int64]] = {}
    for domain, of_domain in documents.items():
        for number, chosen in enumerate(np.array_split(np.arange(len(of_domain)), shards_per_domain)):
            shard = of_domain[chosen[0] : chosen[-1] + 1]
            write_megatron(folder / f"{domain}-{number:03d}.bin", shard)
            lengths[f"{domain}-{number:03d}"] = np.array(list(map(len, shard)))
    np.savez(folder / LENGTHS, **lengths)


def _rows(work: Workload) -> Iterator[bytes]:
    for shard in sorted(work.jsonl.iterdir()):
        yield from shard.read_bytes().splitlines(keepends=True)


def document_bounds(work: Workload, shard: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return offset and length of every document of a shard, in bytes."""
    if shard.suffix == ".bin":
        with np.load(work.tokens / LENGTHS) as of_domain:
            lengths = of_domain[shard.stem] * np.dtype("<u2").itemsize
        return np.cumsum(lengths) - lengths, lengths
    ends = np.flatnonzero(np.fromfile(shard, np.uint8) == ord("\n")) + 1
    starts = np.concatenate([[0], ends[:-1]])
    return starts, ends - starts
