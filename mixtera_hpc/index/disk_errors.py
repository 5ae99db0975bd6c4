"""The message of a build whose disk does not take its data."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from mixtera_hpc.errors import MixteraError

__all__ = ["explain_disk_errors"]

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""The disk is full, over quota, does not take files of this size, or is read-only."""


@contextmanager
def explain_disk_errors(kind: type[MixteraError], problem: str, cure: str) -> Iterator[None]:
    """Raise an error of `kind` instead of one of `DISK_ERRORS`.

    Args:
        kind: the type of the error.
        problem: what cannot be written, and where.
        cure: what to do.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise kind(f"{problem}: {os.strerror(error.errno)}.\n  {cure}") from None
