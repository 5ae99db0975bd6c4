"""Megatron-LM's token files: `NAME.bin` holds the ids of all documents in a row, `NAME.idx` where each begins.

A row is a document, a block `index.block_rows` of them. Ids are mapped into memory and handed out as they lie there. What
else is known of a document comes from the path, or from `NAME.sidecar.jsonl`: one line per document, in order. A document that
ends with the end-of-text token is counted without it, and gets it back where `dataplane.add_eos` wants it: files written with
and without `--append-eod` give the same stream.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import (
    BlockRanges,
    BlockRef,
    Column,
    RowBatch,
    ScanSpec,
    ScanUnit,
    ShardReader,
    cut,
    nulls,
    shard_changed,
)
from mixtera_hpc.formats.category_codes import Categories
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.readers.jsonl import JsonlFormat
from mixtera_hpc.formats.registry import SIDECAR_SUFFIX

__all__ = ["DTYPES", "HEADER", "MAGIC", "MegatronFormat", "sidecar_of"]

UNIT_BYTES = 1 << 30
BATCH_ROWS = 8192
MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the dtype, number of sequences, length of the document table."""
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Megatron's codes of integer types (6 and 7 are floats)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronFormat:
    """`Format` of `.bin` files with an `.idx` beside them."""

    name: str = "megatron"
    holds_tokens: bool = True
    unit_bytes: int = UNIT_BYTES

    def units(self, path: Path, size_bytes: int) -> list[ScanUnit]:
        return cut(size_bytes, self.unit_bytes)

    def scan(self, path: Path, unit: ScanUnit, fields: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
        documents = _Documents(path)
        last_unit = unit.stop == documents.starts[-1]
        first, last = np.searchsorted(documents.starts[:-1], [unit.start, unit.stop]).tolist()
        last = documents.count if last_unit else last
        scan = _Scan(documents, fields, block_rows)
        for begin, end, columns, raw in _properties(path, documents, fields, (first, last)):
            yield scan.batch(begin, end, columns, raw, blocks_of=(first, last))

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        return _Reader(path)


def sidecar_of(path: Path) -> Path:
    """Where the properties of a shard's documents may be."""
    return path.with_name(path.stem + SIDECAR_SUFFIX)


class _Documents:
    """A shard and its table of documents, both mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        dtype, lengths, pointers, table = _read_idx(path.with_suffix(".idx"), path)
        try:
            size = path.stat().st_size
            self.ids: NDArray[Any] = np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}.\n  Run mixtera-hpc index verify.") from None
        ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
        if len(table) < 2:
            table = np.arange(len(lengths) + 1)
        bounds = np.concatenate([[0], ends])
        follow = np.array_equal(pointers, bounds[:-1]) and (lengths >= 0).all() and table[0] == 0
        if not follow or table[-1] != len(lengths) or (np.diff(table) < 0).any():
            raise DataError(
                f"{path.with_suffix('.idx')} is damaged: its sequences do not follow each other.\n"
                "  Copy it again, or leave the shard out with data.exclude."
            )
        if bounds[-1] != size:
            raise DataError(
                f"{path} has {size} bytes, but its .idx speaks of {int(bounds[-1])}: one of the two was cut off or replaced.\n"
                "  Copy both again, or leave the shard out with data.exclude."
            )
        self.starts: NDArray[np.int64] = bounds[table]
        """First byte of every document, and the end of the last; shape (count + 1,)."""

    @property
    def count(self) -> int:
        return len(self.starts) - 1

    @property
    def bounds(self) -> NDArray[np.int64]:
        """As `starts`, in tokens."""
        return self.starts // self.ids.itemsize


def _read_idx(path: Path, shard: Path) -> tuple[np.dtype[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Type of the ids, lengths and first bytes of the sequences, and the first sequence of every document."""
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{shard} needs {path.name} beside it, which cannot be read: {error}.\n"
            "  Where it is no Megatron file at all, leave it out with data.exclude."
        ) from None
    head = bytes(data[: HEADER.size])
    magic, version, code, sequences, documents = HEADER.unpack(head.ljust(HEADER.size, b"\0"))
    if magic != MAGIC or version != 1 or code not in DTYPES:
        raise DataError(
            f"{path} is not the index of a Megatron file of integer ids: magic {magic!r}, version {version}, type code {code}.\n"
            "  Write it again with integer ids, or leave the .bin file beside it out with data.exclude."
        )
    wanted = HEADER.size + 12 * sequences + 8 * documents
    if len(data) not in (wanted, wanted + sequences):
        raise DataError(f"{path} is truncated: {len(data)} bytes, its header speaks of {wanted}.\n  Copy it again.")
    lengths = np.frombuffer(data, "<i4", sequences, HEADER.size)
    pointers = np.frombuffer(data, "<i8", sequences, HEADER.size + 4 * sequences)
    table = np.frombuffer(data, "<i8", documents, HEADER.size + 12 * sequences)
    return np.dtype(DTYPES[code]), lengths, pointers, table


class _Scan:
    """Counts the tokens of one unit and holds its ids against the vocabulary."""

    def __init__(self, documents: _Documents, fields: ScanSpec, block_rows: int) -> None:
        self._documents, self._fields, self._block_rows = documents, fields, block_rows
        self._bounds = documents.bounds

    def batch(
        self, begin: int, end: int, columns: dict[str, Column], raw: list[Any] | None, blocks_of: tuple[int, int]
    ) -> RowBatch:
        """Documents [begin, end) of the unit's documents `blocks_of`."""
        first, last = blocks_of
        bad = self._check_ids(begin, end)
        return RowBatch(
            rows=end - begin,
            blocks=self._blocks(begin, end, first, last),
            columns=columns,
            tokens=self._counts(begin, end),
            documents=[] if self._fields.documents else None,
            raw=raw,
            bad=bad,
        )

    def _blocks(self, begin: int, end: int, first: int, last: int) -> BlockRanges:
        """Blocks that end in (begin, end]."""
        starts = self._documents.starts
        stops = [s for s in [*range(first + self._block_rows, last, self._block_rows), last] if begin < s <= end]
        firsts = [max(first, s - 1 - (s - 1 - first) % self._block_rows) for s in stops]
        return BlockRanges.of(
            [(int(starts[a]), int(starts[b] - starts[a]), b - a) for a, b in zip(firsts, stops, strict=True)]
        )

    def _counts(self, begin: int, end: int) -> NDArray[np.int64]:
        """Tokens of every document, without an end-of-text token at its end."""
        bounds = self._bounds[begin : end + 1]
        counts = np.diff(bounds)
        eos = self._fields.vocabulary.eos_id if self._fields.vocabulary else None
        if eos is not None:
            some = np.flatnonzero(counts)
            counts[some] -= self._documents.ids[bounds[some + 1] - 1] == eos
        return counts

    def _check_ids(self, begin: int, end: int) -> tuple[tuple[int, str], ...]:
        """Refuse, or list, documents with ids that the vocabulary does not have."""
        vocabulary, bounds = self._fields.vocabulary, self._bounds[begin : end + 1]
        ids = self._documents.ids[bounds[0] : bounds[-1]]
        if vocabulary is None or not len(ids) or (int(ids.max()) < vocabulary.size and int(ids.min()) >= 0):
            return ()
        at = np.flatnonzero((ids >= vocabulary.size) | (ids < 0))
        rows, firsts = np.unique(np.searchsorted(bounds - bounds[0], at, side="right") - 1, return_index=True)
        found = [
            (int(r), f"id {int(ids[at[i]])} in a vocabulary of {vocabulary.size}")
            for r, i in zip(rows, firsts, strict=True)
        ]
        if self._fields.skip_bad:
            return tuple(found)
        error = DataError(
            f"{self._documents.path} holds token ids of another vocabulary than dataplane.tokenizer or dataplane.vocab_size.\n"
            "  Give the tokenizer the file was written with."
        )
        for row, problem in found[:10]:
            error.add_note(f"shard={str(self._documents.path)!r} row={begin + row}: {problem}")
        raise error


Part = tuple[int, int, dict[str, Column], list[Any] | None]


def _properties(path: Path, documents: _Documents, fields: ScanSpec, unit: tuple[int, int]) -> Iterator[Part]:
    """Documents [begin, end) with their properties, until the unit is through."""
    first, last = unit
    sidecar = sidecar_of(path)
    if not sidecar.exists() or not (fields.properties or fields.rows):
        for begin in range(first, last, BATCH_ROWS):
            end = min(begin + BATCH_ROWS, last)
            nothing: dict[str, Column] = {f.name: nulls(f.kind, end - begin) for f in fields.properties}
            yield begin, end, nothing, [{} for _ in range(end - begin)] if fields.rows else None
        return
    position = 0
    wanted = replace(fields, text=None, documents=False, skip_bad=False)
    for batch in JsonlFormat().scan(sidecar, ScanUnit(0, sidecar.stat().st_size), wanted, BATCH_ROWS):
        begin, end = max(position, first), min(position + batch.rows, last)
        if begin < end:
            rows = slice(begin - position, end - position)
            columns = {name: _sliced(column, rows) for name, column in batch.columns.items()}
            yield begin, end, columns, batch.raw[rows] if batch.raw is not None else None
        position += batch.rows
    if position != documents.count:
        raise DataError(
            f"{sidecar} has {position} lines, but {path.name} has {documents.count} documents.\n"
            "  Write a line for every document, in order, or remove the sidecar."
        )


def _sliced(column: Column, rows: slice) -> Column:
    return Categories(column.values, column.code[rows]) if isinstance(column, Categories) else column[rows]


class _Reader:
    """Hands out views of the mapped ids."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._documents = _Documents(path)
        self._bounds = self._documents.bounds

    def tokens(self, block: BlockRef, rows: NDArray[np.int64]) -> list[NDArray[Any]]:
        last = block.first_row + block.rows
        if last > self._documents.count or self._documents.starts[block.first_row] != block.offset:
            raise shard_changed(self._path, block, "its documents lie elsewhere")
        at = block.first_row + rows
        bounds = zip(self._bounds[at].tolist(), self._bounds[at + 1].tolist(), strict=True)
        return [self._documents.ids[a:b] for a, b in bounds]

    def documents(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[str]:
        raise DataError(f"{self._path} holds token ids, no texts.")

    def payloads(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        return [{"tokens": ids} for ids in self.tokens(block, rows)]

    def close(self) -> None:
        """Mapped memory goes when the last view of it does."""
