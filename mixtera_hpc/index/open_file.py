"""Open an index file without locks; refuse one that is missing, damaged or of another version."""

import contextlib
import errno
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import h5py

from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.index.layout import FORMAT, VERSION, building_folder, failure_file, read_text

__all__ = ["DAMAGE", "damaged", "explain_locks", "open_file"]

DAMAGE = (OSError, KeyError, IndexError, ValueError, TypeError, RuntimeError, UnicodeDecodeError)
"""Errors that h5py raises for a damaged or foreign file."""
_ACCESS_ERRORS = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of the system that say nothing about the content of a file."""
MAX_FAILURE_LINES = 12
MIN_TABLE_BYTES = 256 << 20
"""Least limit of the tables: `data.max_block_bytes` may be set to a few rows."""


def open_file(path: Path, max_bytes: int | None = None) -> h5py.File:
    """Open an index for reading.

    Args:
        path: the index.
        max_bytes: limit of the decoded bytes of all tables together, and of one chunk of a sample column.

    Raises:
        PropertyIndexError: the file is missing, not complete yet, damaged, no index, of another version, or too large.
    """
    # HDF5 reports "unable to open" for missing and for damaged files, which need different fixes.
    if not path.is_file():
        raise _missing(path)
    try:
        # Lock files fail on many parallel file systems, and an index is never written in place.
        file = h5py.File(path, "r", locking=False)
        # Another program's HDF5 file has no such attribute.
        file_format = read_text(file, "format") if "format" in file.attrs else None
        version = file.attrs.get("version")
        contents = _FileContents.of(file)
    except DAMAGE as error:
        raise damaged(path, error) from None
    problem = contents.foreign_problem(path)
    if problem is None and (file_format != FORMAT or version != VERSION):
        other = "is not a property index"
        if file_format == FORMAT:
            other = f"has version {version}, but this is version {VERSION}"
        problem = f"{path} {other}.\n  Build it with mixtera-hpc index build."
    problem = problem or contents.size_problem(path, max_bytes)
    if problem is None:
        return file
    file.close()
    raise PropertyIndexError(problem)


@dataclass(kw_only=True, slots=True)
class _FileContents:
    """Facts about all objects of a file together.

    All objects are visited whenever an index is opened. The low-level interface of h5py takes a third of the time.
    """

    foreign: str = ""
    """The first object whose data lies elsewhere; empty if there is none."""
    num_bytes: int = 0
    """Decoded bytes of all datasets; of a column of samples, which is read in chunks, those of a chunk."""

    @classmethod
    def of(cls, file: h5py.File) -> Self:
        """Visit all objects of `file`."""
        contents = cls()
        contents._add_group(file.id, "")
        return contents

    def foreign_problem(self, path: Path) -> str | None:
        """Return why the file must not be read if objects refer to other files; None otherwise."""
        if not self.foreign:
            return None
        return (
            f"{path} holds {self.foreign}, so that opening it would read other files. "
            "An index keeps all data in one file.\n"
            "  Do not use this file. Build the index with mixtera-hpc index build."
        )

    def size_problem(self, path: Path, max_bytes: int | None) -> str | None:
        """Return why the tables do not fit into memory: a compressed dataset of zeros takes no room on disk."""
        if max_bytes is None or self.num_bytes <= max(max_bytes, MIN_TABLE_BYTES):
            return None
        return (
            f"{path} has tables of {self.num_bytes} bytes, more than data.max_block_bytes={max_bytes}.\n"
            "  Raise data.max_block_bytes if the index is that large; otherwise do not use this file."
        )

    def _add_group(self, group: Any, place: str) -> None:
        group_id = h5py.h5g.open(group, b"/") if isinstance(group, h5py.h5f.FileID) else group
        for name in group_id:
            below = f"{place}/{name.decode(errors='replace')}"
            if group_id.links.get_info(name).type != h5py.h5l.TYPE_HARD:
                self.foreign = self.foreign or f"a link at {below}"
                continue
            node = h5py.h5o.open(group_id, name)
            if isinstance(node, h5py.h5g.GroupID):
                self._add_group(node, below)
            elif isinstance(node, h5py.h5d.DatasetID):
                self._add_dataset(node, below)

    def _add_dataset(self, dataset: Any, place: str) -> None:
        settings = dataset.get_create_plist()
        if settings.get_layout() == h5py.h5d.VIRTUAL:
            self.foreign = self.foreign or f"a virtual dataset at {place}"
        if settings.get_external_count():
            self.foreign = self.foreign or f"external storage at {place}"
        shape = dataset.shape or ()  # None if it has no space.
        if place.startswith("/samples/"):
            shape = settings.get_chunk() if settings.get_layout() == h5py.h5d.CHUNKED else ()
        self.num_bytes += math.prod(shape) * dataset.get_type().get_size()


def damaged(path: Path, error: Exception) -> PropertyIndexError:
    """Return the error to raise for a file that h5py failed on; `error` is one of `DAMAGE`."""
    if problem := _lock_problem(path, error):
        return problem
    if isinstance(error, OSError) and error.errno in _ACCESS_ERRORS:
        return PropertyIndexError(
            f"{path} cannot be opened: {os.strerror(error.errno)}. The file may be sound.\n"
            "  Let the user of the job read it, or raise the limits that are reached (ulimit -a)."
        )
    lines = str(error).splitlines()
    reason = lines[0] if lines else type(error).__name__
    return PropertyIndexError(
        f"{path} is damaged or truncated: {reason}.\n  Copy it again, or rebuild it with mixtera-hpc index build."
    )


@contextlib.contextmanager
def explain_locks(path: Path) -> Iterator[None]:
    """Raise PropertyIndexError in place of h5py's error if the block opens a file that HDF5 cannot lock."""
    try:
        yield
    except OSError as error:
        problem = _lock_problem(path, error)
        if problem is None:
            raise
        raise problem from None


def _lock_problem(path: Path, error: Exception) -> PropertyIndexError | None:
    """Return the error to raise if HDF5 could not lock a file; None for other errors.

    All files are opened without locks, but the variable of HDF5 overrules this.
    """
    match = re.search(r"unable to lock file.*?error message = '([^']*)'", str(error), re.DOTALL)
    if match is None:
        return None
    setting = os.environ.get("HDF5_USE_FILE_LOCKING", "")
    return PropertyIndexError(
        f"HDF5 cannot lock {path}: {match[1]}. The file may be sound: an index needs no locks, but "
        f"HDF5_USE_FILE_LOCKING={setting} demands them, and this file system or another process refuses.\n"
        "  Set HDF5_USE_FILE_LOCKING=FALSE."
    )


def _missing(path: Path) -> PropertyIndexError:
    failure = failure_file(path)
    if failure.is_file():
        lines = failure.read_text().splitlines()[:MAX_FAILURE_LINES]
        return PropertyIndexError(
            f"There is no property index at {path}: the last build failed.\n"
            + "".join(f"    {line}\n" for line in lines)
            + "  Correct that, then run mixtera-hpc index build again."
        )
    if building_folder(path).is_dir():
        return PropertyIndexError(
            f"There is no property index at {path} yet: it is being built, or a build was interrupted.\n"
            "  Wait for it, or run mixtera-hpc index build again: it continues where it stopped."
        )
    return PropertyIndexError(
        f"There is no property index at {path}.\n  Build it with mixtera-hpc index build, or set index.path."
    )
