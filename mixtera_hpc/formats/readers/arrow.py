"""Arrow IPC (`.arrow`, `.feather`): a record batch is a block, memory mapped, and only needed columns are looked at."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

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
from mixtera_hpc.formats.readers.arrow_batches import RecordBatches, open_record_batches
from mixtera_hpc.formats.shard_errors import shard_changed_error

__all__ = ["ArrowFormat"]

UNIT_BYTES = 256 << 20
BATCH_ROWS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrowFormat:
    """`Format` of Arrow IPC files and streams."""

    name: str = "arrow"
    holds_tokens: bool = False
    may_be_empty: bool = False
    maps_files: bool = True
    unit_bytes: int = UNIT_BYTES

    def units(self, path: Path, size_bytes: int) -> list[ScanUnit]:
        """Split the shard into byte ranges of equal size, among which the record batches are divided."""
        return split_evenly(size_bytes, self.unit_bytes)

    def scan(self, path: Path, unit: ScanUnit, spec: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
        """Read the record batches of the unit."""
        with open_record_batches(path, _needed_paths(spec), spec.max_block_bytes) as batches:
            size = path.stat().st_size
            batcher = TableBatcher(path, batches.schema, spec)
            first_row = 0
            for number in range(batches.count):
                # Streams do not say where a batch lies, so batches count as equally long.
                start = number * size // batches.count
                stop = (number + 1) * size // batches.count
                if start >= unit.stop:
                    break
                # Batches of earlier units are counted, not read: only their number of rows is needed.
                if start >= unit.start:
                    table = batches.read(number)
                    block = (number, max(stop - start, 1), table.num_rows)
                    yield from _split_table(batcher, table, first_row, block)
                first_row += batches.num_rows(number)
            batcher.check()

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        """Open a shard for random access by record batch."""
        return ArrowReader(path, text, cache)


def _split_table(batcher: TableBatcher, table: Any, first_row: int, block: tuple[int, int, int]) -> Iterator[RowBatch]:
    """Yield the rows of one record batch, `BATCH_ROWS` at a time."""
    for start in range(0, table.num_rows, BATCH_ROWS):
        rows = table.slice(start, BATCH_ROWS)
        is_last = start + rows.num_rows == table.num_rows
        blocks = BlockRanges.of([block] if is_last else [])
        batch = batcher.batch(rows.num_rows, first_row + start, rows, blocks)
        if batch:
            yield batch


def _needed_paths(spec: ScanSpec) -> set[str] | None:
    """Return the dotted paths that a scan looks at; None for all."""
    # A parser may look at any column.
    if spec.whole_rows or spec.check_rows:
        return None
    paths = {field.path for field in spec.properties}
    if spec.text is not None:
        paths.add(spec.text)
    return paths


class ArrowReader:
    """Takes rows out of record batches. Decoded ones (of compressed files) stay in the cache."""

    def __init__(self, path: Path, text: str | None, cache: BlockCache) -> None:
        self._path = path
        self._text = text
        self._cache = cache
        self._lock = threading.Lock()
        self._max_bytes = cache.max_block_bytes
        self._text_batches = open_record_batches(path, {text} if text is not None else None, self._max_bytes)
        # All columns, opened by the first call of `payloads`.
        self._whole_batches: RecordBatches | None = None

    def documents(self, block: BlockRef, lengths: NDArray[Any], rows: NDArray[Any]) -> list[str]:
        """Return the texts of the named rows; see `ShardReader`."""
        text = self._text or ""
        table = self._cached_table(block, self._text_batches, text)
        if type_at(table.schema, text) is None:
            raise shard_changed_error(self._path, block, f"it has no column {text!r}")
        return texts_of(column_at(table, text).take(pa.array(rows)), self._path)

    def payloads(self, block: BlockRef, lengths: NDArray[Any], rows: NDArray[Any]) -> list[dict[str, Any]]:
        """Return the named rows as dicts; see `ShardReader`."""
        return list(chain.from_iterable(self.payload_groups(block, rows)))

    def payload_groups(self, block: BlockRef, rows: NDArray[Any]) -> Iterator[list[dict[str, Any]]]:
        """Yield the named rows as dicts; see `GroupReader`."""
        # Most runs need texts only, so the second mapping is made on demand.
        with self._lock:
            if self._whole_batches is None:
                self._whole_batches = open_record_batches(self._path, None, self._max_bytes)
            batches = self._whole_batches
        return payloads_of(self._cached_table(block, batches, None), block, rows, self._path)

    def close(self) -> None:
        """Close the file."""
        for batches in (self._text_batches, self._whole_batches):
            if batches is not None:
                batches.close()

    def _cached_table(self, block: BlockRef, batches: RecordBatches, column: str | None) -> Any:
        """Return one column of a record batch, or all columns."""
        return self._cache.get((str(self._path), block.offset, column), lambda: self._load(block, batches))

    def _load(self, block: BlockRef, batches: RecordBatches) -> tuple[Any, int]:
        if block.offset >= batches.count:
            raise shard_changed_error(self._path, block, f"it has only {batches.count} record batches")
        table = batches.read(block.offset)
        # Rows are found by their position, so a block with other rows would return wrong ones.
        if table.num_rows != block.rows:
            raise shard_changed_error(self._path, block, f"record batch {block.offset} has {table.num_rows} rows")
        table = without_views(table)
        return table, table.nbytes
