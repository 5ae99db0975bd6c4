"""The tables of an index that planning needs: O(blocks), never O(samples)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.properties import ComboTable, Property

__all__ = ["BLOCK_COLUMNS", "BlockTable", "Histogram", "IndexTables", "SampleColumns", "ShardTable", "Zones"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTable:
    """The data files, in index order; every field has shape (num_shards,)."""

    path: tuple[str, ...]
    """Relative to its data root."""
    format: tuple[str, ...]
    """Name of the format that reads it."""
    rows: NDArray[np.int64]
    size_bytes: NDArray[np.int64]
    mtime_ns: NDArray[np.int64]
    fingerprint: tuple[str, ...]
    """Hex digest of the content."""
    dataset: tuple[str, ...] = ()
    """Name of its data root; empty where there is only one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Zones:
    """Smallest and largest value of one number in every block; shape (num_blocks,) each. NaN where all are null."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    has_null: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTable:
    """Units of I/O and shuffling, in index order; every field has shape (num_blocks,)."""

    shard: NDArray[np.int32]
    first_row: NDArray[np.int64]
    """Row inside the shard."""
    rows: NDArray[np.int32]
    offset: NDArray[np.int64]
    """First byte inside the shard; for Parquet the row group's number."""
    length: NDArray[np.int64]
    """Bytes on disk."""
    first_sample: NDArray[np.int64]
    """Position of the block's first row in the per-sample columns."""
    zones: Mapping[str, Zones]
    """Per number property."""

    def __len__(self) -> int:
        return len(self.shard)


BLOCK_COLUMNS = ("shard", "first_row", "rows", "offset", "length", "first_sample")
"""The arrays of a `BlockTable`: all its fields but the zones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """How many rows and tokens of every combo each block holds, sparse.

    The entries of block b are `indptr[b]:indptr[b + 1]`, combos ascending. They are of any integer type, unsigned and as narrow
    as in the file where they come from one: there may be a hundred million.
    """

    indptr: NDArray[np.int64]
    """Shape (num_blocks + 1,)."""
    combo: NDArray[np.integer[Any]]
    rows: NDArray[np.integer[Any]]
    tokens: NDArray[np.integer[Any]]
    """Without special tokens; 0 when the index was built without a tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleColumns:
    """The samples of one block (or several, concatenated), one entry per row."""

    combo: NDArray[np.int32]
    length: NDArray[np.int64]
    """Bytes of the row on disk; 0 where rows have no byte range of their own (Parquet)."""
    tokens: NDArray[np.int64]
    numbers: Mapping[str, NDArray[np.float64]]
    """Per number property; null is NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexTables:
    """All that an index says before a single sample is looked at."""

    properties: Mapping[str, Property]
    combos: ComboTable
    shards: ShardTable
    blocks: BlockTable
    histogram: Histogram
    num_samples: int
    has_tokens: bool
    """Whether token counts were stored."""
