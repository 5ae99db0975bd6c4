"""What every format must do. Give each check the format, a function that writes rows in it, and an empty folder.

A new format passes when all of `CHECKS` do: the same rows give the same properties, blocks that hold every row once, and
the same documents back, whatever the file looks like inside.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.cache import BlockCache
from mixtera_hpc.formats.columns import Categories
from mixtera_hpc.formats.format import Batch, BlockRef, Field, Fields, Format

__all__ = [
    "CHECKS",
    "Write",
    "check_a_missing_shard_is_refused",
    "check_bad_rows_are_listed_when_they_are_skipped",
    "check_blocks_partition_the_rows",
    "check_documents_read_back",
    "check_missing_text_is_refused",
    "check_payloads_read_back",
    "check_properties_are_those_of_the_rows",
    "check_threads_share_a_reader",
    "check_units_partition_the_shard",
    "read_blocks",
    "rows_of",
    "scan",
]

Write = Callable[[Path, Sequence[dict[str, Any]]], None]
Row = dict[str, Any]

FIELDS = Fields(
    text="text",
    properties=(
        Field(name="language", path="meta.language", kind=Kind.CATEGORY),
        Field(name="quality", path="meta.quality", kind=Kind.NUMBER),
        Field(name="tags", path="tags", kind=Kind.CATEGORIES),
    ),
    documents=True,
)
BLOCK_ROWS = 64


def rows_of(num_rows: int, seed: int = 0) -> list[Row]:
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


def scan(fmt: Format, path: Path, fields: Fields = FIELDS) -> list[Batch]:
    """All batches of all units, in order."""
    units = fmt.units(path, path.stat().st_size)
    return [batch for unit in units for batch in fmt.scan(path, unit, fields, BLOCK_ROWS)]


def read_blocks(batches: Sequence[Batch]) -> list[tuple[BlockRef, Any]]:
    """Every block of scanned batches, with the lengths of its rows (zeros where the format has none)."""
    per_batch = [np.zeros(b.rows, np.int64) if b.lengths is None else b.lengths for b in batches]
    lengths = np.concatenate([np.zeros(0, np.int64), *per_batch])
    found, first_row = [], 0
    for batch in batches:
        for offset, length, rows in zip(batch.blocks.offset, batch.blocks.length, batch.blocks.rows, strict=True):
            block = BlockRef(offset=int(offset), length=int(length), first_row=first_row, rows=int(rows))
            found.append((block, lengths[first_row : first_row + block.rows]))
            first_row += block.rows
    return found


def check_units_partition_the_shard(fmt: Format, write: Write, folder: Path) -> None:
    """Units follow each other and cover the file."""
    write(folder / "shard", rows_of(500))
    size = (folder / "shard").stat().st_size
    units = fmt.units(folder / "shard", size)
    bounds = [(u.start, u.stop) for u in units]
    _same(bounds[0][0], 0, "the first unit begins at")
    _same(bounds[-1][1], size, "the last unit ends at")
    _same([a for a, _ in bounds[1:]], [b for _, b in bounds[:-1]], "units begin where the one before ends:")


def check_blocks_partition_the_rows(fmt: Format, write: Write, folder: Path) -> None:
    """Every row is in one block; lengths of rows, where there are any, add up to those of blocks."""
    write(folder / "shard", rows_of(500))
    batches = scan(fmt, folder / "shard")
    _same(sum(b.rows for b in batches), 500, "rows")
    blocks = read_blocks(batches)
    _same(sum(block.rows for block, _ in blocks), 500, "rows in blocks")
    if any(b.lengths is not None for b in batches):
        _same([int(lengths.sum()) for _, lengths in blocks], [block.length for block, _ in blocks], "bytes of blocks")


def check_properties_are_those_of_the_rows(fmt: Format, write: Write, folder: Path) -> None:
    """Categories, sets of categories and numbers come out as they went in, null included."""
    rows = rows_of(500)
    write(folder / "shard", rows)
    batches = scan(fmt, folder / "shard")
    _same(_categories(batches, "language"), [_set(r["meta"]["language"]) for r in rows], "language")
    _same(_categories(batches, "tags"), [tuple(sorted(r["tags"])) for r in rows], "tags")
    quality = np.concatenate([b.columns["quality"] for b in batches])
    expected = np.array([r["meta"]["quality"] for r in rows], np.float64)
    _same(np.array_equal(quality, expected, equal_nan=True), True, "quality as it was")


def check_documents_read_back(fmt: Format, write: Write, folder: Path) -> None:
    """Texts are those of the rows: while scanning, block by block, and for a few rows of a block."""
    rows = rows_of(500)
    write(folder / "shard", rows)
    batches = scan(fmt, folder / "shard")
    _same([d for b in batches for d in b.documents or []], [r["text"] for r in rows], "scanned texts")
    reader = fmt.open(folder / "shard", "text", BlockCache())
    for block, lengths in read_blocks(batches):
        expected = [r["text"] for r in rows[block.first_row : block.first_row + block.rows]]
        for step in (1, 3, block.rows):
            wanted = np.arange(0, block.rows, step)
            _same(reader.documents(block, lengths, wanted), expected[::step], f"texts of every {step}th row")
        _same(reader.documents(block, lengths, np.zeros(0, np.int64)), [], "texts of no rows")
    reader.close()
    reader.close()


def check_payloads_read_back(fmt: Format, write: Write, folder: Path) -> None:
    """Whole rows come back."""
    rows = rows_of(200)
    write(folder / "shard", rows)
    reader = fmt.open(folder / "shard", "text", BlockCache())
    for block, lengths in read_blocks(scan(fmt, folder / "shard")):
        expected = rows[block.first_row : block.first_row + block.rows][1::2]
        _same(reader.payloads(block, lengths, np.arange(1, block.rows, 2)), expected, "payloads")
    reader.close()


def check_missing_text_is_refused(fmt: Format, write: Write, folder: Path) -> None:
    """A row without text is named."""
    rows = rows_of(100)
    rows[42]["text"] = None
    write(folder / "shard", rows)
    for documents in (False, True):
        fields = Fields(text=FIELDS.text, properties=FIELDS.properties, documents=documents)
        try:
            scan(fmt, folder / "shard", fields)
        except DataError as error:
            _same("row=42" in " ".join(error.__notes__), True, f"{error.__notes__} names row 42:")
        else:
            raise AssertionError("a row whose text is null was accepted")


def check_bad_rows_are_listed_when_they_are_skipped(fmt: Format, write: Write, folder: Path) -> None:
    """With `skip_bad`, rows without text are listed, and all others read as if they were not there."""
    rows, bad = rows_of(500), [0, 42, 43, 499]
    for row in bad:
        rows[row]["text"] = None
    write(folder / "shard", rows)
    for documents in (False, True):
        fields = Fields(text=FIELDS.text, properties=FIELDS.properties, documents=documents, skip_bad=True)
        batches = scan(fmt, folder / "shard", fields)
        starts = np.cumsum([0, *(b.rows for b in batches)]).tolist()
        found = [start + row for start, batch in zip(starts, batches, strict=False) for row, _ in batch.bad]
        _same(found, bad, "rows listed as bad")
        tags = _categories(batches, "tags")
        _same(
            [t for i, t in enumerate(tags) if i not in bad],
            [tuple(sorted(r["tags"])) for r in rows if r["text"] is not None],
            "tags",
        )
    reader = fmt.open(folder / "shard", "text", BlockCache())
    for block, lengths in read_blocks(batches):
        wanted = [i for i in range(block.rows) if block.first_row + i not in bad]
        texts = [rows[block.first_row + i]["text"] for i in wanted]
        _same(reader.documents(block, lengths, np.array(wanted, np.int64)), texts, "texts of the other rows")
    reader.close()


def check_a_missing_shard_is_refused(fmt: Format, write: Write, folder: Path) -> None:
    """Opening a file that is not there is the user's affair, not a traceback."""
    try:
        fmt.open(folder / "gone", "text", BlockCache())
    except DataError as error:
        _same("gone" in str(error), True, f"{error} names the file:")
    else:
        raise AssertionError("a missing shard was opened")


def check_threads_share_a_reader(fmt: Format, write: Write, folder: Path) -> None:
    """Many threads read different blocks through one reader, with a cache too small for all."""
    rows = rows_of(1000)
    write(folder / "shard", rows)
    blocks = read_blocks(scan(fmt, folder / "shard"))
    reader = fmt.open(folder / "shard", "text", BlockCache(max_bytes=1000))
    with ThreadPoolExecutor(8) as pool:
        texts = pool.map(lambda b: reader.documents(b[0], b[1], np.arange(b[0].rows)), blocks * 4)
        found = [text for block in texts for text in block]
    _same(found, [r["text"] for r in rows] * 4, "texts read by threads")
    reader.close()


CHECKS = (
    check_units_partition_the_shard,
    check_blocks_partition_the_rows,
    check_properties_are_those_of_the_rows,
    check_documents_read_back,
    check_payloads_read_back,
    check_missing_text_is_refused,
    check_bad_rows_are_listed_when_they_are_skipped,
    check_a_missing_shard_is_refused,
    check_threads_share_a_reader,
)


def _set(value: str | None) -> tuple[str, ...]:
    return () if value is None else (value,)


def _categories(batches: Sequence[Batch], name: str) -> list[tuple[str, ...]]:
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
