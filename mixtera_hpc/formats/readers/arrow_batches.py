"""Open Arrow IPC files and read their record batches, memory mapped.

Both layouts are read: the file format, whose footer says where every batch lies, and the stream format (what Hugging
Face `datasets` writes), whose batches are walked once per open at about 10 µs each without touching the data.
"""

import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.batching.arrow.column_paths import first_key
from mixtera_hpc.formats.codecs.limits.arrow_sizes import batch_sizes, text_bytes
from mixtera_hpc.formats.shard_errors import cannot_open_error, unreadable_error

__all__ = ["RecordBatches", "open_record_batches"]

# The first bytes of the layouts. A stream has no magic.
_FILE_MAGIC = b"ARROW1"
_FEATHER_1_MAGIC = b"FEA1"
# Text type → numpy type of its offsets.
_OFFSET_TYPES = {pa.string(): "<i4", pa.binary(): "<i4", pa.large_string(): "<i8", pa.large_binary(): "<i8"}


def open_record_batches(path: Path, paths: set[str] | None, max_bytes: int = sys.maxsize) -> "RecordBatches":
    """Open an Arrow file or stream.

    Args:
        path: the file.
        paths: dotted paths that the caller looks at; None for all.
        max_bytes: largest decoded size of a record batch.

    Raises:
        DataError: it cannot be opened, or is not an Arrow file.
    """
    try:
        source = pa.memory_map(str(path))
    except (pa.ArrowException, OSError) as error:
        raise cannot_open_error(path, error) from None
    try:
        return RecordBatches(path, source, paths, max_bytes)
    except DataError:
        source.close()
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        source.close()
        raise DataError(
            f"{path} is not a readable Arrow file: {error}.\n  Copy or write it again, or exclude it with data.exclude."
        ) from None


class RecordBatches:
    """The record batches of one open file. Several threads may call every method at the same time."""

    def __init__(self, path: Path, source: Any, paths: set[str] | None, max_bytes: int) -> None:
        self._path = path
        self._source = source
        self._paths = paths
        self._max_bytes = max_bytes
        # pyarrow does not promise that several threads can use one reader.
        self._lock = threading.Lock()

        self._sizes: list[int] = []
        """Decoded bytes of each batch of a compressed file; empty for others."""
        magic = source.read(len(_FILE_MAGIC))
        source.seek(0)
        if magic.startswith(_FEATHER_1_MAGIC):
            raise DataError(
                f"{path} is Feather of version 1.\n  Write it again with version 2, which is Arrow's own format."
            )
        if magic == _FILE_MAGIC:
            reader = self._open_file()
            self._get_batch = reader.get_batch
            self.count: int = reader.num_record_batches
        else:
            reader = pa.ipc.open_stream(source)
            if max_bytes < sys.maxsize:
                self._check_stream(reader.schema)
                source.seek(0)
                reader = pa.ipc.open_stream(source)
            batches = self._read_stream(reader)
            self._get_batch = batches.__getitem__
            self.count = len(batches)
        self.schema = reader.schema
        _check_names(self.schema)

    def _open_file(self) -> Any:
        """Open the file format. Of compressed files only the needed columns are decoded."""
        reader = pa.ipc.open_file(self._source)
        # An empty list would select all columns.
        columns = None if self._paths is None else self._needed_columns(reader.schema) or [0]
        dictionaries, self._sizes = batch_sizes(self._source, columns, reader.schema)
        if dictionaries > self._max_bytes:
            raise self._too_large("its dictionaries decode")
        if columns is None or not any(self._sizes):
            # Leaving columns out of an uncompressed file would copy what is mapped.
            return reader
        return pa.ipc.open_file(self._source, options=pa.ipc.IpcReadOptions(included_fields=columns))

    def _needed_columns(self, schema: Any) -> list[int]:
        needed = {first_key(schema.names, path) for path in self._paths or ()}
        return [number for number, name in enumerate(schema.names) if name in needed]

    def _check_stream(self, schema: Any) -> None:
        """Refuse a compressed stream that is too large: all of its batches are decoded when it is opened."""
        dictionaries, sizes = batch_sizes(self._source, None, schema)
        if dictionaries + sum(sizes) > self._max_bytes:
            raise self._too_large("it is a compressed stream, which decodes")

    def _read_stream(self, reader: Any) -> list[Any]:
        """Return all batches of a stream: views of the mapped file, unless it is compressed."""
        return list(reader)

    def read(self, number: int) -> Any:
        """Return the needed columns of one batch.

        Raises:
            DataError: the batch is damaged or too large.
        """
        if number < len(self._sizes) and self._sizes[number] > self._max_bytes:
            raise self._too_large(f"record batch {number} decodes")
        try:
            with self._lock:
                batch = self._get_batch(number)
            if self._paths is not None:
                needed = {first_key(batch.schema.names, path) for path in self._paths}
                batch = batch.select([name for name in batch.schema.names if name in needed])
            # Checks the lengths of buffers and children, but not their values.
            batch.validate()
            for column in batch.columns:
                _check_column(column)
            if sum(map(text_bytes, batch.columns)) > self._max_bytes:
                raise self._too_large(f"record batch {number} decodes")
        except (pa.ArrowException, OSError, IndexError, ValueError) as error:
            raise unreadable_error(self._path, f"record batch {number}", error) from None
        return batch

    def _too_large(self, what: str) -> DataError:
        return DataError(
            f"{self._path}: {what} to more than data.max_block_bytes={self._max_bytes}, and it can only be read as a "
            "whole.\n  Write it again as an Arrow file of shorter record batches, or raise data.max_block_bytes."
        )

    def num_rows(self, number: int) -> int:
        """Return the number of rows of one batch without reading its data; 0 if it is damaged.

        The read of a damaged batch reports it. Until then, the numbers of the rows after it are too low.
        """
        try:
            with self._lock:
                return int(self._get_batch(number).num_rows)
        except (pa.ArrowException, OSError, ValueError):
            return 0

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._source.close()

    def __enter__(self) -> "RecordBatches":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _check_names(fields: Iterable[Any]) -> None:
    """Read the names of columns, and of the fields inside them.

    Raises:
        UnicodeDecodeError: a name is not valid UTF-8.
    """
    for field in fields:
        _ = field.name
        _check_names(field.type.field(i) for i in range(field.type.num_fields))


def _check_column(column: Any) -> None:
    """Refuse a damaged column. Arrow trusts what it maps: wrong offsets would make it read outside the file.

    Of texts only the offsets are checked, because their bytes are checked when they are decoded; of other types all.
    """
    offset_type = _OFFSET_TYPES.get(column.type)
    if offset_type is None:
        column.validate(full=True)
        return
    if not len(column):
        return

    # Row i of a text column is data[offsets[i] : offsets[i + 1]].
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, offset_type)[column.offset : column.offset + len(column) + 1]
    data_bytes = data.size if data else 0
    if bounds[0] < 0 or bounds[-1] > data_bytes or (np.diff(bounds) < 0).any():
        raise ValueError("offsets of texts are out of order")
