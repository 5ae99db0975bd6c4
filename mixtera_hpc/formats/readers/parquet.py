"""Parquet: a row group is a block, and only the needed columns are read.

Rows have no byte range: reading one decodes the text column of its row group, which stays in the cache. Pyarrow's
objects have the type Any here, because it ships no type information.
"""

import mmap
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
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
    split_evenly,
)
from mixtera_hpc.formats.batching.arrow.column_paths import column_at, type_at
from mixtera_hpc.formats.batching.arrow.python_objects import payloads_of, texts_of
from mixtera_hpc.formats.batching.arrow.table_batcher import TableBatcher
from mixtera_hpc.formats.batching.arrow.value_types import without_views
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.limits.parquet_limit import check_row_group, row_group_error
from mixtera_hpc.formats.codecs.shared_blocks import Buffer
from mixtera_hpc.formats.shard_errors import shard_changed_error, unreadable_error

__all__ = ["ParquetFormat"]

UNIT_BYTES = 256 << 20
BATCH_ROWS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetFormat:
    """`Format` of `.parquet` files."""

    name: str = "parquet"
    holds_tokens: bool = False
    may_be_empty: bool = False
    maps_files: bool = False
    unit_bytes: int = UNIT_BYTES

    def units(self, path: Path, size_bytes: int) -> list[ScanUnit]:
        """Split the shard into byte ranges of equal size; a row group belongs to the unit of its first page."""
        return split_evenly(size_bytes, self.unit_bytes)

    def scan(self, path: Path, unit: ScanUnit, spec: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
        """Read the row groups that begin in the unit."""
        with _open_file(path) as file:
            group_scan = _RowGroupScan(file, path, spec)
            last_byte = path.stat().st_size - 1
            for group in range(file.metadata.num_row_groups):
                # A position outside the file belongs to a unit as well, which reports it.
                first_byte = min(max(_first_byte(file.metadata.row_group(group)), 0), last_byte)
                if unit.start <= first_byte < unit.stop:
                    yield from group_scan.batches(group)
            group_scan.check()

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        """Open a shard for random access by row group."""
        return ParquetReader(path, text, cache)


def _open_file(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
        _ = file.schema_arrow.names  # Raises if the names are not valid UTF-8.
        return file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}.\n  Exclude it with data.exclude.") from None


def _first_byte(group: Any) -> int:
    """Return the position of a row group's first page."""
    column = group.column(0)
    return int(column.dictionary_page_offset or column.data_page_offset)


class _RowGroupScan:
    """Reads what the spec asks for from the row groups of one unit."""

    def __init__(self, file: pq.ParquetFile, path: Path, spec: ScanSpec) -> None:
        self._file = file
        self._path = path
        self._spec = spec
        self._batcher = TableBatcher(path, file.schema_arrow, spec)
        self._file_bytes = path.stat().st_size
        metadata = file.metadata
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._first_rows = list(accumulate(rows, initial=0))
        """First row of each row group, and the number of all rows."""
        if self._first_rows[-1] != metadata.num_rows:
            raise self._damaged_footer(f"its row groups have {self._first_rows[-1]} rows, not {metadata.num_rows}")

    def batches(self, group: int) -> Iterator[RowBatch]:
        """Yield the batches of one row group.

        Raises:
            DataError: the row group is damaged or too large.
        """
        metadata = self._file.metadata.row_group(group)
        self._check_size(group, metadata.total_byte_size)
        # The footer has all sizes and numbers of rows; no page is read for them.
        size = self._compressed_bytes(group, metadata)
        first_row = self._first_rows[group]
        rows_before = 0
        for rows, table in self._tables(group, metadata):
            is_last = rows_before + rows == metadata.num_rows
            ranges = [(group, size, metadata.num_rows)] if is_last else []
            batch = self._batcher.batch(rows, first_row + rows_before, table, BlockRanges.of(ranges))
            if batch:
                yield batch
            rows_before += rows
        if rows_before != metadata.num_rows:
            raise self._damaged_footer(f"row group {group} has {rows_before} rows, not {metadata.num_rows}")

    def _compressed_bytes(self, group: int, metadata: Any) -> int:
        """Return the bytes of all columns of a row group.

        Raises:
            DataError: the footer has a negative size, or one larger than the file.
        """
        sizes = [metadata.column(i).total_compressed_size for i in range(metadata.num_columns)]
        for i, size in enumerate(sizes):
            if not 0 <= size <= self._file_bytes:
                raise self._damaged_footer(f"column {i} of row group {group} has {size} bytes")
        return sum(sizes)

    def _damaged_footer(self, problem: str) -> DataError:
        return unreadable_error(self._path, "the footer", ValueError(problem))

    def check(self) -> None:
        """Raise the error for rows without a readable text, if there are any."""
        self._batcher.check()

    def _check_size(self, group: int, size_bytes: int) -> None:
        if size_bytes > self._spec.max_block_bytes:
            raise row_group_error(self._path, group, size_bytes, self._spec.max_block_bytes)

    def _tables(self, group: int, metadata: Any) -> Iterator[tuple[int, Any]]:
        """Yield (number of rows, needed columns) of one row group; None instead of columns if none is needed."""
        columns = self._needed_columns(metadata)
        if columns == []:
            for start in range(0, metadata.num_rows, BATCH_ROWS):
                yield min(BATCH_ROWS, metadata.num_rows - start), None
            return

        check_row_group(self._path, self._file, group, columns, self._spec.max_block_bytes)
        decoded_bytes = 0
        try:
            for batch in self._file.iter_batches(BATCH_ROWS, [group], columns, use_threads=False):
                decoded_bytes += batch.nbytes
                self._check_size(group, decoded_bytes)
                yield batch.num_rows, batch
        except (pa.ArrowException, OSError) as error:
            raise unreadable_error(self._path, f"row group {group}", error) from None

    def _needed_columns(self, metadata: Any) -> list[str] | None:
        """Return the names of the columns to read; None for all."""
        if self._spec.whole_rows:
            return None
        # The text column is large: read it for the texts, or to find nulls if the statistics do not rule them out.
        paths = set(self._batcher.properties)
        text = self._spec.text
        if text is not None and (self._spec.documents or not _is_never_null(metadata, text)):
            paths.add(text)
        if self._spec.check_rows:
            leaves = map(self._file.schema.column, range(metadata.num_columns))
            paths.update(leaf.path for leaf in leaves if leaf.logical_type.type == "STRING")
        return sorted(paths)


def _is_never_null(metadata: Any, path: str) -> bool:
    """Return True if the statistics of a row group promise a value in every row: the column need not be read."""
    for i in range(metadata.num_columns):
        column = metadata.column(i)
        if column.path_in_schema == path:
            statistics = column.statistics
            return statistics is not None and statistics.has_null_count and statistics.null_count == 0
    return False


def _table_in(memory: mmap.mmap, first: int, stop: int) -> Any:
    """Return the table that a process has written to shared memory."""
    return pa.ipc.open_stream(pa.py_buffer(memory[first:stop])).read_all()


class ParquetReader:
    """Decodes the text column, or all columns, of a row group into the cache and takes rows out of it."""

    def __init__(self, path: Path, text: str | None, cache: BlockCache) -> None:
        self._path = path
        self._text = text
        self._cache = cache
        self._max_block_bytes = cache.max_block_bytes
        self._file = _open_file(path)
        self._lock = threading.Lock()

    def documents(self, block: BlockRef, lengths: NDArray[Any], rows: NDArray[Any]) -> list[str]:
        """Return the texts of the named rows; see `ShardReader`."""
        text = self._text or ""
        column = column_at(self._table(block, text), text)
        return texts_of(column.take(pa.array(rows)), self._path)

    def payloads(self, block: BlockRef, lengths: NDArray[Any], rows: NDArray[Any]) -> list[dict[str, Any]]:
        """Return the named rows as dicts; see `ShardReader`."""
        return list(chain.from_iterable(self.payload_groups(block, rows)))

    def payload_groups(self, block: BlockRef, rows: NDArray[Any]) -> Iterator[list[dict[str, Any]]]:
        """Yield the named rows as dicts; see `GroupReader`."""
        return payloads_of(self._table(block, None), block, rows, self._path)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()

    def _table(self, block: BlockRef, column: str | None) -> Any:
        """Return one column of a row group, or all columns, which another process may have decoded."""
        shared = self._cache.shared
        if shared is None:
            return self._cached_table(block, column)

        def decode() -> tuple[list[Buffer], Any]:
            table = self._cached_table(block, column)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            return [memoryview(sink.getvalue())], table

        name = f"{self._path}:{'' if column is None else column}"
        # The memory is given to other blocks later, and parts of an Arrow table may refer to it, so all is copied.
        return shared.read(name, block.offset, _table_in, decode)

    def _cached_table(self, block: BlockRef, column: str | None) -> Any:
        """Return one column of a row group, or all columns."""
        return self._cache.get((str(self._path), block.offset, column), lambda: self._load(block, column))

    def _load(self, block: BlockRef, column: str | None) -> tuple[Any, int]:
        try:
            # A ParquetFile is not safe for use from several threads.
            with self._lock:
                columns = None if column is None else [column]
                check_row_group(self._path, self._file, block.offset, columns, self._max_block_bytes)
                table = self._file.read_row_group(block.offset, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError, IndexError) as error:
            raise shard_changed_error(self._path, block, f"{error}") from None
        # Rows are found by their position, so a block with other rows would return wrong ones.
        if table.num_rows != block.rows or (column is not None and type_at(table.schema, column) is None):
            raise shard_changed_error(self._path, block, f"row group {block.offset} has other rows or columns")
        return without_views(table.combine_chunks()), table.nbytes
