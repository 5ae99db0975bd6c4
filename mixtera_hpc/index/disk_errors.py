"""The message of a build whose disk does not take its data."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixtera_hpc.errors import MixteraError

__all__ = ["explain_disk_errors"]

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""The disk is full, over quota, does not take files of this size, or is read-only."""


@contextmanager
def explain_disk_errors(kind: type[MixteraError], folder: Path, problem: str, cure: str) -> Iterator[None]:
    """Raise an error of `kind` instead of one of `DISK_ERRORS`, or of missing permissions below a folder.

    Args:
        kind: the type of the error.
        folder: everything is written below it.
        problem: what cannot be written, and where.
        cure: what to do.
    """
    try:
        yield
    except OSError as error:
        # `filename` is a descriptor for some calls.
        path = Path(str(error.filename or ""))
        is_denied = isinstance(error, PermissionError) and path.is_relative_to(folder)
        if error.errno is None or (error.errno not in DISK_ERRORS and not is_denied):
            raise
        raise kind(f"{problem}: {os.strerror(error.errno)}.\n  {cure}") from None
