"""Define what an index file contains: names, types and version; and read and write its basic values.

/                 attributes: format, version, tokenizer, fingerprint, num_samples, chunk_rows
/sets/            name ('' for a single data set), root, text, text_digest, parser, sources: JSON, property → path:PATH
                  in the row, function:NAME, buckets:NUMBER BOUNDS, or dataset
/shards/          path, dataset (position in sets), format, rows, size_bytes, mtime_ns, fingerprint
/bad/             shard, reason, rows: rows that were skipped; 0 rows mean that the end of the shard is damaged
/properties/NAME  attribute kind; values
/combos/NAME      count (values per combo), code; attributes of /combos: num_combos, bad (combo of bad rows, or -1)
/blocks/          shard, rows, offset, length
/zones/NAME       low, high, has_null
/histogram/       count (combos per block), combo, rows, tokens
/samples/         combo, length, tokens, numbers/NAME
/generations/     fingerprint, shards, blocks, cells, combos, samples: earlier states that this file begins with

A *combo* is a combination of values of all categorical properties; a *cell* of the histogram is a (block, combo) pair.
Integers are stored in the narrowest unsigned type that holds them. Sums over other columns are not stored: the first
row, first sample and tokens of a block. Every block begins at a chunk of the sample columns. A chunk is as long as the
usual block, so reading a block reads one compressed chunk of each column. Price: some padding. Every byte has a
checksum (HDF5's own for metadata, Fletcher-32 for columns), so reading a damaged part of the file raises an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DATASET",
    "FORMAT",
    "MAX_CHUNK_ROWS",
    "MIN_CHUNK_ROWS",
    "SIZE_NUMBERS",
    "TABLE_CHUNK",
    "VERSION",
    "BadRows",
    "Generation",
    "bucket_source",
    "building_folder",
    "failure_file",
    "first_rows",
    "first_samples",
    "function_source",
    "narrow",
    "narrow_type",
    "open_children",
    "path_source",
    "prepend_zero",
    "read_column",
    "read_text",
    "read_texts",
    "write_column",
    "write_text",
    "write_texts",
]

DATASET = "dataset"
"""The built-in property: the data set that a sample belongs to."""
SIZE_NUMBERS = {"tokens": "tokens", "bytes": "length"}
"""Built-in number properties → the sample column that holds them."""
FORMAT = "mixtera-hpc property index"
VERSION = 4
# At 8 bytes per entry a chunk is 2 MiB: large enough for the disk, small enough for a buffer per column.
TABLE_CHUNK = 1 << 18
"""Entries per HDF5 chunk of a table column. Tables are always read whole, so a chunk may be large."""
# Smaller chunks cost more metadata than they hold data; larger ones are decompressed for a single short block.
MIN_CHUNK_ROWS = 64
MAX_CHUNK_ROWS = 16384
"""Bounds of the rows per HDF5 chunk of a sample column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRows:
    """Rows of a shard that were skipped."""

    shard: int
    reason: str
    rows: int
    """0 if the shard is damaged from some byte on, so that the rows cannot be counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """An earlier state of an index, given by the lengths of its tables: the current tables begin with their rows."""

    fingerprint: str
    shards: int
    blocks: int
    cells: int
    """Entries of the histogram."""
    combos: int
    samples: int
    """Rows, including those that cannot be read."""


def building_folder(index: Path) -> Path:
    """Return the hidden folder beside an index in which it is built."""
    return index.with_name(f".{index.name}.building")


def failure_file(index: Path) -> Path:
    """Return the file that says why the last build of an index failed; it exists until the next build begins."""
    return building_folder(index) / "failure"


def narrow_type(maximum: int) -> np.dtype[Any]:
    """Return the narrowest unsigned little-endian integer type that holds `maximum`."""
    num_bytes = next(size for size in (1, 2, 4, 8) if maximum < 1 << (8 * size))
    return np.dtype(f"<u{num_bytes}")


def narrow(values: NDArray[Any]) -> NDArray[Any]:
    """Convert non-negative integers to their narrowest type. Other types stay as they are."""
    if values.dtype.kind not in "iu":
        return values
    return values.astype(narrow_type(int(values.max(initial=0))), copy=False)


def first_samples(block_rows: NDArray[Any], chunk_rows: int) -> NDArray[np.int64]:
    """Return the position in the sample columns at which each block begins, then their length; (num_blocks + 1,)."""
    # Chunks per block, rounded up: every block begins at a chunk.
    chunks = -(-block_rows.astype(np.int64) // chunk_rows)
    return prepend_zero(np.cumsum(chunks * chunk_rows))


def first_rows(shard: NDArray[Any], block_rows: NDArray[Any]) -> NDArray[np.int64]:
    """Return the first row of each block, counted within its shard; shape (num_blocks,)."""
    starts = np.cumsum(block_rows, dtype=np.int64) - block_rows
    # Subtract the start of the shard's first block from those of all its blocks.
    is_first = np.r_[True, shard[1:] != shard[:-1]][: len(shard)]
    first = np.flatnonzero(is_first)
    blocks_of_shard = np.diff(np.r_[first, len(shard)])
    first_row: NDArray[np.int64] = starts - np.repeat(starts[first], blocks_of_shard)
    return first_row


def prepend_zero(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bounds of consecutive ranges, given their ends."""
    return np.concatenate([np.zeros(1, np.int64), ends])


def write_column(group: h5py.Group, name: str, values: NDArray[Any]) -> None:
    """Write one table column with checksums."""
    # HDF5 refuses chunks, and therefore checksums, for empty columns.
    if len(values):
        chunk = min(len(values), TABLE_CHUNK)
        group.create_dataset(name, data=values, chunks=(chunk, *values.shape[1:]), fletcher32=True)
    else:
        group.create_dataset(name, data=values)


def read_column(group: h5py.Group, name: str, dtype: Any) -> NDArray[Any]:
    """Read a whole column as `dtype`."""
    # Stored types are narrow; callers compute in the type they ask for.
    values: NDArray[Any] = group[name][...]
    return values.astype(dtype, copy=False)


def open_children(group: h5py.Group) -> dict[str, Any]:
    """Open everything in a group, by name. Unlike h5py's `items`, it raises for children that cannot be opened."""
    return {name: group[name] for name in group}


def write_text(node: h5py.Group, name: str, text: str) -> None:
    """Write a short text as an attribute of fixed length: HDF5 has no checksum for those of variable length."""
    node.attrs[name] = np.void(text.encode() + b"\0")


def read_text(node: h5py.Group, name: str) -> str:
    """Read an attribute written by `write_text`."""
    return bytes(node.attrs[name])[:-1].decode()


def write_texts(group: h5py.Group, name: str, texts: Sequence[str]) -> None:
    """Write texts, which may contain any character including NUL, as their joined UTF-8 and the end of each."""
    encoded = [text.encode() for text in texts]
    # Not HDF5's variable-length strings: these have no checksum and end at the first NUL.
    ends = np.cumsum([len(data) for data in encoded], dtype=np.int64)
    write_column(group, f"{name}_utf8", np.frombuffer(b"".join(encoded), np.uint8))
    write_column(group, f"{name}_end", narrow(ends))


def read_texts(group: h5py.Group, name: str) -> tuple[str, ...]:
    """Read texts written by `write_texts`.

    Raises:
        ValueError: the ends of the texts are out of range.
    """
    data = group[f"{name}_utf8"][...].tobytes()
    bounds = prepend_zero(read_column(group, f"{name}_end", np.int64))
    if bounds[-1] != len(data) or (np.diff(bounds) < 0).any():
        raise ValueError(f"{group.name}/{name}_end holds no ascending ends of texts of {len(data)} bytes")
    return tuple(data[start:stop].decode() for start, stop in pairwise(bounds.tolist()))


def function_source(path: str, over_rows: bool) -> str:
    """Return the stored `source` of a property that a function computes."""
    return f"function:{path} over rows" if over_rows else f"function:{path}"


def bucket_source(number: str, bounds: Sequence[float]) -> str:
    """Return the stored `source` of a property that is the bucket of a number."""
    return f"buckets:{number} {list(map(float, bounds))}"


def path_source(path: str, pattern: str | None) -> str:
    """Return the stored `source` of a property that is read from a row or from the path of a shard."""
    suffix = f" pattern:{pattern}" if pattern else ""
    return f"path:{path}{suffix}"
