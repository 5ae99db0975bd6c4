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
from mixtera_hpc.formats.columns import Categories, encode
from mixtera_hpc.formats.format import MAX_BAD_ROWS, Batch, Column, Field, Fields, Ranges, bad_rows

__all__ = ["TableScanner", "column_at", "first_key", "rows_of", "texts_of", "type_at"]


class TableScanner:
    """Turns the tables of one unit into batches, and remembers rows without text."""

    def __init__(self, path: Path, schema: Any, fields: Fields) -> None:
        self._path, self._fields = path, fields
        self._bad: list[tuple[int, str]] = []
        if fields.text is not None and type_at(schema, fields.text) is None:
            columns = ", ".join(schema.names[:20])
            raise DataError(f"{path} has no column {fields.text!r}, which data.text names.\n  It has: {columns}.")
        self.properties = {f.path for f in fields.properties if type_at(schema, f.path) is not None}
        """Paths of the properties that the file has."""

    def batch(self, rows: int, first_row: int, table: Any, blocks: Ranges) -> Batch | None:
        """The next `rows` rows, of which `table` holds the needed columns (None: none is needed); None after bad rows.

        Args:
            first_row: of the shard.
        """
        bad = self._without_text(table)
        if not self._fields.skip_bad:
            self._bad += [(first_row + row, problem) for row, problem in bad[: MAX_BAD_ROWS - len(self._bad)]]
            bad = []
        return None if self._bad else self._batch(rows, table, blocks, bad)

    def check(self) -> None:
        """Raise for rows without text."""
        if self._bad:
            raise bad_rows(self._path, self._bad)

    def _without_text(self, table: Any) -> list[tuple[int, str]]:
        """Rows of `table` whose text is null, and the problem."""
        text = column_at(table, self._fields.text) if self._fields.text is not None else None
        if text is None or not text.null_count:
            return []
        missing = np.flatnonzero(text.is_null().to_numpy(zero_copy_only=False))
        return [(int(i), f"{self._fields.text!r} is null") for i in missing]

    def _batch(self, rows: int, table: Any, blocks: Ranges, bad: list[tuple[int, str]]) -> Batch:
        columns: dict[str, Column] = {}
        for field in self._fields.properties:
            values = column_at(table, field.path)
            columns[field.name] = _nulls(field, rows) if values is None else _column(values, field, self._path)
        documents = self._documents(table) if self._fields.documents else None
        if documents is not None:
            for row, _ in bad:
                documents[row] = ""
        raw = rows_of(table, self._path) if self._fields.rows else None
        return Batch(rows=rows, blocks=blocks, columns=columns, documents=documents, raw=raw, bad=tuple(bad))

    def _documents(self, table: Any) -> list[str]:
        if self._fields.text is None:
            raise ConfigError("Texts were asked for, but data.text is null. Set it, or leave dataplane.tokenizer out.")
        return texts_of(column_at(table, self._fields.text), self._path)


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
        found: list[str] = pc.cast(text, pa.large_string()).to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the text column cannot be read as text: {error}") from None
    return found


def rows_of(table: Any, path: Path) -> list[dict[str, Any]]:
    """The rows of a table as dicts.

    Raises:
        DataError: a text in them is not UTF-8.
    """
    try:
        found: list[dict[str, Any]] = table.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: rows cannot be read: {error}") from None
    return found


def _nulls(field: Field, rows: int) -> Column:
    return np.full(rows, np.nan) if field.kind is Kind.NUMBER else Categories([()], np.zeros(rows, np.int32))


def _column(values: Any, field: Field, path: Path) -> Column:
    kind, found = field.kind, values.type
    is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
    if pa.types.is_null(found):
        return _nulls(field, len(values))
    if kind is Kind.NUMBER and (
        pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_decimal(found)
    ):
        numbers: NDArray[np.float64] = pc.cast(values, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        return numbers
    if kind is Kind.NUMBER or (pa.types.is_nested(found) and not (is_list and kind is Kind.CATEGORIES)):
        hint = " Give it kind: categories." if is_list and kind is Kind.CATEGORY else ""
        raise DataError(
            f"{path}: column {field.path!r} has type {found}, which cannot be read as the {kind} of "
            f"data.properties.{field.name}.{hint}"
        )
    try:
        if is_list:
            return encode([None if v is None else tuple(v) for v in values.to_pylist()])
        if pa.types.is_boolean(found) or pa.types.is_integer(found) or pa.types.is_floating(found):
            return encode(values.to_pylist())
        return _encode_text(values)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: column {field.path!r} cannot be read as text: {error}") from None


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
