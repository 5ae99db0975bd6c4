"""The conformance suite of formats. Call each check with a `FormatCase` (a format and a writer) and an empty folder.

A new format conforms if all of `CHECKS` pass: the same rows give the same properties, every row is in exactly one
block, and the same documents are returned, regardless of the layout of the file.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import (
    BlockRef,
    GroupReader,
    RangeReader,
    RowBatch,
    ScanSpec,
    ShardReader,
    TokenReader,
)
from mixtera_hpc.formats.category_codes import Categories
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.positioned_reads import row_byte_ranges
from mixtera_hpc.testing.format_cases import FormatCase, Row, read_blocks, scan_whole_shard

__all__ = [
    "CHECKS",
    "check_a_missing_shard_is_refused",
    "check_a_parser_gets_whole_rows",
    "check_bad_rows_are_listed_when_they_are_skipped",
    "check_blocks_partition_the_rows",
    "check_documents_read_back",
    "check_every_cut_is_refused_or_shorter",
    "check_missing_text_is_refused",
    "check_payloads_read_back",
    "check_properties_are_those_of_the_rows",
    "check_rows_have_their_bytes",
    "check_threads_share_a_reader",
    "check_units_partition_the_shard",
]


@dataclass(frozen=True, slots=True)
class _ScannedShard:
    """One shard, its rows as they were written, and its batches."""

    path: Path
    rows: list[Row]
    batches: list[RowBatch]


def _write_and_scan(
    case: FormatCase, folder: Path, rows: list[Row], spec: ScanSpec | None = None
) -> list[_ScannedShard]:
    folder.mkdir(exist_ok=True)
    paths = case.write(folder, rows)
    rows_of_shard = [rows] if len(paths) == 1 else [[row] for row in rows]
    return [
        _ScannedShard(path, shard_rows, scan_whole_shard(case.format, path, spec or case.spec))
        for path, shard_rows in zip(paths, rows_of_shard, strict=True)
    ]


def _read(
    case: FormatCase, reader: ShardReader, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]
) -> list[Any]:
    """Return the documents, as texts or as lists of token ids."""
    if case.format.holds_tokens:
        return [ids.tolist() for ids in cast(TokenReader, reader).tokens(block, rows)]
    return reader.documents(block, lengths, rows)


def check_units_partition_the_shard(case: FormatCase, folder: Path) -> None:
    """Check that units follow each other and cover the file."""
    for path in case.write(folder, case.rows(500)):
        size = path.stat().st_size
        units = case.format.units(path, size)
        _same(units[0].start, 0, "start of the first unit")
        _same(units[-1].stop, size, "stop of the last unit")
        _same([unit.start for unit in units[1:]], [unit.stop for unit in units[:-1]], "starts of the other units")


def check_blocks_partition_the_rows(case: FormatCase, folder: Path) -> None:
    """Check that every row is in one block, and that lengths of rows, if there are any, add up to those of blocks."""
    for shard in _write_and_scan(case, folder, case.rows(500)):
        _same(sum(batch.rows for batch in shard.batches), len(shard.rows), "number of rows")
        blocks = read_blocks(shard.batches)
        _same(sum(block.rows for block, _ in blocks), len(shard.rows), "number of rows in blocks")
        if any(batch.lengths is not None for batch in shard.batches):
            sums = [int(lengths.sum()) for _, lengths in blocks]
            _same(sums, [block.length for block, _ in blocks], "bytes of blocks")


def check_properties_are_those_of_the_rows(case: FormatCase, folder: Path) -> None:
    """Check that categories, sets of categories and numbers are read as written, null included."""
    if not case.has_properties:
        return
    for shard in _write_and_scan(case, folder, case.rows(500)):
        languages = [_value_set(row["meta"]["language"]) for row in shard.rows]
        _same(_categories(shard.batches, "language"), languages, "language")
        _same(_categories(shard.batches, "tags"), _tags(shard.rows), "tags")
        quality = np.concatenate([batch.columns["quality"] for batch in shard.batches])
        expected = np.array([row["meta"]["quality"] for row in shard.rows], np.float64)
        _same(np.array_equal(quality, expected, equal_nan=True), True, "quality equals what was written")


def check_documents_read_back(case: FormatCase, folder: Path) -> None:
    """Check the texts (or token ids) while scanning, block by block, and for a few rows of a block."""
    for shard in _write_and_scan(case, folder, case.rows(500)):
        documents = [case.document(row) for row in shard.rows]
        _check_scanned_documents(case, shard, documents)

        reader = case.format.open(shard.path, case.text, BlockCache())
        for block, lengths in read_blocks(shard.batches):
            expected = documents[block.first_row : block.first_row + block.rows]
            for step in (1, 3, block.rows):
                got = _read(case, reader, block, lengths, np.arange(0, block.rows, step))
                _same(got, expected[::step], f"documents of rows 0, {step}, …")
            _same(_read(case, reader, block, lengths, np.zeros(0, np.int64)), [], "documents of no rows")
        # A second call of close must do nothing.
        reader.close()
        reader.close()


def _check_scanned_documents(case: FormatCase, shard: _ScannedShard, documents: list[Any]) -> None:
    if case.format.holds_tokens:
        counts = np.concatenate([batch.tokens for batch in shard.batches if batch.tokens is not None])
        _same(counts.tolist(), list(map(len, documents)), "number of tokens")
    else:
        _same(_scanned_texts(shard.batches), documents, "scanned texts")


def check_rows_have_their_bytes(case: FormatCase, folder: Path) -> None:
    """Check that a reader of byte ranges reads the rows of several blocks in one call."""
    for shard in _write_and_scan(case, folder, case.rows(300)):
        reader = case.format.open(shard.path, case.text, BlockCache())
        if isinstance(reader, RangeReader):
            ranges = [
                row_byte_ranges(block, lengths, np.arange(block.rows)) for block, lengths in read_blocks(shard.batches)
            ]
            starts = np.concatenate([block_starts for block_starts, _ in ranges])[::2]
            lengths = np.concatenate([block_lengths for _, block_lengths in ranges])[::2]
            documents = [case.document(row) for row in shard.rows[::2]]
            _same(reader.documents_at(starts, lengths), documents, "texts by byte ranges")
            payloads = [case.payload(i, row) for i, row in enumerate(shard.rows)][::2]
            _same(reader.payloads_at(starts, lengths), payloads, "payloads by byte ranges")
        reader.close()


def check_payloads_read_back(case: FormatCase, folder: Path) -> None:
    """Check that whole rows are read as written."""
    for shard in _write_and_scan(case, folder, case.rows(200)):
        payloads = [case.payload(i, row) for i, row in enumerate(shard.rows)]
        reader = case.format.open(shard.path, None, BlockCache())
        for block, lengths in read_blocks(shard.batches):
            expected = payloads[block.first_row : block.first_row + block.rows][::2]
            got = reader.payloads(block, lengths, np.arange(0, block.rows, 2))
            _same(_without_arrays(got), _without_arrays(expected), "payloads")
            if isinstance(reader, GroupReader):
                groups = reader.payload_groups(block, np.arange(0, block.rows, 2))
                _same([row for rows in groups for row in rows], got, "payloads in groups")
        reader.close()


def check_a_parser_gets_whole_rows(case: FormatCase, folder: Path) -> None:
    """Check that batches contain whole rows if the spec asks for them."""
    spec = replace(case.spec, properties=(), whole_rows=True)
    for shard in _write_and_scan(case, folder, case.rows(200), spec):
        raw_rows = [row for batch in shard.batches for row in batch.raw_rows or []]
        _same(len(raw_rows), len(shard.rows), "number of rows for a parser")
        if case.has_properties:
            key = case.below.removesuffix(".")
            tags = [(row[key] if key else row)["tags"] for row in raw_rows]
            _same(tags, [row["tags"] for row in shard.rows], "tags in the rows for a parser")


def check_missing_text_is_refused(case: FormatCase, folder: Path) -> None:
    """Check that the error for an unreadable row names it."""
    rows = case.rows(100)
    rows[42]["text"] = None
    paths = case.write(folder, rows)
    shard, row = (paths[0], 42) if len(paths) == 1 else (paths[42], 0)
    for documents in (False, True):
        try:
            scan_whole_shard(case.format, shard, replace(case.spec, documents=documents))
        except DataError as error:
            notes = " ".join(error.__notes__)
            names_row = f"row={row}:" in notes and str(shard) in notes
            _same(names_row, True, f"{notes} names row {row} of {shard}")
        else:
            raise AssertionError("a row whose text is null was accepted")


def check_bad_rows_are_listed_when_they_are_skipped(case: FormatCase, folder: Path) -> None:
    """Check that with `skip_bad` unreadable rows are listed, and that all others are read as if they were not there."""
    rows = case.rows(500)
    for row in (0, 42, 43, 499):
        rows[row]["text"] = None
    for documents in (False, True):
        spec = replace(case.spec, documents=documents, skip_bad=True)
        shards = _write_and_scan(case, folder, rows, spec)
        for shard in shards:
            _check_bad_rows(case, shard)
    for shard in shards:
        _check_readable_rows(case, shard)


def _check_bad_rows(case: FormatCase, shard: _ScannedShard) -> None:
    """Check the list of bad rows and the properties of the others."""
    bad = []
    first_row = 0
    for batch in shard.batches:
        bad += [first_row + row for row, _ in batch.bad]
        first_row += batch.rows
    _same(bad, [i for i, row in enumerate(shard.rows) if row["text"] is None], "rows listed as bad")
    if case.has_properties:
        tags = [tags for i, tags in enumerate(_categories(shard.batches, "tags")) if i not in bad]
        _same(tags, _tags([row for row in shard.rows if row["text"] is not None]), "tags of the other rows")


def _check_readable_rows(case: FormatCase, shard: _ScannedShard) -> None:
    """Check that all rows with a text are read as written."""
    reader = case.format.open(shard.path, case.text, BlockCache())
    for block, lengths in read_blocks(shard.batches):
        block_rows = shard.rows[block.first_row : block.first_row + block.rows]
        readable = np.array([i for i, row in enumerate(block_rows) if row["text"] is not None], np.int64)
        expected = [case.document(block_rows[i]) for i in readable]
        _same(_read(case, reader, block, lengths, readable), expected, "documents of the other rows")
    reader.close()


def check_a_missing_shard_is_refused(case: FormatCase, folder: Path) -> None:
    """Check that opening a missing file raises a `DataError` that names the file."""
    try:
        case.format.open(folder / "gone.bin", case.text, BlockCache())
    except DataError as error:
        _same("gone" in str(error), True, f"{error} names the file")
    else:
        raise AssertionError("a missing shard was opened")


def check_every_cut_is_refused_or_shorter(case: FormatCase, folder: Path) -> None:
    """Check that scanning a truncated file raises a `DataError` that names it, or returns the first rows only."""
    rows = case.rows(40)
    shard = case.write(folder, rows)[0]
    data = shard.read_bytes()
    texts = [row["text"] for row in rows]
    for size in np.linspace(0, len(data) - 1, 60).astype(int).tolist():
        shard.write_bytes(data[:size])
        try:
            batches = scan_whole_shard(case.format, shard, case.spec)
        except DataError as error:
            _same(shard.stem in str(error), True, f"{error} names the file")
            continue
        are_first_rows = _is_prefix(_scanned_texts(batches), texts)
        has_no_more = sum(batch.rows for batch in batches) <= len(rows)
        _same(are_first_rows and has_no_more, True, f"rows of a file cut at byte {size} are as written")


def _is_prefix(texts: list[str], expected: list[str]) -> bool:
    """Return True if `texts` are the first of `expected`; the last one may be cut off."""
    if not texts:
        return True
    if len(texts) > len(expected):
        return False
    *whole, last = texts
    return whole == expected[: len(whole)] and expected[len(whole)].startswith(last)


def check_threads_share_a_reader(case: FormatCase, folder: Path) -> None:
    """Check that many threads can read different blocks through one reader, with a cache too small for all."""
    for shard in _write_and_scan(case, folder, case.rows(400))[:3]:
        blocks = read_blocks(shard.batches) * 4
        reader = case.format.open(shard.path, case.text, BlockCache(max_bytes=1000))
        with ThreadPoolExecutor(8) as pool:
            reads = [
                pool.submit(_read, case, reader, block, lengths, np.arange(block.rows)) for block, lengths in blocks
            ]
            documents = [document for read in reads for document in read.result()]
        reader.close()
        _same(documents, [case.document(row) for row in shard.rows] * 4, "documents read by threads")


CHECKS = (
    check_units_partition_the_shard,
    check_blocks_partition_the_rows,
    check_properties_are_those_of_the_rows,
    check_documents_read_back,
    check_rows_have_their_bytes,
    check_payloads_read_back,
    check_a_parser_gets_whole_rows,
    check_missing_text_is_refused,
    check_bad_rows_are_listed_when_they_are_skipped,
    check_a_missing_shard_is_refused,
    check_every_cut_is_refused_or_shorter,
    check_threads_share_a_reader,
)


def _without_arrays(value: Any) -> Any:
    """Convert arrays at any depth to lists, so that everything can be compared."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {name: _without_arrays(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_arrays(item) for item in value]
    return value


def _scanned_texts(batches: Sequence[RowBatch]) -> list[str]:
    return [text for batch in batches for text in batch.documents or []]


def _value_set(value: str | None) -> tuple[str, ...]:
    return () if value is None else (value,)


def _tags(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    return [tuple(sorted(row["tags"])) for row in rows]


def _categories(batches: Sequence[RowBatch], name: str) -> list[tuple[str, ...]]:
    """Return the value sets of a property in all rows."""
    values = []
    for batch in batches:
        column = batch.columns[name]
        if not isinstance(column, Categories):
            raise AssertionError(f"{name} is {type(column).__name__}, expected Categories")
        values += [column.values[code] for code in column.code]
    return values


def _same(got: Any, expected: Any, what: str) -> None:
    if got != expected:
        raise AssertionError(f"{what}: got {got!r:.500}, expected {expected!r:.500}")
