"""An index of a billion samples without the samples: tables as the builder writes them, columns that nobody reads left empty.

4,000,000 blocks of 250 rows in 4,000 shards; 50 combos, 10 sources × 5 languages. `mixed` says how many sources a block holds:
1 as in a crawl stored source by source (up to 5 cells per block), 10 as in a corpus shuffled on disk (up to 50).
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

BLOCK_ROWS, BLOCKS_PER_SHARD = 250, 1000
SOURCES = [f"source-{i}" for i in range(10)]
LANGUAGES = ["de", "en", "es", "fr", "zh"]
ROW_BYTES, ROW_TOKENS = 1100, 260


def make_index(folder: Path, num_blocks: int = 4_000_000, mixed: int = 1) -> Path:
    """The file; made once, kept."""
    path = folder / f"billion-{num_blocks}-{mixed}.h5"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = _small_index(folder).rename(path.with_suffix(".part"))
    shard = np.arange(num_blocks) // BLOCKS_PER_SHARD
    length = np.full(num_blocks, BLOCK_ROWS * ROW_BYTES) + np.arange(num_blocks) * 7919 % 4096
    before = np.cumsum(length) - length
    with h5py.File(part, "r+", libver=("v110", "v110"), locking=False) as file:
        _put(file["blocks"], shard=shard, rows=np.full(num_blocks, BLOCK_ROWS), length=length)
        _put(file["blocks"], offset=before - before[shard * BLOCKS_PER_SHARD])
        pieces = list(_cells(num_blocks, mixed))
        count, combo, rows = (np.concatenate(column) for column in zip(*pieces, strict=True))
        del pieces
        _put(file["histogram"], count=count, combo=combo, rows=rows, tokens=rows * np.uint32(ROW_TOKENS) + combo)
        _put_shards(file["shards"], num_blocks, length)
        file.attrs["num_samples"] = num_blocks * BLOCK_ROWS
        file.attrs["chunk_rows"] = BLOCK_ROWS
    return part.rename(path)


def _small_index(folder: Path) -> Path:
    """A real index of one row for every combo; its tables are replaced, all else stays."""
    data, path = folder / "one-row-per-combo", folder / "small.h5"
    data.mkdir(exist_ok=True)
    rows = [{"text": "a", "source": s, "language": lang} for lang in LANGUAGES for s in SOURCES]
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    properties = ["data.properties.source=source", "data.properties.language=language"]
    build_index(compose([f"data.root={data}", f"index.path={path}", "mixture.unit=samples", *properties]))
    return path


def make_shards(folder: Path, path: Path) -> Path:
    """A data root with the shards of an index: files that are all hole, of the size and time that the index expects."""
    root = folder / f"{path.stem}-shards"
    root.mkdir(exist_ok=True)
    with open_index(path) as index:
        shards = index.tables.shards
        for name, size, mtime_ns in zip(shards.path, shards.size_bytes.tolist(), shards.mtime_ns.tolist(), strict=True):
            (root / name).touch()
            os.truncate(root / name, size)
            os.utime(root / name, ns=(mtime_ns, mtime_ns))
    return root


def _put(group: h5py.Group, **columns: np.ndarray) -> None:
    for name, values in columns.items():
        del group[name]
        write_column(group, name, narrow(values))


def _put_shards(group: h5py.Group, num_blocks: int, length: np.ndarray) -> None:
    first = np.arange(0, num_blocks, BLOCKS_PER_SHARD)
    blocks = np.minimum(BLOCKS_PER_SHARD, num_blocks - first)
    for name, texts in (
        ("path", [f"part-{i:05d}.jsonl" for i in range(len(first))]),
        ("format", ["jsonl"] * len(first)),
    ):
        del group[f"{name}_utf8"], group[f"{name}_end"]
        write_texts(group, name, texts)
    size = np.add.reduceat(length, first)
    fingerprint = np.zeros((len(first), group["fingerprint"].shape[1]), np.uint8)
    _put(group, rows=blocks * BLOCK_ROWS, size_bytes=size, mtime_ns=size, fingerprint=fingerprint)


def _cells(num_blocks: int, mixed: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Cells of some thousand blocks at a time: their number, their combos ascending in each block, and their rows.

    Combos are numbered as the small index has them: by language, then by source.
    """
    per_language, num_sources = 1 / np.arange(1, len(LANGUAGES) + 1) ** 2, len(SOURCES)
    shares = np.outer(per_language, 1 / np.arange(1, mixed + 1)).ravel()
    for start in range(0, num_blocks, 1 << 16):
        n = min(1 << 16, num_blocks - start)
        random = np.random.Generator(np.random.Philox(start))
        found = random.multinomial(BLOCK_ROWS, shares / shares.sum(), n).astype(np.uint8)
        block, column = np.nonzero(found)
        language, source = np.divmod(column, mixed)
        if mixed == 1:
            source = (start + block) // BLOCKS_PER_SHARD % num_sources
        yield (
            np.bincount(block, minlength=n).astype(np.uint8),
            (language * num_sources + source).astype(np.uint8),
            found[block, column],
        )
