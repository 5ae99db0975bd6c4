"""An index of a billion fabricated samples, to measure queries and start-up at scale.

Its tables have the layout that the builder writes; columns that the benchmarks do not read stay empty. It has 4,000,000
blocks of 250 rows in 4,000 shards, and 50 combinations of category values: 10 sources × 5 languages.

`sources_per_block` decides the size of the histogram. With 1, as in a corpus stored source by source, a block has up to
5 cells. With 10, as in a corpus shuffled on disk, it has up to 50.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from mixtera_hpc.config.compose import compose
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.layout import narrow, write_column, write_texts
from mixtera_hpc.index.read.open import open_index

__all__ = ["BLOCK_ROWS", "make_index", "make_shards"]

BLOCK_ROWS = 250
BLOCKS_PER_SHARD = 1000
BLOCKS_AT_ONCE = 1 << 16
"""Number of blocks whose cells are drawn at a time, to bound memory."""
SOURCES = [f"source-{i}" for i in range(10)]
LANGUAGES = ["de", "en", "es", "fr", "zh"]
ROW_BYTES = 1100
ROW_TOKENS = 260


def make_index(folder: Path, num_blocks: int = 4_000_000, sources_per_block: int = 1) -> Path:
    """Return the index file; write it unless it exists."""
    path = folder / f"billion-{num_blocks}-{sources_per_block}.h5"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = _small_index(folder).rename(path.with_suffix(".part"))

    shard = np.arange(num_blocks) // BLOCKS_PER_SHARD
    # Lengths vary by block, so that offsets do not compress to nothing.
    length = np.full(num_blocks, BLOCK_ROWS * ROW_BYTES) + np.arange(num_blocks) * 7919 % 4096
    start = np.cumsum(length) - length
    offset = start - start[shard * BLOCKS_PER_SHARD]
    count, combo, rows = _all_cells(num_blocks, sources_per_block)
    tokens = rows * np.uint32(ROW_TOKENS) + combo

    with h5py.File(partial, "r+", libver=("v110", "v110"), locking=False) as file:
        block_rows = np.full(num_blocks, BLOCK_ROWS)
        _replace_columns(file["blocks"], shard=shard, rows=block_rows, length=length, offset=offset)
        _replace_columns(file["histogram"], count=count, combo=combo, rows=rows, tokens=tokens)
        _replace_shards(file["shards"], num_blocks, length)
        num_samples = num_blocks * BLOCK_ROWS
        # The index as a whole is its only generation.
        num_shards = -(-num_blocks // BLOCKS_PER_SHARD)
        totals = {"shards": num_shards, "blocks": num_blocks, "cells": len(combo), "samples": num_samples}
        _replace_columns(file["generations"], **{name: np.array([total]) for name, total in totals.items()})
        file.attrs["num_samples"] = num_samples
        file.attrs["chunk_rows"] = BLOCK_ROWS
    return partial.rename(path)


def make_shards(folder: Path, path: Path) -> Path:
    """Return a data root with the shards of an index: sparse files with the size and time that the index expects."""
    root = folder / f"{path.stem}-shards"
    root.mkdir(exist_ok=True)
    with open_index(path) as index:
        shards = index.tables.shards
        for name, size, mtime_ns in zip(shards.path, shards.size_bytes.tolist(), shards.mtime_ns.tolist(), strict=True):
            (root / name).touch()
            os.truncate(root / name, size)
            os.utime(root / name, ns=(mtime_ns, mtime_ns))
    return root


def _small_index(folder: Path) -> Path:
    """Build a real index with one row per combo; the caller replaces its tables and keeps everything else."""
    data = folder / "one-row-per-combo"
    data.mkdir(exist_ok=True)
    rows = [{"text": "a", "source": source, "language": language} for language in LANGUAGES for source in SOURCES]
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    path = folder / "small.h5"
    properties = ["data.properties.source=source", "data.properties.language=language"]
    build_index(compose([f"data.root={data}", f"index.path={path}", "mixture.unit=samples", *properties]))
    return path


def _replace_columns(group: h5py.Group, **columns: np.ndarray) -> None:
    for name, values in columns.items():
        del group[name]
        write_column(group, name, narrow(values))


def _replace_shards(group: h5py.Group, num_blocks: int, length: np.ndarray) -> None:
    first_block = np.arange(0, num_blocks, BLOCKS_PER_SHARD)
    num_shards = len(first_block)
    texts = {"path": [f"part-{i:05d}.jsonl" for i in range(num_shards)], "format": ["jsonl"] * num_shards}
    for name, values in texts.items():
        del group[f"{name}_utf8"], group[f"{name}_end"]
        write_texts(group, name, values)

    blocks = np.minimum(BLOCKS_PER_SHARD, num_blocks - first_block)
    size = np.add.reduceat(length, first_block)
    fingerprint = np.zeros((num_shards, group["fingerprint"].shape[1]), np.uint8)
    # The modification time only has to differ between shards; the size does.
    _replace_columns(group, rows=blocks * BLOCK_ROWS, size_bytes=size, mtime_ns=size, fingerprint=fingerprint)


def _all_cells(num_blocks: int, sources_per_block: int) -> tuple[np.ndarray, ...]:
    """Return the cells of all blocks: their number per block, and combo and rows of each cell."""
    batches = list(_cells(num_blocks, sources_per_block))
    count, combo, rows = (np.concatenate(column) for column in zip(*batches, strict=True))
    return count, combo, rows


def _cells(num_blocks: int, sources_per_block: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield the cells of `BLOCKS_AT_ONCE` blocks at a time: their number per block, and combo and rows of each cell.

    The combos of a block ascend. They are numbered as in the small index: by language, then by source.
    """
    num_sources = len(SOURCES)
    language_share = 1 / np.arange(1, len(LANGUAGES) + 1) ** 2
    source_share = 1 / np.arange(1, sources_per_block + 1)
    shares = np.outer(language_share, source_share).ravel()
    for start in range(0, num_blocks, BLOCKS_AT_ONCE):
        count = min(BLOCKS_AT_ONCE, num_blocks - start)
        random = np.random.Generator(np.random.Philox(start))

        # Rows of every block (first axis) per combo (second axis); only those that occur become cells.
        rows = random.multinomial(BLOCK_ROWS, shares / shares.sum(), count).astype(np.uint8)
        block, column = np.nonzero(rows)
        language, source = np.divmod(column, sources_per_block)
        if sources_per_block == 1:
            source = (start + block) // BLOCKS_PER_SHARD % num_sources
        yield (
            np.bincount(block, minlength=count).astype(np.uint8),
            (language * num_sources + source).astype(np.uint8),
            rows[block, column],
        )
