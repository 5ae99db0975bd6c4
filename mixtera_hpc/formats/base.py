"""One protocol for every kind of data file, and the values that pass through it.

A shard is cut into **units** that can be scanned independently, so that an index build splits below the file and gives the
same result for any number of workers. A scan reads only what the index needs; an opened shard reads only the rows that a
plan names. Adding a format is one file with these three methods and one line in `registry.py`.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.index_tables import BlockTable
from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.category_codes import Categories
from mixtera_hpc.formats.codecs.block_cache import BlockCache

__all__ = [
    "BlockRanges",
    "BlockRef",
    "Column",
    "Format",
    "ParserSpec",
    "PropertyField",
    "RangeReader",
    "RowBatch",
    "ScanSpec",
    "ScanUnit",
    "ShardReader",
    "TokenReader",
    "Vocabulary",
    "bad_rows",
    "cut",
    "nulls",
    "open_shard",
    "shard_changed",
    "unreadable",
]

MAX_BAD_ROWS = 10
"""Bad rows of a unit that are named before its scan gives up."""

Column = Categories | NDArray[np.float64]
"""The values of one property: codes into a small list, or numbers with NaN for null."""


@dataclass(frozen=True, slots=True)
class ScanUnit:
    """A byte range of a shard; a row, row group or frame belongs to the unit in which it begins."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PropertyField:
    """One property and where a row has it."""

    name: str
    path: str
    """Dotted path inside the row, or an origin (`__parent__`)."""
    kind: Kind
    pattern: str | None = None
    """Regular expression whose first group is taken out of the value; where it does not match, the value is null."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParserSpec:
    """The user's function from a row to its properties."""

    path: str
    """`package.module.function`."""
    fingerprint: str
    """Hex digest of the file it is written in: another version of it is another index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What token ids on disk are held against."""

    size: int
    """One more than the largest id."""
    eos_id: int | None
    """A document that ends with it is counted without: the data plane adds it where it is wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanSpec:
    """What a scan looks at."""

    text: str | None
    """Dotted path to the document, and every row must have it; None: rows have none."""
    properties: tuple[PropertyField, ...] = ()
    documents: bool = False
    """Whether the texts themselves are wanted: to count tokens, or for functions over them."""
    skip_bad: bool = False
    """Whether rows that cannot be read are listed in `RowBatch.bad` instead of ending the scan."""
    rows: bool = False
    """Whether whole rows are wanted, for a parser."""
    parser: ParserSpec | None = None
    """Where properties come from instead of the row itself."""
    vocabulary: Vocabulary | None = None
    """For shards that hold token ids."""
    seek_folder: str | None = None
    """Where a format may leave seek points of a shard, for readers to come."""
    max_block_bytes: int = 4 << 30
    """A row or a compressed frame that decodes to more is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRanges:
    """Blocks of a shard, in order; shape (n,) each."""

    offset: NDArray[np.int64]
    """First byte inside the shard; for Parquet the row group's number."""
    length: NDArray[np.int64]
    """Bytes on disk."""
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, ranges: list[tuple[int, int, int]]) -> "BlockRanges":
        """From (offset, length, rows) of every block."""
        table = np.array(ranges, np.int64).reshape(-1, 3)
        return cls(offset=table[:, 0], length=table[:, 1], rows=table[:, 2])


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBatch:
    """Consecutive rows of a unit, at most some megabytes of them."""

    rows: int
    blocks: BlockRanges
    """The blocks that end with one of these rows; the rows of a long block come in several batches."""
    columns: Mapping[str, Column]
    """Per property, shape (rows,)."""
    lengths: NDArray[np.int64] | None = None
    """Bytes of every row on disk, shape (rows,), adding up to the blocks'; None where rows have no byte range."""
    documents: list[str] | None = None
    """The texts, when `ScanSpec.documents` asked for them."""
    tokens: NDArray[np.int64] | None = None
    """Tokens of every row, shape (rows,), of formats that hold token ids."""
    raw: list[Any] | None = None
    """The whole rows, when `ScanSpec.rows` asked for them; anything for bad rows."""
    bad: tuple[tuple[int, str], ...] = ()
    """With `ScanSpec.skip_bad`, the rows that cannot be read: position in the batch, ascending, and the problem. They count as
    rows everywhere, so that the positions of all others stay right; columns and documents hold anything for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRef:
    """Where one block lies in its shard; the same numbers as in the index."""

    offset: int
    length: int
    first_row: int
    rows: int

    @classmethod
    def of(cls, blocks: BlockTable, block: int) -> "BlockRef":
        """One block of an index."""
        return cls(
            offset=int(blocks.offset[block]),
            length=int(blocks.length[block]),
            first_row=int(blocks.first_row[block]),
            rows=int(blocks.rows[block]),
        )


class ShardReader(Protocol):
    """Random access to one shard. Every method may be called from several threads at once."""

    def documents(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[str]:
        """The texts of some rows of a block.

        Args:
            lengths: bytes of every row of the block, shape (block.rows,); not looked at where rows have no byte range.
            rows: positions inside the block, ascending.

        Raises:
            DataError: the shard is not what it was when it was indexed.
        """
        ...

    def payloads(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        """The whole rows as dicts; arguments as for `documents`."""
        ...

    def close(self) -> None:
        """Give back the file descriptor; harmless when done twice."""
        ...


class TokenReader(ShardReader, Protocol):
    """A reader of shards that hold token ids instead of texts."""

    def tokens(self, block: BlockRef, rows: NDArray[np.int64]) -> list[NDArray[Any]]:
        """The token ids of some rows of a block, as they are stored: views of mapped memory, of any integer type."""
        ...


@runtime_checkable
class RangeReader(Protocol):
    """What a `ShardReader` offers as well when every row has bytes of its own: rows of many blocks in one call."""

    def documents_at(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[str]:
        """The texts of some rows.

        Args:
            starts: first byte of each row inside the shard, ascending.
            lengths: bytes of each row.

        Raises:
            DataError: the shard is not what it was when it was indexed.
        """
        ...

    def payloads_at(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[dict[str, Any]]:
        """The whole rows as dicts; arguments as for `documents_at`."""
        ...


class Format(Protocol):
    """One kind of data file. Stateless; what is open belongs to a `ShardReader`."""

    @property
    def name(self) -> str:
        """What `data.format` calls it."""
        ...

    @property
    def holds_tokens(self) -> bool:
        """Whether its readers are `TokenReader`s."""
        ...

    def units(self, path: Path, size_bytes: int) -> list[ScanUnit]:
        """Cut a shard into pieces that can be scanned independently; together they cover every row once."""
        ...

    def scan(self, path: Path, unit: ScanUnit, fields: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
        """Read the rows of one unit, in order.

        Args:
            block_rows: rows of a block, where the format is free to choose.

        Raises:
            DataError: rows that cannot be read, the first ten of the unit named in its notes; with `fields.skip_bad` only
                what leaves no rows to speak of, such as a damaged frame or footer.
        """
        ...

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        """Open a shard for random access.

        Args:
            text: dotted path to the document; None where only payloads are read.
            cache: keeps decoded blocks of formats that cannot read single rows; shared by many readers.
        """
        ...


def nulls(kind: Kind, rows: int) -> Column:
    """A property that none of `rows` rows has."""
    return np.full(rows, np.nan) if kind is Kind.NUMBER else Categories([()], np.zeros(rows, np.int32))


def open_shard(path: Path) -> int:
    """A descriptor to read from.

    Raises:
        DataError: the shard cannot be opened.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror}.\n  Run mixtera-hpc index verify.") from None


def cut(size_bytes: int, unit_bytes: int) -> list[ScanUnit]:
    """Units of equal size, the last one shorter."""
    return [ScanUnit(start, min(start + unit_bytes, size_bytes)) for start in range(0, size_bytes, unit_bytes)]


def bad_rows(path: Path, bad: list[tuple[int, str]]) -> DataError:
    """The error for rows that cannot be read, given as (row of the shard, problem); at most `MAX_BAD_ROWS` of them."""
    count = f"at least {len(bad)} rows" if len(bad) >= MAX_BAD_ROWS else f"{len(bad)} row{'s' * (len(bad) > 1)}"
    error = DataError(
        f"{path} has {count} that cannot be read; every row needs its text where data.text says, and values of the kinds "
        "that data.properties names.\n  Repair or remove them, leave the file out with data.exclude, or leave the rows out "
        "with data.on_bad_sample=skip."
    )
    for row, problem in bad:
        error.add_note(f"shard={str(path)!r} row={row}: {problem}")
    return error


def unreadable(path: Path, what: str, error: Exception) -> DataError:
    """The error for a part of a shard that its library cannot read."""
    return DataError(
        f"{path}: {what} cannot be read: {error}.\n  Write or copy the file again, or leave it out with data.exclude."
    )


def shard_changed(path: Path, block: BlockRef | None, problem: str) -> DataError:
    """The error of every reader that finds other rows than the index promised; `block` where it is known."""
    error = DataError(
        f"{path} is not what it was when it was indexed: {problem}.\n"
        "  Run mixtera-hpc index verify, then mixtera-hpc index build."
    )
    if block is not None:
        error.add_note(f"shard={str(path)!r} rows {block.first_row} to {block.first_row + block.rows - 1}")
    return error
