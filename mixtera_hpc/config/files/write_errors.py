"""Explain that a file of a run cannot be written: the path, the reason, and what is safe."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixtera_hpc.errors import LaunchError

__all__ = ["explain_write_errors"]


@contextmanager
def explain_write_errors(
    path: Path, safe: str, *, others: tuple[type[Exception], ...] = (), unless: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn an error of the file system into a message for users.

    Args:
        path: what is written, for errors that name no file.
        safe: a sentence about what was not lost.
        others: errors of libraries that write files.
        unless: errors that the caller handles.

    Raises:
        LaunchError: something could not be written.
    """
    explained: tuple[type[Exception], ...] = (OSError, *others)
    try:
        yield
    except explained as error:
        if isinstance(error, unless):
            raise
        place = getattr(error, "filename", None) or path
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise LaunchError(
            f"{place} cannot be written: {reason}.\n"
            f"  {safe} Free space, or make the folder writable, then run the command again."
        ) from None
