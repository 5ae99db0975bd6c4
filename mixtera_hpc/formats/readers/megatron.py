"""Megatron-LM's token files: `NAME.bin` holds the token ids of all documents, `NAME.idx` says where each begins.

A row is a document, a block is `index.block_rows` documents. Ids are memory mapped and returned as they are stored.
Properties come from the path, or from `NAME.sidecar.jsonl` with one line per document, in order. An end-of-text token
at the end of a document is not counted as part of it; the data plane adds one where `dataplane.add_eos` asks for it. So
files written with and without `--append-eod` give the same stream. The same holds for a token that begins documents.
"""

import os
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
    null_column,
    split_evenly,
)
from mixtera_hpc.formats.category_codes import Categories
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.megatron_index import read_document_starts, read_token_layout
from mixtera_hpc.formats.file_memory import map_descriptor, read_single_pages
from mixtera_hpc.formats.readers.jsonl import JsonlFormat
from mixtera_hpc.formats.registry import SIDECAR_SUFFIX
from mixtera_hpc.formats.shard_errors import MAX_BAD_ROWS, cannot_open_error, open_shard, shard_changed_error

__all__ = ["MegatronFormat", "sidecar_of"]

UNIT_BYTES = 1 << 30
BATCH_ROWS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronFormat:
    """`Format` of `.bin` files with an `.idx` file in the same folder."""

    name: str = "megatron"
    holds_tokens: bool = True
    may_be_empty: bool = True
    maps_files: bool = True
    unit_bytes: int = UNIT_BYTES

    def units(self, path: Path, size_bytes: int) -> list[ScanUnit]:
        """Split the shard into byte ranges of equal size; a document belongs to the unit in which it begins."""
        return split_evenly(size_bytes, self.unit_bytes)

    def scan(self, path: Path, unit: ScanUnit, spec: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
        """Count the tokens of the documents that begin in the unit, and check their ids."""
        documents = _TokenDocuments(path)
        first, stop = np.searchsorted(documents.starts[:-1], [unit.start, unit.stop]).tolist()
        # Empty documents at the end of the file begin at its size, and belong to the last unit.
        if unit.stop == documents.starts[-1]:
            stop = documents.count

        unit_documents = range(first, stop)
        unit_scan = _TokenScan(documents, spec, block_rows, unit_documents)
        for segment in _read_properties(documents, spec, unit_documents):
            yield unit_scan.batch(segment)

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        """Map the shard into memory."""
        return MegatronReader(path)

    def map_tokens(self, path: Path, first_rows: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[Any]:
        """Map the `.bin` file; see `TokenFormat`. Reads of the `.idx` file only where the blocks begin."""
        # First, so that a missing shard is named.
        descriptor = open_shard(path)
        try:
            dtype, starts = read_document_starts(path, first_rows)
            moved = np.flatnonzero(starts != offsets)
            if len(moved):
                raise shard_changed_error(path, None, f"document {int(first_rows[moved[0]])} lies elsewhere")
            data = map_descriptor(descriptor)
            if len(data):
                read_single_pages(data.ctypes.data, len(data))
        except OSError as error:
            raise cannot_open_error(path, error) from None
        finally:
            os.close(descriptor)
        return np.frombuffer(data, dtype, len(data) // dtype.itemsize)


def sidecar_of(path: Path) -> Path:
    """Return the path of the file that may contain the properties of a shard's documents."""
    return path.with_name(path.stem + SIDECAR_SUFFIX)


class _TokenDocuments:
    """The token ids of a shard, memory mapped, and where its documents lie.

    Raises:
        DataError: the `.bin` or the `.idx` file cannot be read, or they do not belong together.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        layout = read_token_layout(path)
        try:
            size = path.stat().st_size
            # An empty file cannot be mapped.
            self.ids: NDArray[Any] = np.memmap(path, layout.dtype, "r") if size else np.zeros(0, layout.dtype)
        except (OSError, ValueError) as error:
            raise cannot_open_error(path, error) from None
        self.starts = layout.starts
        """First byte of every document, and the end of the last; shape (count + 1,)."""
        expected = int(self.starts[-1])
        if size != expected:
            raise DataError(
                f"{path} has {size} bytes, but its .idx file describes {expected}: one of the two was "
                "cut off or replaced.\n"
                "  Copy both again, or exclude the shard with data.exclude."
            )

    @property
    def count(self) -> int:
        """Number of documents."""
        return len(self.starts) - 1

    @property
    def token_starts(self) -> NDArray[np.int64]:
        """Like `starts`, but in tokens instead of bytes."""
        return self.starts // self.ids.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class _DocumentSegment:
    """Consecutive documents of a shard and their properties."""

    numbers: range
    """Numbers of the documents."""
    columns: dict[str, Column]
    raw_rows: list[Any] | None


class _TokenScan:
    """Builds the batches of one unit, whose documents have the numbers `unit_documents`."""

    def __init__(self, documents: _TokenDocuments, spec: ScanSpec, block_rows: int, unit_documents: range) -> None:
        self._documents = documents
        self._spec = spec
        self._block_rows = block_rows
        self._unit_documents = unit_documents
        self._token_starts = documents.token_starts

    def batch(self, segment: _DocumentSegment) -> RowBatch:
        """Build the batch of some documents of the unit.

        Raises:
            DataError: a document has ids that the vocabulary lacks, and bad rows are not skipped.
        """
        first = segment.numbers.start
        stop = segment.numbers.stop
        bad = self._find_foreign_ids(first, stop)
        if bad and not self._spec.skip_bad:
            raise self._foreign_ids_error(first, bad)
        return RowBatch(
            rows=stop - first,
            blocks=self._blocks_ending_in(first, stop),
            columns=segment.columns,
            lengths=np.diff(self._documents.starts[first : stop + 1]),
            tokens=self._count_tokens(first, stop),
            documents=[] if self._spec.documents else None,
            raw_rows=segment.raw_rows,
            bad=bad,
        )

    def _blocks_ending_in(self, first: int, stop: int) -> BlockRanges:
        """Return the blocks whose last document is one of [first, stop)."""
        # A block begins every `block_rows` documents from the start of the unit.
        starts = self._documents.starts
        ranges = []
        for block_first in self._unit_documents[:: self._block_rows]:
            block_stop = min(block_first + self._block_rows, self._unit_documents.stop)
            if first < block_stop <= stop:
                offset = int(starts[block_first])
                ranges.append((offset, int(starts[block_stop]) - offset, block_stop - block_first))
        return BlockRanges.of(ranges)

    def _count_tokens(self, first: int, stop: int) -> NDArray[np.int64]:
        """Count the tokens of every document, without the special tokens that begin and end it."""
        bounds = self._token_starts[first : stop + 1]
        counts = np.diff(bounds)
        vocabulary = self._spec.vocabulary
        if vocabulary is None:
            return counts
        if vocabulary.eos_id is not None:
            # Compare the last id of every document that is not empty.
            nonempty = np.flatnonzero(counts)
            last_ids = self._documents.ids[bounds[nonempty + 1] - 1]
            counts[nonempty] -= last_ids == vocabulary.eos_id

        num_bos = len(vocabulary.bos_ids)
        if num_bos:
            # Compare the first ids of every document that is long enough.
            long_enough = np.flatnonzero(counts >= num_bos)
            first_ids = self._documents.ids[bounds[long_enough, None] + np.arange(num_bos)]
            counts[long_enough] -= num_bos * (first_ids == vocabulary.bos_ids).all(axis=1)
        return counts

    def _find_foreign_ids(self, first: int, stop: int) -> tuple[tuple[int, str], ...]:
        """Return (position, problem) for every document that has an id outside the vocabulary."""
        vocabulary = self._spec.vocabulary
        bounds = self._token_starts[first : stop + 1]
        ids = self._documents.ids[bounds[0] : bounds[-1]]
        # Nearly always all ids are in the vocabulary; two reductions over the mapped ids show it.
        if vocabulary is None or not len(ids) or (int(ids.max()) < vocabulary.size and int(ids.min()) >= 0):
            return ()

        # Assign every foreign id to its document, and keep the first one of each document.
        positions = np.flatnonzero((ids >= vocabulary.size) | (ids < 0))
        document_of = np.searchsorted(bounds - bounds[0], positions, side="right") - 1
        rows, first_of_row = np.unique(document_of, return_index=True)
        foreign_ids = ids[positions[first_of_row]].tolist()
        return tuple(
            (row, f"id {token_id} in a vocabulary of {vocabulary.size}")
            for row, token_id in zip(rows.tolist(), foreign_ids, strict=True)
        )

    def _foreign_ids_error(self, first: int, bad: tuple[tuple[int, str], ...]) -> DataError:
        path = self._documents.path
        error = DataError(
            f"{path} holds token ids outside the vocabulary of dataplane.tokenizer or dataplane.vocab_size.\n"
            "  Set dataplane.tokenizer to the one with which the file was written."
        )
        for row, problem in bad[:MAX_BAD_ROWS]:
            error.add_note(f"shard={str(path)!r} row={first + row}: {problem}")
        return error


def _read_properties(documents: _TokenDocuments, spec: ScanSpec, unit_documents: range) -> Iterator[_DocumentSegment]:
    """Yield the documents of a unit with their properties, from the sidecar if there is one."""
    if sidecar_of(documents.path).exists() and (spec.properties or spec.whole_rows):
        yield from _read_sidecar(documents, spec, unit_documents)
        return
    for start in range(0, len(unit_documents), BATCH_ROWS):
        numbers = unit_documents[start : start + BATCH_ROWS]
        yield _DocumentSegment(
            numbers=numbers,
            columns={field.name: null_column(field.kind, len(numbers)) for field in spec.properties},
            raw_rows=[{} for _ in numbers] if spec.whole_rows else None,
        )


def _read_sidecar(documents: _TokenDocuments, spec: ScanSpec, unit_documents: range) -> Iterator[_DocumentSegment]:
    """Yield the documents of a unit with the properties in the lines of the sidecar.

    Raises:
        DataError: a line cannot be read, or the sidecar has not exactly one line per document.
    """
    # Every line is needed to keep the numbers of documents right, so bad lines cannot be skipped.
    line_spec = replace(spec, text=None, documents=False, skip_bad=False)
    sidecar = sidecar_of(documents.path)
    whole_file = ScanUnit(0, sidecar.stat().st_size)
    position = 0  # Documents before the current batch of lines.
    for batch in JsonlFormat().scan(sidecar, whole_file, line_spec, BATCH_ROWS):
        # The part of these lines that belongs to the unit.
        first = max(position, unit_documents.start)
        stop = min(position + batch.rows, unit_documents.stop)
        if first < stop:
            rows = slice(first - position, stop - position)
            yield _DocumentSegment(
                numbers=range(first, stop),
                columns={name: _slice_column(column, rows) for name, column in batch.columns.items()},
                raw_rows=batch.raw_rows[rows] if batch.raw_rows is not None else None,
            )
        position += batch.rows

    if position != documents.count:
        raise DataError(
            f"{sidecar} has {position} lines, but {documents.path.name} has {documents.count} documents.\n"
            "  Write one line for every document, in order, or remove the sidecar."
        )


def _slice_column(column: Column, rows: slice) -> Column:
    if isinstance(column, Categories):
        return Categories(column.values, column.code[rows])
    return column[rows]


class MegatronReader:
    """`TokenReader` that returns views of the mapped ids."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._documents = _TokenDocuments(path)
        self._token_starts = self._documents.token_starts

    def tokens(self, block: BlockRef, rows: NDArray[np.int64]) -> list[NDArray[Any]]:
        """Return the ids of the named documents; see `TokenReader`."""
        # Documents are found by number: their place shows whether they are still the indexed ones.
        last = block.first_row + block.rows
        if last > self._documents.count or self._documents.starts[block.first_row] != block.offset:
            raise shard_changed_error(self._path, block, "its documents lie elsewhere")
        numbers = block.first_row + rows
        starts = self._token_starts[numbers].tolist()
        stops = self._token_starts[numbers + 1].tolist()
        return [self._documents.ids[start:stop] for start, stop in zip(starts, stops, strict=True)]

    def documents(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[str]:
        """Refuse the call: the shard has no texts."""
        raise DataError(f"{self._path} holds token ids instead of texts.")

    def payloads(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return `{"tokens": ids}` for every named document, with ids outside of the file; see `ShardReader`."""
        documents = self.tokens(block, rows)
        if [ids.nbytes for ids in documents] != lengths[rows].tolist():
            raise shard_changed_error(self._path, block, "its documents have other lengths")
        return [{"tokens": np.array(ids)} for ids in documents]

    def close(self) -> None:
        """Do nothing: mapped memory is released together with the last view of it."""
