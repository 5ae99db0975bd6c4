"""Errors about shards. Every message names the file, the place inside it, and what the user can do."""

import errno
import os
from pathlib import Path

from mixtera_hpc.errors import DataError, pluralize
from mixtera_hpc.formats.base import BlockRef

__all__ = [
    "MAX_BAD_ROWS",
    "ShardLayoutError",
    "bad_rows_error",
    "cannot_open_error",
    "check_whole_file",
    "decompression_error",
    "open_shard",
    "shard_changed_error",
    "unreadable_error",
]

MAX_BAD_ROWS = 10
"""A scan without `skip_bad` stops after this many unreadable rows of a unit and names them all."""
# Largest size of the files that stand in place of others, and how they begin.
POINTER_BYTES = 1024
_POINTERS = {
    b"version https://git-lfs.github.com/spec/": ("a Git LFS pointer", "git lfs pull --include {name}"),
    b"/annex/objects/": ("a git-annex pointer", "git annex get {name}"),
}


class ShardLayoutError(DataError):
    """The rows of a shard are all readable, but it cannot be said which is which. `skip_bad` does not skip it."""


def check_whole_file(path: Path, size_bytes: int, format_name: str, *, may_be_empty: bool) -> None:
    """Refuse a file that cannot be a shard of any content: of 0 bytes, or a pointer to the real file.

    Raises:
        DataError: it is such a file.
    """
    if not size_bytes and not may_be_empty:
        raise DataError(
            f"{path} has 0 bytes, which is no valid file of format {format_name}: most often the rest of an "
            "interrupted download, or of a full disk.\n"
            "  Download or write it again, delete it, or leave it out with data.exclude."
        )
    if not 0 < size_bytes <= POINTER_BYTES:
        return
    data = path.read_bytes()
    for prefix, (kind, command) in _POINTERS.items():
        if data.startswith(prefix):
            raise DataError(
                f"{path} is {kind}, not the file itself.\n"
                f"  Fetch the file with {command.format(name=path.name)}, or leave it out with data.exclude."
            )


def open_shard(path: Path) -> int:
    """Open a shard for reading and return the file descriptor.

    Raises:
        DataError: the shard cannot be opened.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise cannot_open_error(path, error) from None


def cannot_open_error(path: Path, error: Exception) -> DataError:
    """Return the error for a file that cannot be opened."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    cure = "Run mixtera-hpc index verify."
    if isinstance(error, PermissionError):
        cure = "Let the user of the job read the file, and enter its folders."
    elif isinstance(error, OSError) and error.errno == errno.ENOMEM:
        cure = (
            "Raise the limit of the job's address space (ulimit -v), or of the mappings of a process (sysctl "
            "vm.max_map_count), or give the job more memory."
        )
    return DataError(f"{path} cannot be opened: {reason}.\n  {cure}")


def bad_rows_error(path: Path, bad: list[tuple[int, str]]) -> DataError:
    """Build the error for unreadable rows.

    Args:
        path: the shard.
        bad: (row of the shard, problem); `MAX_BAD_ROWS` entries at most.
    """
    # A scan stops at the limit, so there may be more.
    prefix = "at least " if len(bad) >= MAX_BAD_ROWS else ""
    error = DataError(
        f"{path} has {prefix}{pluralize(len(bad), 'unreadable row')}. Every row needs a text at the path data.text, "
        "and values of the kinds that data.properties names.\n"
        "  Repair or remove them, exclude the file with data.exclude, or skip such rows with data.on_bad_sample=skip."
    )
    for row, problem in bad:
        error.add_note(f"shard={str(path)!r} row={row}: {problem}")
    return error


def unreadable_error(path: Path, what: str, error: Exception) -> DataError:
    """Build the error for a part of a shard that its library cannot read, for example `what="row group 3"`."""
    return DataError(
        f"{path}: {what} cannot be read: {error}.\n  Write or copy the file again, or exclude it with data.exclude."
    )


def decompression_error(path: Path, problem: str) -> DataError:
    """Build the error for a file that cannot be decompressed."""
    return DataError(
        f"{path} cannot be decompressed: {problem}.\n  Copy or download it again, or exclude it with data.exclude."
    )


def shard_changed_error(path: Path, block: BlockRef | None, problem: str) -> DataError:
    """Build the error for a shard whose rows differ from the index. `block` is the block that was read, if known."""
    error = DataError(
        f"{path} has changed since it was indexed: {problem}.\n"
        "  Run mixtera-hpc index verify, then mixtera-hpc index build."
    )
    # Readers of byte ranges do not know the block.
    if block is not None:
        error.add_note(f"shard={str(path)!r} rows {block.first_row} to {block.first_row + block.rows - 1}")
    return error
