"""The facts of a file that tell whether it was replaced or written again."""

import os
from pathlib import Path
from typing import NamedTuple

__all__ = ["FileState", "file_state"]


class FileState(NamedTuple):
    """The state of a file."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    """Change time: a program can restore the modification time, but not this one. `chmod` changes it, too."""


def file_state(path: Path) -> FileState:
    """Return the state of a file.

    Raises:
        OSError: it cannot be found.
    """
    status = os.stat(path)  # noqa: PTH116 - pathlib is slow.
    return FileState(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
