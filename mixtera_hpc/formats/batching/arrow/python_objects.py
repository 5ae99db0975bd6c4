"""Python objects from Arrow columns and tables: texts and whole rows, a few at a time.

One conversion holds the interpreter's lock, so a long one would make the trainer's thread wait.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import BlockRef
from mixtera_hpc.formats.batching.arrow.value_types import holds_texts
from mixtera_hpc.formats.shard_errors import unreadable_error

__all__ = [
    "VALUE_ERRORS",
    "objects_at_once",
    "payloads_of",
    "rows_of",
    "texts_and_problems",
    "texts_of",
    "undecodable_rows",
]

ROWS_AT_ONCE = 64
TEXTS_AT_ONCE = 256
"""Most rows and texts that one call of Arrow converts to Python objects. The call holds the interpreter's lock. For a
row group of 100,000 rows, the trainer's thread would wait a tenth of a second."""
BYTES_AT_ONCE = 1 << 19
"""About the most bytes that one call converts, if it converts several values. It takes about 0.2 ms."""
VALUE_ERRORS = (pa.ArrowException, UnicodeDecodeError)
"""Errors of Arrow for values that do not match their type."""


def texts_of(text: Any, path: Path) -> list[str]:
    """Return the texts of a column; None where it is null.

    Raises:
        DataError: the column has another type, or is not valid UTF-8.
    """
    try:
        return _to_texts(text)
    except VALUE_ERRORS as error:
        raise unreadable_error(path, "the text column", error) from None


def texts_and_problems(text: Any) -> tuple[list[str], list[tuple[int, str]]]:
    """Return the texts of a column, None where it is null, and (row, problem) for those that are not valid UTF-8."""
    # One conversion for all rows; row by row only if a text in it is not valid.
    try:
        return _to_texts(text), []
    except VALUE_ERRORS:
        return _to_texts_one_by_one(text)


def _to_texts(text: Any) -> list[str]:
    """Convert a text column; null becomes None."""
    # The cast also decodes dictionaries, and verifies that binary data is UTF-8.
    return _to_objects(pc.cast(text, pa.large_string()), TEXTS_AT_ONCE)


def _to_texts_one_by_one(text: Any) -> tuple[list[str], list[tuple[int, str]]]:
    """Convert a text column row by row, and return (row, problem) for texts that are not valid UTF-8."""
    texts = []
    bad = []
    for row in range(len(text)):
        try:
            texts += _to_texts(text.slice(row, 1))
        except VALUE_ERRORS as error:
            texts.append("")
            bad.append((row, f"the text column cannot be read: {error}"))
    return texts, bad


def payloads_of(table: Any, block: BlockRef, rows: NDArray[Any], path: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the named rows of a block, which `table` holds, as dicts, in groups of up to `ROWS_AT_ONCE`.

    Raises:
        DataError: a text in one of them is not valid UTF-8.
    """
    chosen = table.take(pa.array(rows))
    try:
        yield from _objects(chosen, ROWS_AT_ONCE)
    except VALUE_ERRORS as error:
        bad = [int(row) for i, row in enumerate(rows) if undecodable_rows(chosen.slice(i, 1))]
        place = f"row {block.first_row + bad[0]}" if bad else "a row"
        raise DataError(
            f"{path}: {place} cannot be decoded as a whole: {error}. The index build looks at columns that no setting "
            "names only if it is told that whole rows will be served.\n"
            "  Build the index again with mixture.unit=samples; data.on_bad_sample=skip leaves such rows out."
        ) from None


def rows_of(table: Any, path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table as dicts.

    Raises:
        DataError: a text in them is not valid UTF-8.
    """
    try:
        rows: list[dict[str, Any]] = _to_objects(table, ROWS_AT_ONCE)
    except VALUE_ERRORS as error:
        raise unreadable_error(path, "a row", error) from None
    return rows


def _to_objects(values: Any, at_once: int) -> list[Any]:
    """Return the values of a column or the rows of a table, converting `at_once` or fewer of them in a call."""
    return list(chain.from_iterable(_objects(values, at_once)))


def _objects(values: Any, at_once: int) -> Iterator[list[Any]]:
    """Yield the values of a column or the rows of a table, up to `at_once` in a list."""
    at_once = min(at_once, objects_at_once(values))
    for first in range(0, len(values), at_once):
        yield values.slice(first, at_once).to_pylist()


def objects_at_once(values: Any) -> int:
    """Return how many values of a column, or rows of a table, have about `BYTES_AT_ONCE`; at least 1."""
    columns = values.columns if isinstance(values, pa.Table | pa.RecordBatch) else [values]
    # Rows share the values of a dictionary.
    num_bytes: int = sum(column.nbytes for column in columns if not pa.types.is_dictionary(column.type))
    return max(BYTES_AT_ONCE * len(values) // max(num_bytes, 1), 1)


def undecodable_rows(table: Any) -> list[tuple[int, str]]:
    """Return (row, problem) for rows with a text that is not valid UTF-8, in any column."""
    problems: dict[int, str] = {}
    for name in table.schema.names:
        column = table.column(name)
        if not holds_texts(column.type) or _is_valid(column):
            continue
        for row in range(len(column)):
            # Taken and not sliced: the children of a slice are validated as a whole.
            if not _is_valid(column.take(pa.array([row]))):
                problems.setdefault(row, f"column {name!r} is not valid UTF-8")
    return sorted(problems.items())


def _is_valid(column: Any) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True
