"""Columns of Arrow tables → properties and texts: what Parquet and Arrow files have in common.

Dotted paths go into struct columns; a top-level column whose name has dots in it comes first.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import ConfigError, DataError
from mixtera_hpc.formats.base import (
    MAX_BAD_ROWS,
    BlockRanges,
    Column,
    PropertyField,
    RowBatch,
    ScanSpec,
    bad_rows,
    nulls,
    unreadable,
)
from mixtera_hpc.formats.category_codes import Categories, encode_categories

__all__ = ["TableScanner", "column_at", "first_key", "rows_of", "texts_of", "type_at", "without_views"]

_WIDE = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
_UNREADABLE = (pa.ArrowException, UnicodeDecodeError)
"""What Arrow raises on values that are not what their type says."""
_TEXTS = (pa.string(), pa.binary(), *_WIDE, *_WIDE.values())


class TableScanner:
    """Turns the tables of one unit into batches, and remembers rows whose text cannot be read."""

    def __init__(self, path: Path, schema: Any, fields: ScanSpec) -> None:
        self._path, self._fields = path, fields
        self._bad: list[tuple[int, str]] = []
        if (twice := next((name for name in schema.names if schema.names.count(name) > 1), None)) is not None:
            raise DataError(f"{path} has several columns {twice!r}.\n  Rename them, or leave it out with data.exclude.")
        if fields.text is not None:
            _check_text(schema, fields.text, path)
        self.properties = {f.path for f in fields.properties if type_at(schema, f.path) is not None}
        """Paths of the properties that the file has."""

    def batch(self, rows: int, first_row: int, table: Any, blocks: BlockRanges) -> RowBatch | None:
        """The next `rows` rows, of which `table` holds the needed columns (None: none is needed); None after bad rows.

        Args:
            first_row: of the shard.
        """
        texts, bad = self._texts(table)
        if not self._fields.skip_bad:
            self._bad += [(first_row + row, problem) for row, problem in bad[: MAX_BAD_ROWS - len(self._bad)]]
            bad = []
        return None if self._bad else self._batch(rows, table, blocks, texts, bad)

    def check(self) -> None:
        """Raise for the bad rows found."""
        if self._bad:
            raise bad_rows(self._path, self._bad)

    def _texts(self, table: Any) -> tuple[list[str] | None, list[tuple[int, str]]]:
        """The texts, where they are wanted, and the rows of `table` that have none, with the problem."""
        if self._fields.documents and self._fields.text is None:
            raise ConfigError("Texts were asked for, but data.text is null. Set it, or leave dataplane.tokenizer out.")
        text = column_at(table, self._fields.text) if self._fields.text is not None else None
        if text is None:
            return None, []
        if pa.types.is_dictionary(text.type) and text.dictionary.null_count:
            text = pc.cast(text, text.type.value_type)  # Nulls among the entries do not count as nulls of the rows.
        missing = np.flatnonzero(text.is_null().to_numpy(zero_copy_only=False)) if text.null_count else ()
        bad = [(int(i), f"{self._fields.text!r} is null") for i in missing]
        if not self._fields.documents:
            return None, bad
        try:
            texts = _texts(text)
        except _UNREADABLE:
            texts, unread = _texts_one_by_one(text)
            bad = sorted([*bad, *unread])
        for row, _ in bad:
            texts[row] = ""
        return texts, bad

    def _batch(
        self, rows: int, table: Any, blocks: BlockRanges, documents: list[str] | None, bad: list[tuple[int, str]]
    ) -> RowBatch:
        columns: dict[str, Column] = {}
        for field in self._fields.properties:
            values = column_at(table, field.path)
            columns[field.name] = nulls(field.kind, rows) if values is None else _column(values, field, self._path)
        raw = rows_of(table, self._path) if self._fields.rows else None
        return RowBatch(rows=rows, blocks=blocks, columns=columns, documents=documents, raw=raw, bad=tuple(bad))


def _check_text(schema: Any, text: str, path: Path) -> None:
    """Refuse a file that has no texts where they should be."""
    found = type_at(schema, text)
    if found is None:
        columns = ", ".join(schema.names[:20])
        raise DataError(f"{path} has no column {text!r}, which data.text names.\n  It has: {columns}.")
    plain = found.value_type if pa.types.is_dictionary(found) else found
    if plain not in _TEXTS and not pa.types.is_null(plain):
        raise DataError(
            f"{path}: column {text!r}, which data.text names, has type {found}, which is no text.\n  Set data.text to another "
            "column, or leave the file out with data.exclude."
        )


def _texts(text: Any) -> list[str]:
    """The texts of a column; None where it is null."""
    found: list[str] = pc.cast(text, pa.large_string()).to_pylist()
    return found


def _texts_one_by_one(text: Any) -> tuple[list[str], list[tuple[int, str]]]:
    """The texts of a column, and the rows whose text cannot be read, with the problem."""
    texts, bad = [], []
    for row in range(len(text)):
        try:
            texts += _texts(text.slice(row, 1))
        except _UNREADABLE as error:
            texts.append("")
            bad.append((row, f"the text column cannot be read: {error}"))
    return texts, bad


def first_key(names: list[str], path: str) -> str:
    """The top-level column that `path` begins with."""
    return path if path in names else path.partition(".")[0]


def type_at(schema: Any, path: str) -> Any:
    """The Arrow type at a path, None when the file has nothing there."""
    if path in schema.names:
        return schema.field(path).type
    first, *rest = path.split(".")
    found: Any = schema.field(first).type if first in schema.names else None
    for key in rest:
        if not pa.types.is_struct(found) or found.get_field_index(key) < 0:
            return None
        found = found.field(key).type
    return found


def column_at(table: Any, path: str) -> Any:
    """The column at a path, null where a parent is; None when the table has nothing there."""
    if table is None or type_at(table.schema, path) is None:
        return None
    if path in table.schema.names:
        return table.column(path)
    first, *rest = path.split(".")
    return pc.struct_field(table.column(first), rest)


def texts_of(text: Any, path: Path) -> list[str]:
    """The texts of a column; None where it is null.

    Raises:
        DataError: it is of another type, or not UTF-8.
    """
    try:
        return _texts(text)
    except _UNREADABLE as error:
        raise unreadable(path, "the text column", error) from None


def rows_of(table: Any, path: Path) -> list[dict[str, Any]]:
    """The rows of a table as dicts.

    Raises:
        DataError: a text in them is not UTF-8.
    """
    try:
        found: list[dict[str, Any]] = table.to_pylist()
    except _UNREADABLE as error:
        raise unreadable(path, "a row", error) from None
    return found


def without_views(table: Any) -> Any:
    """The same with texts stored as they used to be: Arrow has views (Polars writes them), but cannot take rows out of them yet."""
    fields = [field.with_type(_without_views(field.type)) for field in table.schema]
    return table if all(map(pa.Field.equals, fields, table.schema)) else table.cast(pa.schema(fields))


def _without_views(found: Any) -> Any:
    if pa.types.is_struct(found):
        return pa.struct([field.with_type(_without_views(field.type)) for field in found])
    if pa.types.is_list(found) or pa.types.is_large_list(found):
        wide = pa.large_list if pa.types.is_large_list(found) else pa.list_
        return wide(found.value_field.with_type(_without_views(found.value_type)))
    return _WIDE.get(found, found)


def _column(values: Any, field: PropertyField, path: Path) -> Column:
    kind, found = field.kind, values.type
    is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
    if pa.types.is_null(found):
        return nulls(field.kind, len(values))
    if kind is Kind.NUMBER and (
        pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_decimal(found)
    ):
        numbers: NDArray[np.float64] = pc.cast(values, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        return numbers
    is_flat = not pa.types.is_nested(found.value_type if is_list and kind is Kind.CATEGORIES else found)
    if kind is Kind.NUMBER or not is_flat:
        hint = "Give it kind: categories" if is_list and kind is Kind.CATEGORY else "Give it another path or kind"
        raise DataError(
            f"{path}: column {field.path!r} has type {found}, which cannot be read as the {kind} of "
            f"data.properties.{field.name}.\n  {hint}, or leave the file out with data.exclude."
        )
    try:
        if is_list:
            return encode_categories([None if v is None else tuple(v) for v in values.to_pylist()])
        if pa.types.is_boolean(found) or pa.types.is_integer(found) or pa.types.is_floating(found):
            return encode_categories(values.to_pylist())
        return _encode_text(values)
    except _UNREADABLE as error:
        raise unreadable(path, f"column {field.path!r}", error) from None


def _encode_text(values: Any) -> Categories:
    """Arrow's own dictionary; null is its last entry, where there is one."""
    if pa.types.is_dictionary(values.type):
        values = pc.cast(values, values.type.value_type)
    values = pc.cast(values, pa.large_string())
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    values = values.dictionary_encode()
    texts: list[tuple[str, ...]] = [(text,) for text in values.dictionary.to_pylist()]
    code = pc.fill_null(values.indices.cast(pa.int32()), len(texts)).to_numpy(zero_copy_only=False)
    return Categories([*texts, ()] if values.null_count else texts, code)
