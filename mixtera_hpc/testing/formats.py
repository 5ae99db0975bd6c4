"""What every format must do. Give each check a `FormatCase`, the format and how rows are written in it, and an empty folder.

A new format passes when all of `CHECKS` do: the same rows give the same properties, blocks that hold every row once, and
the same documents back, whatever the file looks like inside.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import (
    BlockRef,
    Format,
    PropertyField,
    RangeReader,
    RowBatch,
    ScanSpec,
    ShardReader,
    TokenReader,
    Vocabulary,
)
from mixtera_hpc.formats.category_codes import Categories
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.positioned_reads import row_byte_ranges

__all__ = [
    "CHECKS",
    "FormatCase",
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
    "read_blocks",
    "sample_rows",
    "scan_whole_shard",
]

Row = dict[str, Any]
BLOCK_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatCase:
    """A format, and what rows look like when they are written in it."""

    format: Format
    write: Callable[[Path, Sequence[Row]], list[Path]]
    """Writes rows into a folder; returns the shards, one for all or one for each. A row whose text is None must be unreadable."""
    text: str | None = "text"
    """What `data.text` is for it."""
    below: str = ""
    """What comes before the paths of properties."""
    has_properties: bool = True
    """Whether rows can say something of themselves."""
    payload: Callable[[int, Row], Any] = lambda _, row: row
    """(position in the shard, row) → what a trainer gets with `mixture.unit=samples`."""
    encode: Callable[[str], Any] | None = None
    """Of formats that hold token ids: text → ids below 256."""
    texts_may_be_empty: bool = True

    @property
    def fields(self) -> ScanSpec:
        """What is asked of rows."""
        properties = (
            PropertyField(name="language", path=f"{self.below}meta.language", kind=Kind.CATEGORY),
            PropertyField(name="quality", path=f"{self.below}meta.quality", kind=Kind.NUMBER),
            PropertyField(name="tags", path=f"{self.below}tags", kind=Kind.CATEGORIES),
        )
        return ScanSpec(
            text=self.text,
            properties=properties if self.has_properties else (),
            documents=True,
            vocabulary=Vocabulary(size=256, eos_id=None),
        )

    def rows(self, num_rows: int) -> list[Row]:
        """`sample_rows`, within what the format can hold."""
        rows = sample_rows(num_rows)
        return rows if self.texts_may_be_empty else [r | {"text": r["text"] or "-"} for r in rows]

    def document(self, row: Row) -> Any:
        """What a reader returns for a row."""
        return list(self.encode(row["text"])) if self.encode else row["text"]


def sample_rows(num_rows: int, seed: int = 0) -> list[Row]:
    """Rows with nested, missing, null and multi-valued properties, and texts from empty to long, of many scripts."""
    rng = np.random.Generator(np.random.Philox(seed))
    letters = list('abc é€漢字🙂\n\t"\\ ،0')
    rows: list[Row] = []
    for i in range(num_rows):
        text = "".join(rng.choice(letters, int(rng.integers(0, 200)))) * (50 if i % 97 == 5 else 1)
        language = [None, "en", "de", "zh,tw;x"][int(rng.integers(4))]
        tags = [["a", "b", "ü"][t] for t in np.flatnonzero(rng.random(3) < 0.4)]
        quality = None if i % 11 == 3 else float(rng.random())
        rows.append({"text": text, "meta": {"language": language, "quality": quality}, "tags": tags})
    return rows


def scan_whole_shard(fmt: Format, path: Path, fields: ScanSpec) -> list[RowBatch]:
    """All batches of all units of a shard, in order."""
    units = fmt.units(path, path.stat().st_size)
    return [batch for unit in units for batch in fmt.scan(path, unit, fields, BLOCK_ROWS)]


def read_blocks(batches: Sequence[RowBatch]) -> list[tuple[BlockRef, Any]]:
    """Every block of a shard's batches, with the lengths of its rows (zeros where the format has none)."""
    per_batch = [np.zeros(b.rows, np.int64) if b.lengths is None else b.lengths for b in batches]
    lengths = np.concatenate([np.zeros(0, np.int64), *per_batch])
    found, first_row = [], 0
    for batch in batches:
        for offset, length, rows in zip(batch.blocks.offset, batch.blocks.length, batch.blocks.rows, strict=True):
            block = BlockRef(offset=int(offset), length=int(length), first_row=first_row, rows=int(rows))
            found.append((block, lengths[first_row : first_row + block.rows]))
            first_row += block.rows
    return found


@dataclass(frozen=True, slots=True)
class _Stored:
    """One shard, scanned."""

    path: Path
    rows: list[Row]
    batches: list[RowBatch]


def _stored(case: FormatCase, folder: Path, rows: list[Row], fields: ScanSpec | None = None) -> list[_Stored]:
    folder.mkdir(exist_ok=True)
    paths = case.write(folder, rows)
    parts = [rows] if len(paths) == 1 else [[row] for row in rows]
    return [
        _Stored(path, part, scan_whole_shard(case.format, path, fields or case.fields))
        for path, part in zip(paths, parts, strict=True)
    ]


def _read(case: FormatCase, reader: ShardReader, block: BlockRef, lengths: Any, rows: Any) -> list[Any]:
    """Documents, whatever they are made of."""
    if case.format.holds_tokens:
        return [ids.tolist() for ids in cast(TokenReader, reader).tokens(block, rows)]
    return reader.documents(block, lengths, rows)


def check_units_partition_the_shard(case: FormatCase, folder: Path) -> None:
    """Units follow each other and cover the file."""
    for path in case.write(folder, case.rows(500)):
        size = path.stat().st_size
        bounds = [(u.start, u.stop) for u in case.format.units(path, size)]
        _same(bounds[0][0], 0, "the first unit begins at")
        _same(bounds[-1][1], size, "the last unit ends at")
        _same([a for a, _ in bounds[1:]], [b for _, b in bounds[:-1]], "units begin where the one before ends:")


def check_blocks_partition_the_rows(case: FormatCase, folder: Path) -> None:
    """Every row is in one block; lengths of rows, where there are any, add up to those of blocks."""
    for shard in _stored(case, folder, case.rows(500)):
        _same(sum(b.rows for b in shard.batches), len(shard.rows), "rows")
        blocks = read_blocks(shard.batches)
        _same(sum(block.rows for block, _ in blocks), len(shard.rows), "rows in blocks")
        if any(b.lengths is not None for b in shard.batches):
            sums = [int(lengths.sum()) for _, lengths in blocks]
            _same(sums, [block.length for block, _ in blocks], "bytes of blocks")


def check_properties_are_those_of_the_rows(case: FormatCase, folder: Path) -> None:
    """Categories, sets of categories and numbers come out as they went in, null included."""
    if not case.has_properties:
        return
    for shard in _stored(case, folder, case.rows(500)):
        _same(_categories(shard.batches, "language"), [_set(r["meta"]["language"]) for r in shard.rows], "language")
        _same(_categories(shard.batches, "tags"), [tuple(sorted(r["tags"])) for r in shard.rows], "tags")
        quality = np.concatenate([b.columns["quality"] for b in shard.batches])
        expected = np.array([r["meta"]["quality"] for r in shard.rows], np.float64)
        _same(np.array_equal(quality, expected, equal_nan=True), True, "quality as it was")


def check_documents_read_back(case: FormatCase, folder: Path) -> None:
    """Texts (or token ids) are those of the rows: while scanning, block by block, and for a few rows of a block."""
    for shard in _stored(case, folder, case.rows(500)):
        documents = [case.document(row) for row in shard.rows]
        if case.format.holds_tokens:
            counts = np.concatenate([b.tokens for b in shard.batches if b.tokens is not None])
            _same(counts.tolist(), list(map(len, documents)), "tokens counted")
        else:
            _same([d for b in shard.batches for d in b.documents or []], documents, "scanned texts")
        reader = case.format.open(shard.path, case.text, BlockCache())
        for block, lengths in read_blocks(shard.batches):
            expected = documents[block.first_row : block.first_row + block.rows]
            for step in (1, 3, block.rows):
                wanted = np.arange(0, block.rows, step)
                found = _read(case, reader, block, lengths, wanted)
                _same(found, expected[::step], f"documents of every {step}th row")
            _same(_read(case, reader, block, lengths, np.zeros(0, np.int64)), [], "documents of no rows")
        reader.close()
        reader.close()


def check_rows_have_their_bytes(case: FormatCase, folder: Path) -> None:
    """A reader that takes byte ranges finds the rows of several blocks in one call."""
    for shard in _stored(case, folder, case.rows(300)):
        reader = case.format.open(shard.path, case.text, BlockCache())
        if isinstance(reader, RangeReader):
            ranges = [row_byte_ranges(b, n, np.arange(b.rows)) for b, n in read_blocks(shard.batches)]
            starts, lengths = (np.concatenate(part)[::2] for part in zip(*ranges, strict=True))
            _same(reader.documents_at(starts, lengths), [case.document(r) for r in shard.rows[::2]], "texts by bytes")
            expected = [case.payload(i, r) for i, r in enumerate(shard.rows)][::2]
            _same(reader.payloads_at(starts, lengths), expected, "payloads by bytes")
        reader.close()


def check_payloads_read_back(case: FormatCase, folder: Path) -> None:
    """Whole rows come back."""
    for shard in _stored(case, folder, case.rows(200)):
        payloads = [case.payload(i, row) for i, row in enumerate(shard.rows)]
        reader = case.format.open(shard.path, None, BlockCache())
        for block, lengths in read_blocks(shard.batches):
            expected = payloads[block.first_row : block.first_row + block.rows][::2]
            found = reader.payloads(block, lengths, np.arange(0, block.rows, 2))
            _same(_plain(found), _plain(expected), "payloads")
        reader.close()


def check_a_parser_gets_whole_rows(case: FormatCase, folder: Path) -> None:
    """With `rows`, whole rows come with the batches."""
    fields = replace(case.fields, properties=(), rows=True)
    for shard in _stored(case, folder, case.rows(200), fields):
        raw = [row for batch in shard.batches for row in batch.raw or []]
        _same(len(raw), len(shard.rows), "rows for a parser")
        if case.has_properties:
            key = case.below.removesuffix(".")
            tags = [(row[key] if key else row)["tags"] for row in raw]
            _same(tags, [row["tags"] for row in shard.rows], "what a parser sees")


def check_missing_text_is_refused(case: FormatCase, folder: Path) -> None:
    """A row that cannot be read is named."""
    rows = case.rows(100)
    rows[42]["text"] = None
    paths = case.write(folder, rows)
    shard, row = (paths[0], 42) if len(paths) == 1 else (paths[42], 0)
    for documents in (False, True):
        try:
            scan_whole_shard(case.format, shard, replace(case.fields, documents=documents))
        except DataError as error:
            notes = " ".join(error.__notes__)
            _same(f"row={row}:" in notes and str(shard) in notes, True, f"{notes} names row {row} of {shard}:")
        else:
            raise AssertionError("a row whose text is null was accepted")


def check_bad_rows_are_listed_when_they_are_skipped(case: FormatCase, folder: Path) -> None:
    """With `skip_bad`, rows that cannot be read are listed, and all others read as if they were not there."""
    rows, bad = case.rows(500), [0, 42, 43, 499]
    for row in bad:
        rows[row]["text"] = None
    for documents in (False, True):
        fields = replace(case.fields, documents=documents, skip_bad=True)
        shards = _stored(case, folder, rows, fields)
        for shard in shards:
            starts = np.cumsum([0, *(b.rows for b in shard.batches)]).tolist()
            found = [start + row for start, b in zip(starts, shard.batches, strict=False) for row, _ in b.bad]
            _same(found, [i for i, r in enumerate(shard.rows) if r["text"] is None], "rows listed as bad")
            if case.has_properties:
                tags = [t for i, t in enumerate(_categories(shard.batches, "tags")) if i not in found]
                _same(tags, [tuple(sorted(r["tags"])) for r in shard.rows if r["text"] is not None], "tags")
    for shard in shards:
        reader = case.format.open(shard.path, case.text, BlockCache())
        for block, lengths in read_blocks(shard.batches):
            part = shard.rows[block.first_row : block.first_row + block.rows]
            wanted = np.array([i for i, row in enumerate(part) if row["text"] is not None], np.int64)
            texts = [case.document(part[i]) for i in wanted]
            _same(_read(case, reader, block, lengths, wanted), texts, "documents of the other rows")
        reader.close()


def check_a_missing_shard_is_refused(case: FormatCase, folder: Path) -> None:
    """Opening a file that is not there is the user's affair, not a traceback."""
    try:
        case.format.open(folder / "gone.bin", case.text, BlockCache())
    except DataError as error:
        _same("gone" in str(error), True, f"{error} names the file:")
    else:
        raise AssertionError("a missing shard was opened")


def check_every_cut_is_refused_or_shorter(case: FormatCase, folder: Path) -> None:
    """Of a file that was cut off, scanning raises a DataError that names it, or finds no more than its first rows."""
    rows = case.rows(40)
    shard = case.write(folder, rows)[0]
    data, texts = shard.read_bytes(), [row["text"] for row in rows]
    for size in np.linspace(0, len(data) - 1, 60).astype(int).tolist():
        shard.write_bytes(data[:size])
        try:
            batches = scan_whole_shard(case.format, shard, case.fields)
        except DataError as error:
            _same(shard.stem in str(error), True, f"{error} names the file:")
            continue
        found = [d for b in batches for d in b.documents or []]
        whole = all(
            text == texts[i] or (i == len(found) - 1 and texts[i].startswith(text)) for i, text in enumerate(found)
        )
        _same(
            whole and sum(b.rows for b in batches) <= len(rows),
            True,
            f"rows of a file cut at byte {size} are as written:",
        )


def check_threads_share_a_reader(case: FormatCase, folder: Path) -> None:
    """Many threads read different blocks through one reader, with a cache too small for all."""
    for shard in _stored(case, folder, case.rows(400))[:3]:
        blocks = read_blocks(shard.batches)
        reader = case.format.open(shard.path, case.text, BlockCache(max_bytes=1000))
        with ThreadPoolExecutor(8) as pool:
            texts = pool.map(lambda b: _read(case, reader, b[0], b[1], np.arange(b[0].rows)), blocks * 4)  # noqa: B023
            found = [text for block in texts for text in block]
        _same(found, [case.document(r) for r in shard.rows] * 4, "documents read by threads")
        reader.close()


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


def _plain(value: Any) -> Any:
    """Arrays as lists, so that everything compares."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _set(value: str | None) -> tuple[str, ...]:
    return () if value is None else (value,)


def _categories(batches: Sequence[RowBatch], name: str) -> list[tuple[str, ...]]:
    found = []
    for batch in batches:
        column = batch.columns[name]
        if not isinstance(column, Categories):
            raise AssertionError(f"{name} came as {type(column).__name__}, expected Categories")
        found += [column.values[code] for code in column.code]
    return found


def _same(got: Any, expected: Any, what: str) -> None:
    if got != expected:
        raise AssertionError(f"{what}: got {got!r:.500}, expected {expected!r:.500}")
