"""The tables of an index that planning needs. Their size is O(blocks + histogram cells), never O(samples)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.properties import ComboTable, Property

__all__ = [
    "BLOCK_COLUMNS",
    "BlockTable",
    "DomainTable",
    "Histogram",
    "IndexTables",
    "SampleColumns",
    "ShardTable",
    "Zones",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTable:
    """The data files (shards), in index order; every field has shape (num_shards,)."""

    path: tuple[str, ...]
    """Path below the data root."""
    format: tuple[str, ...]
    """Name of the format that reads the shard."""
    rows: NDArray[np.int64]
    # Size and modification time are recorded to detect files that changed after the build.
    size_bytes: NDArray[np.int64]
    mtime_ns: NDArray[np.int64]
    fingerprint: tuple[str, ...]
    """Digest of the content, in hexadecimal."""
    dataset: tuple[str, ...] = ()
    """Name of the data root; empty if there is only one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Zones:
    """Smallest and largest value of one number property in every block; shape (num_blocks,) each.

    `low` and `high` are NaN in blocks whose values are all null.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    has_null: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTable:
    """The blocks, which are the units of I/O and shuffling, in index order; every field has shape (num_blocks,)."""

    shard: NDArray[np.int32]
    first_row: NDArray[np.int64]
    """Position of the first row inside the shard."""
    rows: NDArray[np.int32]
    offset: NDArray[np.int64]
    """First byte inside the shard; for Parquet the number of the row group."""
    length: NDArray[np.int64]
    """Bytes on disk."""
    first_sample: NDArray[np.int64]
    """Position of the block's first row in the per-sample columns."""
    zones: Mapping[str, Zones]
    """Name of the number property → its zones."""

    def __len__(self) -> int:
        return len(self.shard)


BLOCK_COLUMNS = ("shard", "first_row", "rows", "offset", "length", "first_sample")
"""Names of the array fields of a `BlockTable`, which are all but `zones`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """The rows and tokens of every combo in every block, sparse.

    The entries of block b are `indptr[b]:indptr[b + 1]`, with ascending combos. There may be a hundred million entries,
    so the arrays keep the narrow unsigned integer types of the index file.
    """

    indptr: NDArray[np.int64]
    """Shape (num_blocks + 1,)."""
    combo: NDArray[np.integer[Any]]
    rows: NDArray[np.integer[Any]]
    tokens: NDArray[np.integer[Any]]
    """Without special tokens; 0 if the index was built without a tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainTable:
    """The rows and tokens that every domain has in every block.

    Entries of domain d are `indptr[d]:indptr[d + 1]`, with ascending blocks. A block may belong to several domains.
    """

    indptr: NDArray[np.int64]
    """Shape (num_domains + 1,)."""
    block: NDArray[np.int32]
    rows: NDArray[np.int32]
    tokens: NDArray[np.int64]
    """Without special tokens."""

    @property
    def num_domains(self) -> int:
        return len(self.indptr) - 1

    def totals(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows and the tokens of every domain; shape (num_domains,) each."""
        rows = np.zeros(self.num_domains, np.int64)
        tokens = np.zeros(self.num_domains, np.int64)
        # `np.add.reduceat` gives a wrong sum for an empty slice. Running sums would need 16 bytes per entry.
        filled = np.flatnonzero(np.diff(self.indptr))
        if len(filled):
            first = self.indptr[filled]
            rows[filled] = np.add.reduceat(self.rows, first, dtype=np.int64)
            tokens[filled] = np.add.reduceat(self.tokens, first, dtype=np.int64)
        return rows, tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleColumns:
    """The samples of one block, or of several blocks concatenated; one entry per row."""

    combo: NDArray[np.int32]
    length: NDArray[np.int64]
    """Bytes of the row on disk. If rows have no byte range of their own (Parquet): bytes of the document, 0 if tokens
    were not counted."""
    tokens: NDArray[np.int64]
    numbers: Mapping[str, NDArray[np.float64]]
    """Name of the number property → its values; null is NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexTables:
    """The content of an index without its per-sample columns."""

    properties: Mapping[str, Property]
    combos: ComboTable
    shards: ShardTable
    blocks: BlockTable
    histogram: Histogram
    num_samples: int
    has_tokens: bool
    """True if the index holds token counts."""
