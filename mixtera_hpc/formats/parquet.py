"""Parquet: a row group is a block, and only the columns that are needed are read.

Dotted paths go into struct columns; a top-level column whose name has dots in it comes first. Rows have no byte range:
reading one decodes the text column of its row group, and the cache keeps that.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.cache import BlockCache
from mixtera_hpc.formats.columns import Categories, encode
from mixtera_hpc.formats.format import (
    MAX_BAD_ROWS,
    Batch,
    BlockRef,
    Column,
    Field,
    Fields,
    Ranges,
    ShardReader,
    Unit,
    bad_rows,
    cut,
    shard_changed,
)

__all__ = ["Parquet"]

UNIT_BYTES = 256 << 20
BATCH_ROWS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Parquet:
    """`Format` of `.parquet` files."""

    name: str = "parquet"
    unit_bytes: int = UNIT_BYTES

    def units(self, path: Path, size_bytes: int) -> list[Unit]:
        return cut(size_bytes, self.unit_bytes)

    def scan(self, path: Path, unit: Unit, fields: Fields, block_rows: int) -> Iterator[Batch]:
        with _open(path) as file:
            columns = _Columns(file, path, fields)
            for group in range(file.metadata.num_row_groups):
                if unit.start <= _first_byte(file.metadata.row_group(group)) < unit.stop:
                    yield from columns.scan(group)
            columns.check()

    def open(self, path: Path, text: str, cache: BlockCache) -> ShardReader:
        return _Reader(path, text, cache)


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}.\n  Leave it out with data.exclude.") from None


def _first_byte(group: Any) -> int:
    column = group.column(0)
    return int(column.dictionary_page_offset or column.data_page_offset)


class _Columns:
    """Reads what `fields` names out of the row groups of one unit, and remembers rows without text."""

    def __init__(self, file: pq.ParquetFile, path: Path, fields: Fields) -> None:
        self._file, self._path, self._fields = file, path, fields
        self._schema = file.schema_arrow
        self._bad: list[tuple[int, str]] = []
        if _type_at(self._schema, fields.text) is None:
            columns = ", ".join(self._schema.names[:20])
            raise DataError(f"{path} has no column {fields.text!r}, which data.text names.\n  It has: {columns}.")

    def scan(self, group: int) -> Iterator[Batch]:
        metadata = self._file.metadata.row_group(group)
        size = sum(metadata.column(i).total_compressed_size for i in range(metadata.num_columns))
        seen = 0
        for rows, table in self._tables(group, metadata):
            seen += rows
            ends = [(group, size, metadata.num_rows)] if seen == metadata.num_rows else []
            without_text = self._without_text(table)
            if self._fields.skip_bad:
                yield self._batch(rows, table, Ranges.of(ends), without_text)
                continue
            first_row, more = self._first_row(group) + seen - rows, MAX_BAD_ROWS - len(self._bad)
            self._bad += [(first_row + row, problem) for row, problem in without_text[:more]]
            if not self._bad:
                yield self._batch(rows, table, Ranges.of(ends), [])

    def check(self) -> None:
        """Raise for rows without text."""
        if self._bad:
            raise bad_rows(self._path, self._bad)

    def _tables(self, group: int, metadata: Any) -> Iterator[tuple[int, Any]]:
        """The needed columns, some rows at a time; None where none is needed."""
        paths = {f.path for f in self._fields.properties if _type_at(self._schema, f.path) is not None}
        if self._fields.documents or not _is_never_null(metadata, self._fields.text):
            paths.add(self._fields.text)
        if not paths:
            for start in range(0, metadata.num_rows, BATCH_ROWS):
                yield min(BATCH_ROWS, metadata.num_rows - start), None
            return
        try:
            for batch in self._file.iter_batches(BATCH_ROWS, [group], sorted(paths), use_threads=False):
                yield batch.num_rows, batch
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self._path}: row group {group} cannot be read: {error}") from None

    def _first_row(self, group: int) -> int:
        return sum(self._file.metadata.row_group(i).num_rows for i in range(group))

    def _without_text(self, table: Any) -> list[tuple[int, str]]:
        """Rows of `table` whose text is null, and the problem."""
        text = _at(table, self._fields.text)
        if text is None or not text.null_count:
            return []
        missing = np.flatnonzero(text.is_null().to_numpy(zero_copy_only=False))
        return [(int(i), f"{self._fields.text!r} is null") for i in missing]

    def _batch(self, rows: int, table: Any, blocks: Ranges, bad: list[tuple[int, str]]) -> Batch:
        columns: dict[str, Column] = {}
        for field in self._fields.properties:
            values = _at(table, field.path)
            columns[field.name] = _nulls(field, rows) if values is None else _column(values, field, self._path)
        documents = _texts(_at(table, self._fields.text), self._path) if self._fields.documents else None
        if documents is not None:
            for row, _ in bad:
                documents[row] = ""
        return Batch(rows=rows, blocks=blocks, columns=columns, documents=documents, bad=tuple(bad))


def _type_at(schema: Any, path: str) -> Any:
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


def _at(table: Any, path: str) -> Any:
    """The column at a path, null where a parent is; None when the table has nothing there."""
    if table is None or _type_at(table.schema, path) is None:
        return None
    if path in table.schema.names:
        return table.column(path)
    first, *rest = path.split(".")
    return pc.struct_field(table.column(first), rest)


def _is_never_null(metadata: Any, path: str) -> bool:
    """Whether the statistics of a row group promise a value in every row."""
    for i in range(metadata.num_columns):
        column = metadata.column(i)
        if column.path_in_schema == path:
            found = column.statistics
            return found is not None and found.has_null_count and found.null_count == 0
    return False


def _nulls(field: Field, rows: int) -> Column:
    return np.full(rows, np.nan) if field.kind is Kind.NUMBER else Categories([()], np.zeros(rows, np.int32))


def _column(values: Any, field: Field, path: Path) -> Column:
    kind, found = field.kind, values.type
    is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
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
    if is_list:
        return encode([None if v is None else tuple(v) for v in values.to_pylist()])
    if pa.types.is_boolean(found) or pa.types.is_integer(found) or pa.types.is_floating(found):
        return encode(values.to_pylist())
    return _encode_text(values)


def _encode_text(values: Any) -> Categories:
    """Arrow's own dictionary; null is its last entry, where there is one."""
    if pa.types.is_dictionary(values.type):
        values = pc.cast(values, values.type.value_type)
    values = pc.cast(values, pa.large_string()).dictionary_encode()
    texts: list[tuple[str, ...]] = [(text,) for text in values.dictionary.to_pylist()]
    code = pc.fill_null(values.indices.cast(pa.int32()), len(texts)).to_numpy(zero_copy_only=False)
    return Categories([*texts, ()] if values.null_count else texts, code)


def _texts(text: Any, path: Path) -> list[str]:
    try:
        found: list[str] = pc.cast(text, pa.large_string()).to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"{path}: the text column cannot be read as text: {error}") from None
    return found


class _Reader:
    """Decodes the text column (or all columns) of a row group into the cache and takes rows out of it."""

    def __init__(self, path: Path, text: str, cache: BlockCache) -> None:
        self._path, self._text, self._cache = path, text, cache
        self._file = _open(path)
        self._lock = threading.Lock()

    def documents(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[str]:
        table = self._table(block, self._text)
        return _texts(_at(table, self._text).take(pa.array(rows)), self._path)

    def payloads(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._table(block, None).take(pa.array(rows)).to_pylist()
        return found

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def _table(self, block: BlockRef, column: str | None) -> Any:
        return self._cache.get((str(self._path), block.offset, column), lambda: self._load(block, column))

    def _load(self, block: BlockRef, column: str | None) -> tuple[Any, int]:
        try:
            with self._lock:
                columns = None if column is None else [column]
                table = self._file.read_row_group(block.offset, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError, IndexError) as error:
            raise shard_changed(self._path, block, f"{error}") from None
        if table.num_rows != block.rows or (column is not None and _type_at(table.schema, column) is None):
            raise shard_changed(self._path, block, f"row group {block.offset} has other rows or columns")
        return table.combine_chunks(), table.nbytes
