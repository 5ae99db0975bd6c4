"""Arrow IPC, as `.arrow` and `.feather` files hold it: a record batch is a block, memory mapped, only needed columns looked at.

Both layouts are read: the file format, whose footer says where every batch lies, and the stream format (what Hugging Face
`datasets` writes), whose batches are walked once per open: some 10 µs each, no data touched.
"""

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
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
from mixtera_hpc.formats.batching.arrow_tables import (
    TableScanner,
    column_at,
    first_key,
    rows_of,
    texts_of,
    type_at,
    without_views,
)
from mixtera_hpc.formats.codecs.block_cache import BlockCache

__all__ = ["ArrowFormat"]

UNIT_BYTES = 256 << 20
BATCH_ROWS = 8192
MAGIC = b"ARROW1"
_FEATHER_1 = b"FEA1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrowFormat:
    """`Format` of Arrow IPC files and streams."""

    name: str = "arrow"
    holds_tokens: bool = False
    unit_bytes: int = UNIT_BYTES

    def units(self, path: Path, size_bytes: int) -> list[ScanUnit]:
        return cut(size_bytes, self.unit_bytes)

    def scan(self, path: Path, unit: ScanUnit, fields: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
        with _open(path, _wanted(fields), fields.max_block_bytes) as batches:
            scanner = TableScanner(path, batches.schema, fields)
            first_row, size = 0, path.stat().st_size
            for number in range(batches.count):
                place = number * size // batches.count
                if place >= unit.stop:
                    break
                if place >= unit.start:
                    table = batches.read(number)
                    length = max((number + 1) * size // batches.count - place, 1)
                    yield from _scanned(scanner, table, first_row, (number, length, table.num_rows))
                first_row += batches.num_rows(number)
            scanner.check()

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        return _Reader(path, text, cache)


def _scanned(scanner: TableScanner, table: Any, first_row: int, block: tuple[int, int, int]) -> Iterator[RowBatch]:
    """One record batch, some rows at a time."""
    for start in range(0, table.num_rows, BATCH_ROWS):
        part = table.slice(start, BATCH_ROWS)
        ends = [block] if start + part.num_rows == table.num_rows else []
        batch = scanner.batch(part.num_rows, first_row + start, part, BlockRanges.of(ends))
        if batch:
            yield batch


def _wanted(fields: ScanSpec) -> set[str] | None:
    """Paths that are looked at; None for all."""
    if fields.rows:
        return None
    return {f.path for f in fields.properties} | ({fields.text} if fields.text is not None else set())


class _Batches:
    """The record batches of one open file."""

    def __init__(self, path: Path, source: Any, wanted: set[str] | None, max_bytes: int) -> None:
        self._path, self._source, self._wanted, self._max_bytes = path, source, wanted, max_bytes
        self._lock = threading.Lock()
        head = source.read(len(MAGIC))
        if head.startswith(_FEATHER_1):
            raise DataError(
                f"{path} is Feather of version 1.\n  Write it again with version 2, which is Arrow's own format."
            )
        source.seek(0)
        if head == MAGIC:
            reader = pa.ipc.open_file(source)
            if wanted is not None and _is_compressed(reader):
                reader = pa.ipc.open_file(source, options=_pruned(reader.schema, wanted))
            self._read, self.count = reader.get_batch, reader.num_record_batches
        else:
            reader, before = pa.ipc.open_stream(source), pa.total_allocated_bytes()
            found = []
            for batch in reader:
                found.append(batch)
                self._check_size(before, "it is a compressed stream, which")
            self._read, self.count = found.__getitem__, len(found)
        self.schema = reader.schema
        self.names: list[str] = reader.schema.names

    def read(self, number: int) -> Any:
        """One batch.

        Raises:
            DataError: it is damaged.
        """
        before = pa.total_allocated_bytes()
        try:
            with self._lock:
                batch = self._read(number)
            self._check_size(before, f"record batch {number}")
            if self._wanted is not None:
                names = {first_key(batch.schema.names, path) for path in self._wanted}
                batch = batch.select([name for name in batch.schema.names if name in names])
            batch.validate()
            for column in batch.columns:
                _check(column)
        except (pa.ArrowException, OSError, IndexError, ValueError) as error:
            raise unreadable(self._path, f"record batch {number}", error) from None
        return batch

    def _check_size(self, before: int, what: str) -> None:
        """Refuse what was decoded since Arrow had allocated `before` bytes, and is too long; mapped files are not allocated."""
        if pa.total_allocated_bytes() - before > self._max_bytes:
            raise DataError(
                f"{self._path}: {what} decodes to more than data.max_block_bytes={self._max_bytes}, and none of it can be read "
                "without the rest.\n  Write it again as an Arrow file of shorter record batches, or raise data.max_block_bytes."
            )

    def num_rows(self, number: int) -> int:
        """Rows of one batch; nothing of an uncompressed one is looked at."""
        try:
            with self._lock:
                return int(self._read(number).num_rows)
        except (pa.ArrowException, OSError, ValueError):
            return 0  # It is damaged, as whoever reads it will find; rows that follow are named too low.

    def close(self) -> None:
        with self._lock:
            self._source.close()

    def __enter__(self) -> "_Batches":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _check(column: Any) -> None:
    """Refuse a column that nobody may look into: Arrow trusts what it maps.

    Of texts only the offsets are looked at, whose bytes are checked when they are decoded; of all else everything.
    """
    wide = {pa.string(): "<i4", pa.binary(): "<i4", pa.large_string(): "<i8", pa.large_binary(): "<i8"}.get(column.type)
    if wide is None:
        column.validate(full=True)
    elif len(column):
        _, offsets, data = column.buffers()
        bounds = np.frombuffer(offsets, wide)[column.offset : column.offset + len(column) + 1]
        if bounds[0] < 0 or bounds[-1] > (data.size if data else 0) or (np.diff(bounds) < 0).any():
            raise ValueError("offsets of texts are out of order")


def _is_compressed(reader: Any) -> bool:
    """Whether batches are decoded instead of mapped; then columns are left out, which would copy what is mapped."""
    before = pa.total_allocated_bytes()
    try:
        batch = reader.get_batch(0) if reader.num_record_batches else None
    except (pa.ArrowException, OSError, ValueError):
        return False  # It is damaged, as whoever reads it will find.
    return batch is not None and pa.total_allocated_bytes() > before


def _pruned(schema: Any, wanted: set[str]) -> Any:
    keys = {first_key(schema.names, path) for path in wanted}
    included = [i for i, name in enumerate(schema.names) if name in keys]
    return pa.ipc.IpcReadOptions(included_fields=included or [0])


def _open(path: Path, wanted: set[str] | None, max_bytes: int = sys.maxsize) -> _Batches:
    try:
        source = pa.memory_map(str(path))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be opened: {error}.\n  Run mixtera-hpc index verify.") from None
    try:
        return _Batches(path, source, wanted, max_bytes)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        source.close()
        raise DataError(
            f"{path} is not a readable Arrow file: {error}.\n  Copy it again, or leave it out with data.exclude."
        ) from None


class _Reader:
    """Takes rows out of record batches; decoded ones (of compressed files) are kept in the cache."""

    def __init__(self, path: Path, text: str | None, cache: BlockCache) -> None:
        self._path, self._text, self._cache = path, text, cache
        self._pruned = _open(path, {text} if text is not None else None)
        self._whole: _Batches | None = None
        self._lock = threading.Lock()

    def documents(self, block: BlockRef, lengths: NDArray[Any], rows: NDArray[Any]) -> list[str]:
        text = self._text or ""
        table = self._cached(block, self._pruned, text)
        if type_at(table.schema, text) is None:
            raise shard_changed(self._path, block, f"it has no column {text!r}")
        return texts_of(column_at(table, text).take(pa.array(rows)), self._path)

    def payloads(self, block: BlockRef, lengths: NDArray[Any], rows: NDArray[Any]) -> list[dict[str, Any]]:
        with self._lock:
            self._whole = self._whole or _open(self._path, None)
        return rows_of(self._cached(block, self._whole, None).take(pa.array(rows)), self._path)

    def close(self) -> None:
        for batches in (self._pruned, self._whole):
            if batches is not None:
                batches.close()

    def _cached(self, block: BlockRef, batches: _Batches, column: str | None) -> Any:
        def load() -> tuple[Any, int]:
            if block.offset >= batches.count:
                raise shard_changed(self._path, block, f"it has {batches.count} record batches")
            table = batches.read(block.offset)
            if table.num_rows != block.rows:
                raise shard_changed(self._path, block, f"record batch {block.offset} has {table.num_rows} rows")
            table = without_views(table)
            return table, table.nbytes

        return self._cache.get((str(self._path), block.offset, column), load)
