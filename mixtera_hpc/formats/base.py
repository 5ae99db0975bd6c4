"""The protocol of a file format, and the values that pass through it.

To add a format, write one file in `formats/readers/` with a class that has the three methods of `Format`, and add one
line to `formats/registry.py`:

1. `units` splits a shard into scan units: byte ranges that an index build can scan independently, on any rank.
2. `scan` reads the rows of one unit and yields `RowBatch`es: the properties, and where each block of rows lies.
3. `open` returns a `ShardReader`, which reads the rows that a plan names, block by block, and nothing else.

Modules to build on: `formats/batching/` turns rows (JSON lines, dicts, Arrow tables) into batches, `formats/codecs/`
decodes compressed files and containers, `formats/shard_errors.py` has the errors. Then run the conformance suite
`mixtera_hpc.testing.formats.CHECKS`.

The result of an index build must not depend on the number of ranks, so a row belongs to the unit in which it begins.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.index_tables import BlockTable
from mixtera_hpc.core.properties import Kind
from mixtera_hpc.formats.category_codes import Categories
from mixtera_hpc.formats.codecs.block_cache import MAX_BLOCK_BYTES, BlockCache
from mixtera_hpc.tokens.chat_template import ChatTemplate

__all__ = [
    "BlockRanges",
    "BlockRef",
    "Column",
    "Format",
    "GroupReader",
    "ParserSpec",
    "PropertyField",
    "RangeReader",
    "RowBatch",
    "RowDecoder",
    "RowFormat",
    "ScanSpec",
    "ScanUnit",
    "ShardReader",
    "TokenFormat",
    "TokenReader",
    "Vocabulary",
    "null_column",
    "split_evenly",
]

Column = Categories | NDArray[np.float64]
"""The values of one property, one per row: codes of categories, or numbers with NaN for null."""


@dataclass(frozen=True, slots=True)
class ScanUnit:
    """A byte range of a shard. A row, row group or frame belongs to the unit in which it begins."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PropertyField:
    """One property, and where its value lies in a row."""

    name: str
    path: str
    """Dotted path inside the row (`meta.language`), or a path property (`__parent__`)."""
    kind: Kind
    pattern: str | None = None
    """Regular expression; its first group becomes the value, and a value that it does not match becomes null."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParserSpec:
    """The user's function that computes properties from a row."""

    path: str
    """`package.module.function`."""
    fingerprint: str
    """Hex digest of the function's source file. An index build does not mix results of two versions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The vocabulary that token ids on disk must belong to."""

    size: int
    """One more than the largest id."""
    eos_id: int | None
    """An end-of-text token at the end of a document is not counted; the data plane adds it where the config asks."""
    bos_ids: tuple[int, ...] = ()
    """Special tokens at the beginning of a document are not counted either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanSpec:
    """Values that a scan must return for every row."""

    text: str | None
    """Place of the document, required in every row: a dotted path, or a template, function or conversation (see
    `composed_text`), which formats never get. None if rows have no text."""
    text_digest: str = ""
    """Hex digest of the function that makes the documents; empty without one."""
    chat: ChatTemplate | None = None
    """Renders the messages that `text` names; None without a tokenizer."""
    properties: tuple[PropertyField, ...] = ()
    documents: bool = False
    """Return the texts, to count their tokens or to call functions on them."""
    skip_bad: bool = False
    """List unreadable rows in `RowBatch.bad` instead of ending the scan."""
    check_rows: bool = False
    """Check every text of whole rows, because a run will decode them, also in formats where that costs extra reads."""
    whole_rows: bool = False
    """Return whole rows, for a parser."""
    parser: ParserSpec | None = None
    """Computes the properties. None: they are read from the row itself."""
    vocabulary: Vocabulary | None = None
    """For shards that hold token ids."""
    seek_folder: str | None = None
    """Folder in which a format may store seek points of the shard for its readers."""
    max_block_bytes: int = MAX_BLOCK_BYTES
    """Largest row or compressed frame, in decoded bytes. Larger ones are refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRanges:
    """Consecutive blocks of a shard; shape (n,) each."""

    offset: NDArray[np.int64]
    """First byte inside the shard; the number of the row group or record batch for Parquet and Arrow."""
    length: NDArray[np.int64]
    """Bytes on disk."""
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, ranges: list[tuple[int, int, int]]) -> "BlockRanges":
        """Build the arrays from the (offset, length, rows) of every block."""
        table = np.array(ranges, np.int64).reshape(-1, 3)
        return cls(offset=table[:, 0], length=table[:, 1], rows=table[:, 2])


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBatch:
    """Consecutive rows of a unit, a few megabytes at most."""

    rows: int
    """Number of rows."""
    blocks: BlockRanges
    """The blocks whose last row is in this batch. The rows of a long block come in several batches."""
    columns: Mapping[str, Column]
    """Property name → one value per row."""
    lengths: NDArray[np.int64] | None = None
    """Bytes of every row on disk, shape (rows,). The rows of a block add up to its length. None if rows have no
    byte range of their own."""
    documents: list[str] | None = None
    """The texts, if `ScanSpec.documents` is set."""
    tokens: NDArray[np.int64] | None = None
    """Number of tokens in every row, shape (rows,). Only from formats that hold token ids."""
    raw_rows: list[Any] | None = None
    """The whole rows, if `ScanSpec.whole_rows` is set. Any value for bad rows."""
    path_forms: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Dotted path → the forms of it that have had values in the unit so far; see `batching.row_paths`."""
    bad: tuple[tuple[int, str], ...] = ()
    """With `ScanSpec.skip_bad`, the unreadable rows: (position in the batch, problem), in ascending order. They count
    as rows everywhere, so that the positions of other rows stay right. Their columns and documents are arbitrary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRef:
    """One block of a shard, as stored in the index."""

    offset: int
    length: int
    first_row: int
    rows: int

    @classmethod
    def of(cls, blocks: BlockTable, block: int) -> "BlockRef":
        """Return one block of an index."""
        return cls(
            offset=int(blocks.offset[block]),
            length=int(blocks.length[block]),
            first_row=int(blocks.first_row[block]),
            rows=int(blocks.rows[block]),
        )


class ShardReader(Protocol):
    """Random access to one shard. Several threads may call every method at the same time."""

    def documents(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[str]:
        """Return the texts of the named rows of a block.

        Args:
            block: the block to read from.
            lengths: bytes of every row of the block, shape (block.rows,). Ignored if rows have no byte range.
            rows: positions inside the block, ascending.

        Raises:
            DataError: the shard has changed since it was indexed.
        """
        ...

    def payloads(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return the whole rows as dicts. Arguments and errors as for `documents`."""
        ...

    def close(self) -> None:
        """Release the file descriptor. A second call does nothing."""
        ...


class TokenReader(ShardReader, Protocol):
    """Random access to a shard that holds token ids instead of texts."""

    def tokens(self, block: BlockRef, rows: NDArray[np.int64]) -> list[NDArray[Any]]:
        """Return the token ids of the named rows of a block: views of mapped memory, in the file's integer type."""
        ...


@runtime_checkable
class RangeReader(Protocol):
    """Additional methods of a `ShardReader` whose rows have byte ranges: they read rows of many blocks in one call."""

    def documents_at(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[str]:
        """Return the texts of the rows at these byte ranges.

        Args:
            starts: first byte of each row inside the shard, ascending.
            lengths: bytes of each row.

        Raises:
            DataError: the shard has changed since it was indexed.
        """
        ...

    def payloads_at(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return the whole rows as dicts. Arguments and errors as for `documents_at`."""
        ...


@runtime_checkable
class GroupReader(Protocol):
    """An additional method of a `ShardReader` whose blocks may have too many rows to make their dicts in one call."""

    def payload_groups(self, block: BlockRef, rows: NDArray[np.int64]) -> Iterator[list[dict[str, Any]]]:
        """Yield the named rows of a block as dicts, in groups that take less than 1 ms. Errors as for `payloads`."""
        ...


class RowDecoder(Protocol):
    """A decoder of rows that needs their bytes only, whichever file they are in. It keeps no part of these bytes."""

    def documents(self, rows: Sequence[bytes | memoryview]) -> list[str]:
        """Return the texts of rows.

        Raises:
            ValueError: a row is not what it was when it was indexed.
        """
        ...

    def payloads(self, rows: Sequence[bytes | memoryview]) -> list[Any]:
        """Return the whole rows as dicts. Errors as for `documents`."""
        ...


class Format(Protocol):
    """One file format. Formats are stateless; a `ShardReader` owns the open file."""

    @property
    def name(self) -> str:
        """The value of `data.format` that selects this format."""
        ...

    @property
    def holds_tokens(self) -> bool:
        """True for a `TokenFormat`, whose readers are `TokenReader`s."""
        ...

    @property
    def may_be_empty(self) -> bool:
        """True if a file of 0 bytes is a valid shard without rows, or if `scan` decides it."""
        ...

    @property
    def maps_files(self) -> bool:
        """True if readers map shards into memory.

        A shard that became shorter would end the process, so runs compare it with the index before a read, too.
        """
        ...

    def units(self, path: Path, size_bytes: int) -> list[ScanUnit]:
        """Split a shard into units that can be scanned independently and together cover every row once."""
        ...

    def scan(self, path: Path, unit: ScanUnit, spec: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
        """Read the rows of one unit, in order.

        Args:
            path: the shard.
            unit: one of the ranges that `units` returned.
            spec: what to return for every row.
            block_rows: rows per block, for formats that can choose it.

        Raises:
            DataError: rows cannot be read; the notes name the first ten of the unit. With `spec.skip_bad`, only if no
                rows can be told apart, for example in a damaged frame or footer.
        """
        ...

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        """Open a shard for random access.

        Args:
            path: the shard.
            text: dotted path to the document. None if the caller reads payloads only.
            cache: decoded blocks, for formats that cannot read single rows. All readers of a rank share it.

        Raises:
            DataError: the shard cannot be opened.
        """
        ...


@runtime_checkable
class RowFormat(Protocol):
    """Additional method of a `Format` whose rows are byte ranges of the file: rows of many shards share one loop."""

    def row_decoder(self, text: str | None) -> RowDecoder:
        """Return the decoder of rows with documents at the dotted path `text`."""
        ...


class TokenFormat(Format, Protocol):
    """A format whose shards hold token ids instead of texts: `holds_tokens` is True, and rows have byte ranges."""

    def map_tokens(self, path: Path, first_rows: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[Any]:
        """Map a shard into memory, and return all its bytes as token ids in the file's integer type.

        Args:
            path: the shard.
            first_rows: number of the first row of some blocks.
            offsets: first byte of these blocks.

        Raises:
            DataError: the shard cannot be read, or a block does not begin where the index says.
        """
        ...


def null_column(kind: Kind, rows: int) -> Column:
    """Build the column of a property that is null in all `rows` rows."""
    if kind is Kind.NUMBER:
        return np.full(rows, np.nan)
    return Categories([()], np.zeros(rows, np.int32))


def split_evenly(size_bytes: int, unit_bytes: int) -> list[ScanUnit]:
    """Split a shard into units of `unit_bytes` bytes; the last one may be shorter."""
    starts = range(0, size_bytes, unit_bytes)
    return [ScanUnit(start, min(start + unit_bytes, size_bytes)) for start in starts]
