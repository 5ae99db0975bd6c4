"""Parquet: a row group is a block, and only the columns that are needed are read.

Rows have no byte range: reading one decodes the text column of its row group, and the cache keeps that.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import (
    BlockRanges,
    BlockRef,
    RowBatch,
    ScanSpec,
    ScanUnit,
    ShardReader,
    cut,
    shard_changed,
    unreadable,
)
from mixtera_hpc.formats.batching.arrow_tables import TableScanner, column_at, rows_of, texts_of, type_at, without_views
from mixtera_hpc.formats.codecs.block_cache import BlockCache

__all__ = ["ParquetFormat"]

UNIT_BYTES = 256 << 20
BATCH_ROWS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetFormat:
    """`Format` of `.parquet` files."""

    name: str = "parquet"
    holds_tokens: bool = False
    unit_bytes: int = UNIT_BYTES

    def units(self, path: Path, size_bytes: int) -> list[ScanUnit]:
        return cut(size_bytes, self.unit_bytes)

    def scan(self, path: Path, unit: ScanUnit, fields: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
        with _open(path) as file:
            groups = _Groups(file, path, fields)
            for group in range(file.metadata.num_row_groups):
                if unit.start <= _first_byte(file.metadata.row_group(group)) < unit.stop:
                    yield from groups.scan(group)
            groups.check()

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        return _Reader(path, text, cache)


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
        _ = file.schema_arrow.names  # Fails where they are no UTF-8.
        return file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}.\n  Leave it out with data.exclude.") from None


def _first_byte(group: Any) -> int:
    column = group.column(0)
    return int(column.dictionary_page_offset or column.data_page_offset)


class _Groups:
    """Reads what `fields` names out of the row groups of one unit."""

    def __init__(self, file: pq.ParquetFile, path: Path, fields: ScanSpec) -> None:
        self._file, self._path, self._fields = file, path, fields
        self._scanner = TableScanner(path, file.schema_arrow, fields)

    def scan(self, group: int) -> Iterator[RowBatch]:
        metadata = self._file.metadata.row_group(group)
        self._check_size(group, metadata.total_byte_size)
        size = sum(metadata.column(i).total_compressed_size for i in range(metadata.num_columns))
        first_row = sum(self._file.metadata.row_group(i).num_rows for i in range(group))
        seen = 0
        for rows, table in self._tables(group, metadata):
            ends = [(group, size, metadata.num_rows)] if seen + rows == metadata.num_rows else []
            batch = self._scanner.batch(rows, first_row + seen, table, BlockRanges.of(ends))
            if batch:
                yield batch
            seen += rows

    def check(self) -> None:
        """Raise for rows without text."""
        self._scanner.check()

    def _check_size(self, group: int, size_bytes: int) -> None:
        if size_bytes > self._fields.max_block_bytes:
            raise DataError(
                f"{self._path}: row group {group} decodes to {size_bytes} bytes or more, beyond data.max_block_bytes="
                f"{self._fields.max_block_bytes}.\n"
                "  Write the file again with smaller row groups, or raise data.max_block_bytes."
            )

    def _tables(self, group: int, metadata: Any) -> Iterator[tuple[int, Any]]:
        """The needed columns, some rows at a time; None where none is needed."""
        columns = self._columns(metadata)
        if columns == []:
            for start in range(0, metadata.num_rows, BATCH_ROWS):
                yield min(BATCH_ROWS, metadata.num_rows - start), None
            return
        decoded = 0  # A text that many rows share is in the file once, and told of once.
        try:
            for batch in self._file.iter_batches(BATCH_ROWS, [group], columns, use_threads=False):
                self._check_size(group, decoded := decoded + batch.nbytes)
                yield batch.num_rows, batch
        except (pa.ArrowException, OSError) as error:
            raise unreadable(self._path, f"row group {group}", error) from None

    def _columns(self, metadata: Any) -> list[str] | None:
        """Names of the columns to read; None for all."""
        if self._fields.rows:
            return None
        paths, text = set(self._scanner.properties), self._fields.text
        if text is not None and (self._fields.documents or not _is_never_null(metadata, text)):
            paths.add(text)
        return sorted(paths)


def _is_never_null(metadata: Any, path: str) -> bool:
    """Whether the statistics of a row group promise a value in every row."""
    for i in range(metadata.num_columns):
        column = metadata.column(i)
        if column.path_in_schema == path:
            found = column.statistics
            return found is not None and found.has_null_count and found.null_count == 0
    return False


class _Reader:
    """Decodes the text column (or all columns) of a row group into the cache and takes rows out of it."""

    def __init__(self, path: Path, text: str | None, cache: BlockCache) -> None:
        self._path, self._text, self._cache = path, text, cache
        self._file = _open(path)
        self._lock = threading.Lock()

    def documents(self, block: BlockRef, lengths: NDArray[Any], rows: NDArray[Any]) -> list[str]:
        text = self._text or ""
        return texts_of(column_at(self._table(block, text), text).take(pa.array(rows)), self._path)

    def payloads(self, block: BlockRef, lengths: NDArray[Any], rows: NDArray[Any]) -> list[dict[str, Any]]:
        return rows_of(self._table(block, None).take(pa.array(rows)), self._path)

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
        if table.num_rows != block.rows or (column is not None and type_at(table.schema, column) is None):
            raise shard_changed(self._path, block, f"row group {block.offset} has other rows or columns")
        return without_views(table.combine_chunks()), table.nbytes
