"""Batches from Arrow tables: what Parquet and Arrow files have in common.

Dotted paths lead into struct columns; `row_paths` has their meaning. Arrow's objects have the type Any here, because
pyarrow ships no type information.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import ConfigError, DataError
from mixtera_hpc.formats.base import BlockRanges, BlockRef, Column, PropertyField, RowBatch, ScanSpec, null_column
from mixtera_hpc.formats.batching.row_paths import check_path_forms, path_forms
from mixtera_hpc.formats.category_codes import Categories, encode_categories
from mixtera_hpc.formats.shard_errors import MAX_BAD_ROWS, bad_rows_error, unreadable_error

__all__ = [
    "TableBatcher",
    "column_at",
    "first_key",
    "objects_at_once",
    "payloads_of",
    "rows_of",
    "texts_of",
    "type_at",
    "without_views",
]

ROWS_AT_ONCE = 64
TEXTS_AT_ONCE = 256
"""Most rows and texts that one call of Arrow converts to Python objects. The call holds the interpreter's lock. For a
row group of 100,000 rows, the trainer's thread would wait a tenth of a second."""
BYTES_AT_ONCE = 1 << 19
"""About the most bytes that one call converts, if it converts several values. It takes about 0.2 ms."""

# Types without views; the large ones have 64-bit offsets, so that any column can be converted.
_PLAIN_TYPES = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
_TEXT_TYPES = (pa.string(), pa.binary(), *_PLAIN_TYPES, *_PLAIN_TYPES.values())
# What Arrow raises on values that do not match their type.
_VALUE_ERRORS = (pa.ArrowException, UnicodeDecodeError)


class TableBatcher:
    """Turns the tables of one unit into batches, and collects rows whose text cannot be read.

    Raises:
        DataError: the schema has no usable text column, or has two columns of one name.
    """

    def __init__(self, path: Path, schema: Any, spec: ScanSpec) -> None:
        self._path = path
        self._spec = spec
        self._bad: list[tuple[int, str]] = []
        _check_unique_names(schema.names, path)
        if spec.text is not None:
            _check_text_column(schema, spec.text, path)
        for wanted in [*(field.path for field in spec.properties), *([spec.text] if spec.text is not None else [])]:
            found = [i for i, keys in enumerate(path_forms(wanted)) if _type_of_keys(schema, keys) is not None]
            check_path_forms(path, {wanted: found})
        self.properties = {field.path for field in spec.properties if type_at(schema, field.path) is not None}
        """Paths of the properties that the file has."""

    def batch(self, rows: int, first_row: int, table: Any, blocks: BlockRanges) -> RowBatch | None:
        """Build the batch of the next rows. Return None after a bad row, unless bad rows are skipped.

        Args:
            rows: number of rows.
            first_row: number of the first one in the shard.
            table: the needed columns of these rows; None if no column is needed.
            blocks: the blocks that end with these rows.
        """
        texts, bad = self._texts(table)
        if self._spec.check_rows and table is not None:
            known = {row for row, _ in bad}
            bad = sorted([*bad, *((row, problem) for row, problem in _undecodable_rows(table) if row not in known)])
        # Collect no more bad rows than the error will name.
        if bad and not self._spec.skip_bad:
            self._bad += [(first_row + row, problem) for row, problem in bad[: MAX_BAD_ROWS - len(self._bad)]]
        if self._bad:
            return None

        columns: dict[str, Column] = {}
        for field in self._spec.properties:
            values = column_at(table, field.path)
            columns[field.name] = (
                null_column(field.kind, rows) if values is None else _column(values, field, self._path)
            )
        raw_rows = rows_of(table, self._path) if self._spec.whole_rows else None
        return RowBatch(rows=rows, blocks=blocks, columns=columns, documents=texts, raw_rows=raw_rows, bad=tuple(bad))

    def check(self) -> None:
        """Raise the error for the bad rows of the unit, if there are any.

        Raises:
            DataError: there are bad rows.
        """
        if self._bad:
            raise bad_rows_error(self._path, self._bad)

    def _texts(self, table: Any) -> tuple[list[str] | None, list[tuple[int, str]]]:
        """Return the texts, if the spec asks for them, and (row, problem) for every row of `table` without one."""
        if self._spec.documents and self._spec.text is None:
            raise ConfigError("Texts are needed, but data.text is null. Set it, or remove dataplane.tokenizer.")
        text = column_at(table, self._spec.text) if self._spec.text is not None else None
        if text is None:
            return None, []

        # A null entry of the dictionary does not count in `null_count` of the rows: decode the dictionary first.
        if pa.types.is_dictionary(text.type) and text.dictionary.null_count:
            text = pc.cast(text, text.type.value_type)
        missing = np.flatnonzero(text.is_null().to_numpy(zero_copy_only=False)) if text.null_count else ()
        bad = [(int(row), f"{self._spec.text!r} is null") for row in missing]
        if not self._spec.documents:
            return None, bad

        # One conversion for all rows; row by row only if a text in it is not valid UTF-8.
        try:
            texts = _to_texts(text)
        except _VALUE_ERRORS:
            texts, undecodable = _to_texts_one_by_one(text)
            bad = sorted([*bad, *undecodable])
        for row, _ in bad:
            texts[row] = ""
        return texts, bad


def _check_unique_names(names: list[str], path: Path) -> None:
    """Refuse a file with two columns of one name."""
    for name in names:
        if names.count(name) > 1:
            raise DataError(
                f"{path} has several columns {name!r}.\n  Rename them, or exclude the file with data.exclude."
            )


def _check_text_column(schema: Any, text: str, path: Path) -> None:
    """Refuse a file without a text column at the path `text`."""
    text_type = type_at(schema, text)
    if text_type is None:
        columns = ", ".join(schema.names[:20])
        raise DataError(
            f"{path} has no column {text!r}, which data.text names. Its columns are: {columns}.\n"
            "  Set data.text to one of them, or exclude the file with data.exclude."
        )
    # A dictionary-encoded column counts as a column of its values. A column of nulls has bad rows only.
    value_type = text_type.value_type if pa.types.is_dictionary(text_type) else text_type
    if value_type not in _TEXT_TYPES and not pa.types.is_null(value_type):
        raise DataError(
            f"{path}: column {text!r}, which data.text names, has type {text_type}; text is required.\n"
            "  Set data.text to another column, or exclude the file with data.exclude."
        )


def _to_texts(text: Any) -> list[str]:
    """Convert a text column; null becomes None."""
    # The cast also decodes dictionaries, and verifies that binary data is UTF-8.
    return _to_objects(pc.cast(text, pa.large_string()), TEXTS_AT_ONCE)


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


def _to_texts_one_by_one(text: Any) -> tuple[list[str], list[tuple[int, str]]]:
    """Convert a text column row by row, and return (row, problem) for texts that are not valid UTF-8."""
    texts = []
    bad = []
    for row in range(len(text)):
        try:
            texts += _to_texts(text.slice(row, 1))
        except _VALUE_ERRORS as error:
            texts.append("")
            bad.append((row, f"the text column cannot be read: {error}"))
    return texts, bad


def first_key(names: list[str], path: str) -> str:
    """Return the top-level column in which a path begins."""
    return path if path in names else path.partition(".")[0]


def type_at(schema: Any, path: str) -> Any:
    """Return the Arrow type at a path; None if the schema has nothing there."""
    chains = _keys_at(schema, path)
    return _type_of_keys(schema, chains[0]) if chains else None


def _keys_at(schema: Any, path: str) -> list[tuple[str, ...]]:
    """Return the forms of a path that the schema has, the one that counts first."""
    return [keys for keys in path_forms(path) if _type_of_keys(schema, keys) is not None]


def _type_of_keys(schema: Any, keys: tuple[str, ...]) -> Any:
    """Return the type below a chain of keys; None if one of them does not exist."""
    first, *rest = keys
    if first not in schema.names:
        return None
    arrow_type: Any = schema.field(first).type
    for key in rest:
        # Nothing has a name below a scalar, a list or a map.
        if not pa.types.is_struct(arrow_type) or arrow_type.get_field_index(key) < 0:
            return None
        arrow_type = arrow_type.field(key).type
    return arrow_type


def column_at(table: Any, path: str) -> Any:
    """Return the column at a path, null where a parent is null; None if the table has nothing there."""
    chains = _keys_at(table.schema, path) if table is not None else []
    if not chains:
        return None
    first, *rest = chains[0]
    # struct_field applies the null mask of every parent.
    return pc.struct_field(table.column(first), rest) if rest else table.column(first)


def texts_of(text: Any, path: Path) -> list[str]:
    """Return the texts of a column; None where it is null.

    Raises:
        DataError: the column has another type, or is not valid UTF-8.
    """
    try:
        return _to_texts(text)
    except _VALUE_ERRORS as error:
        raise unreadable_error(path, "the text column", error) from None


def _holds_texts(arrow_type: Any) -> bool:
    """Return True for a text type, and for a type that contains one at any depth."""
    if pa.types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    if arrow_type in (pa.string(), pa.large_string(), pa.string_view()):
        return True
    return any(_holds_texts(arrow_type.field(i).type) for i in range(arrow_type.num_fields))


def _undecodable_rows(table: Any) -> list[tuple[int, str]]:
    """Return (row, problem) for rows with a text that is not valid UTF-8, in any column."""
    problems: dict[int, str] = {}
    for name in table.schema.names:
        column = table.column(name)
        if not _holds_texts(column.type) or _is_valid(column):
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


def payloads_of(table: Any, block: BlockRef, rows: NDArray[Any], path: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the named rows of a block, which `table` holds, as dicts, in groups of up to `ROWS_AT_ONCE`.

    Raises:
        DataError: a text in one of them is not valid UTF-8.
    """
    chosen = table.take(pa.array(rows))
    try:
        yield from _objects(chosen, ROWS_AT_ONCE)
    except _VALUE_ERRORS as error:
        bad = [int(row) for i, row in enumerate(rows) if _undecodable_rows(chosen.slice(i, 1))]
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
    except _VALUE_ERRORS as error:
        raise unreadable_error(path, "a row", error) from None
    return rows


def without_views(table: Any) -> Any:
    """Convert string views (Polars writes them) to plain strings: Arrow cannot take rows out of views yet."""
    fields = [field.with_type(_plain_type(field.type)) for field in table.schema]
    if all(map(pa.Field.equals, fields, table.schema)):
        return table
    return table.cast(pa.schema(fields))


def _plain_type(arrow_type: Any) -> Any:
    """Return the type with all views in it, at any depth, replaced by plain types."""
    if pa.types.is_struct(arrow_type):
        return pa.struct([field.with_type(_plain_type(field.type)) for field in arrow_type])
    if pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type):
        list_type = pa.large_list if pa.types.is_large_list(arrow_type) else pa.list_
        return list_type(arrow_type.value_field.with_type(_plain_type(arrow_type.value_type)))
    return _PLAIN_TYPES.get(arrow_type, arrow_type)


def _column(values: Any, field: PropertyField, path: Path) -> Column:
    """Convert the values of one property.

    Raises:
        DataError: the column cannot have the property's kind, or its values are damaged.
    """
    if pa.types.is_null(values.type):
        return null_column(field.kind, len(values))
    if not _can_have_kind(values.type, field.kind):
        raise _wrong_kind_error(values.type, field, path)
    # Large integers lose precision here: numbers are stored as float64.
    if field.kind is Kind.NUMBER:
        numbers: NDArray[np.float64] = pc.cast(values, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        return numbers
    try:
        return _encode_values(values)
    except _VALUE_ERRORS as error:
        raise unreadable_error(path, f"column {field.path!r}", error) from None


def _can_have_kind(arrow_type: Any, kind: Kind) -> bool:
    """Return True if values of this type can be numbers, a category, or (also in lists) categories."""
    if kind is Kind.NUMBER:
        is_float = pa.types.is_floating(arrow_type) or pa.types.is_decimal(arrow_type)
        return bool(pa.types.is_integer(arrow_type) or is_float)
    # Categories may be scalars or lists of scalars, but not structs or lists of lists.
    if kind is Kind.CATEGORIES and _is_list(arrow_type):
        arrow_type = arrow_type.value_type
    return not bool(pa.types.is_nested(arrow_type))


def _is_list(arrow_type: Any) -> bool:
    return bool(pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type))


def _wrong_kind_error(arrow_type: Any, field: PropertyField, path: Path) -> DataError:
    is_list_of_category = _is_list(arrow_type) and field.kind is Kind.CATEGORY
    hint = "Set kind: categories" if is_list_of_category else "Set another path or kind"
    return DataError(
        f"{path}: column {field.path!r} has type {arrow_type}, which cannot be read as the {field.kind} of "
        f"data.properties.{field.name}.\n  {hint}, or exclude the file with data.exclude."
    )


def _encode_values(values: Any) -> Categories:
    """Encode a column of scalars or lists."""
    if _is_list(values.type):
        return encode_categories([None if value is None else tuple(value) for value in values.to_pylist()])
    if pa.types.is_boolean(values.type) or pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        return encode_categories(values.to_pylist())
    # Texts, and other types (dates, for example) as Arrow writes them.
    return _encode_texts(values)


def _encode_texts(values: Any) -> Categories:
    """Encode a column as text with Arrow's dictionary encoding. Null becomes the last code, if there is a null."""
    # An existing dictionary may have duplicate or unused entries: decode it, then build a new one.
    if pa.types.is_dictionary(values.type):
        values = pc.cast(values, values.type.value_type)
    values = pc.cast(values, pa.large_string())
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    values = values.dictionary_encode()
    # Code len(texts) is null, which gets a separate entry only if it occurs.
    texts: list[tuple[str, ...]] = [(text,) for text in values.dictionary.to_pylist()]
    code = pc.fill_null(values.indices.cast(pa.int32()), len(texts)).to_numpy(zero_copy_only=False)
    return Categories([*texts, ()] if values.null_count else texts, code)
