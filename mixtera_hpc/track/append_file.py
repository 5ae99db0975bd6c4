"""Files that are only ever appended to: records are on disk whole, or not at all.

A write to a full disk may store a part of a record. That part is removed again, so that the next record does not follow
it on the same line, and the error is raised.
"""

import contextlib
import os
from pathlib import Path

from mixtera_hpc.errors import DataError

__all__ = ["AppendFile"]


class AppendFile:
    """An open file whose records are appended without buffering. One process writes to it."""

    def __init__(self, path: Path) -> None:
        """Open the file at `path`; it and its folder are created.

        Raises:
            DataError: the file cannot be created or opened.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab+", buffering=0)
        except OSError as error:
            raise _not_written(path, error) from error

    def truncate_incomplete_line(self) -> None:
        """Remove what a killed writer left after the last newline."""
        # Search backwards for the last newline, in blocks of 64 KiB.
        end = self._file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(end - 65536, 0)
            self._file.seek(start)
            newline = self._file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        self._file.truncate(end)

    def truncate(self, size: int) -> None:
        """Shorten the file to `size` bytes."""
        self._file.truncate(size)

    def append(self, record: bytes) -> None:
        """Append all bytes of a record.

        Raises:
            DataError: the record cannot be written, for example because the disk is full; the file is as before.
        """
        remaining = memoryview(record)
        try:
            while remaining:
                remaining = remaining[self._file.write(remaining) :]
        except OSError as error:
            self._remove_end(len(record) - len(remaining))
            raise _not_written(self._path, error) from error

    def sync(self) -> None:
        """Wait until all records are on disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _not_written(self._path, error) from error

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        self._file.close()

    def _remove_end(self, num_bytes: int) -> None:
        # The first error is the one to report, and readers skip an incomplete last line.
        with contextlib.suppress(OSError):
            size = os.fstat(self._file.fileno()).st_size
            self._file.truncate(size - num_bytes)


def _not_written(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path} cannot be written: {error.strerror or error}.\n"
        "  Records written before are safe. Free space or repair the folder's permissions, then continue the run with "
        "mixtera-hpc resume RUN."
    )
