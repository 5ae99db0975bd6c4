"""What an index file looks like inside: names, types and the version.

/                 attributes: format, version, text, tokenizer, parser, fingerprint, num_samples, chunk_rows
/roots/           dataset, path; a single root has the data set ''
/shards/          path, dataset (position in roots), format, rows, size_bytes, mtime_ns, fingerprint
/bad/             shard, reason, rows: what was skipped; 0 rows stand for a damaged end
/properties/NAME  attributes kind, source (path:PATH in the row, function:NAME, or dataset); values
/combos/NAME      count (values per combo), code; attributes num_combos and bad (the combo of bad rows, or -1) above them
/blocks/          shard, rows, offset, length
/zones/NAME       low, high, has_null
/histogram/       count (combos per block), combo, rows, tokens
/samples/         combo, length, tokens, numbers/NAME
/generations/     fingerprint, shards, blocks, cells, combos, samples: earlier states of the index that it begins with

Integers are stored in the narrowest unsigned type that holds them. What can be added up from other columns is not stored:
the first row, first sample and tokens of a block. Every block begins at a chunk of the sample columns, which
are as long as blocks usually are: reading a block reads one compressed chunk of each column, at the price of some padding.
Every byte is under a checksum (metadata by HDF5 itself, columns by Fletcher's), so what was damaged cannot be opened.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DATASET",
    "FORMAT",
    "MAX_CHUNK_ROWS",
    "MIN_CHUNK_ROWS",
    "TABLE_CHUNK",
    "VERSION",
    "BadRows",
    "Generation",
    "first_rows",
    "first_samples",
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
"""The built-in property: which data set a sample is of."""
FORMAT = "mixtera-hpc property index"
VERSION = 2
TABLE_CHUNK = 1 << 18
"""Entries of a chunk of the tables, which are always read whole."""
MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 64, 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRows:
    """Rows of a shard that were skipped."""

    shard: int
    reason: str
    rows: int
    """0: the shard is damaged from some place on, and nobody can count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A state of an index, which is how the index begins still."""

    fingerprint: str
    shards: int
    blocks: int
    cells: int
    """Entries of the histogram."""
    combos: int
    samples: int
    """Rows, those that cannot be read included."""


def narrow_type(maximum: int) -> np.dtype[Any]:
    """The narrowest unsigned little-endian integer type that holds `maximum`."""
    return np.dtype(f"<u{next(size for size in (1, 2, 4, 8) if maximum < 1 << (8 * size))}")


def narrow(values: NDArray[Any]) -> NDArray[Any]:
    """Non-negative integers in their narrowest type; other types stay as they are."""
    if values.dtype.kind not in "iu":
        return values
    return values.astype(narrow_type(int(values.max(initial=0))), copy=False)


def first_samples(block_rows: NDArray[Any], chunk_rows: int) -> NDArray[np.int64]:
    """Where each block begins in the sample columns, and at last their length; shape (num_blocks + 1,)."""
    return prepend_zero(np.cumsum(-(-block_rows.astype(np.int64) // chunk_rows) * chunk_rows))


def first_rows(shard: NDArray[Any], block_rows: NDArray[Any]) -> NDArray[np.int64]:
    """The row inside its shard with which each block begins; shape (num_blocks,)."""
    starts = np.cumsum(block_rows, dtype=np.int64) - block_rows
    first = np.flatnonzero(np.r_[True, shard[1:] != shard[:-1]][: len(shard)])
    return starts - np.repeat(starts[first], np.diff(np.r_[first, len(shard)]))


def prepend_zero(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ends of consecutive ranges → their bounds, 0 first."""
    return np.concatenate([np.zeros(1, np.int64), ends])


def write_column(group: h5py.Group, name: str, values: NDArray[Any]) -> None:
    """Store one table column, checksummed."""
    if len(values):
        chunk = min(len(values), TABLE_CHUNK)
        group.create_dataset(name, data=values, chunks=(chunk, *values.shape[1:]), fletcher32=True)
    else:
        group.create_dataset(name, data=values)


def read_column(group: h5py.Group, name: str, dtype: Any) -> NDArray[Any]:
    """Load a whole column as `dtype`."""
    values: NDArray[Any] = group[name][...]
    return values.astype(dtype, copy=False)


def open_children(group: h5py.Group) -> dict[str, Any]:
    """What is in a group, by name; unlike h5py's `items` it fails on what cannot be opened."""
    return {name: group[name] for name in group}


def write_text(node: h5py.Group, name: str, text: str) -> None:
    """Store a short text as an attribute, of fixed length: HDF5 has no checksum over those of variable length."""
    node.attrs[name] = np.void(text.encode() + b"\0")


def read_text(node: h5py.Group, name: str) -> str:
    """The inverse of `write_text`."""
    return bytes(node.attrs[name])[:-1].decode()


def path_source(path: str, pattern: str | None) -> str:
    """The `source` of a property that is read from a row or a shard's path."""
    return f"path:{path}" + (f" pattern:{pattern}" if pattern else "")


def write_texts(group: h5py.Group, name: str, texts: Sequence[str]) -> None:
    """Store texts, which may hold any character, NUL included: their UTF-8 in a row, and where each ends."""
    encoded = [text.encode() for text in texts]
    ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
    write_column(group, f"{name}_utf8", np.frombuffer(b"".join(encoded), np.uint8))
    write_column(group, f"{name}_end", narrow(ends))


def read_texts(group: h5py.Group, name: str) -> tuple[str, ...]:
    """The inverse of `write_texts`."""
    data = group[f"{name}_utf8"][...].tobytes()
    bounds = prepend_zero(read_column(group, f"{name}_end", np.int64)).tolist()
    return tuple(data[a:b].decode() for a, b in pairwise(bounds))
