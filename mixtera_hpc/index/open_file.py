"""Open an index file without locks; refuse one that is missing, damaged or of another version."""

import math
from pathlib import Path

import h5py

from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.index.layout import FORMAT, VERSION, building_folder, failure_file, read_text

__all__ = ["DAMAGE", "damaged", "open_file"]

DAMAGE = (OSError, KeyError, ValueError, TypeError, RuntimeError, UnicodeDecodeError)
"""Errors that h5py raises for a damaged or foreign file."""
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
        foreign = _foreign_storage(file)
    except DAMAGE as error:
        raise damaged(path, error) from None
    if foreign is not None:
        file.close()
        raise PropertyIndexError(
            f"{path} holds {foreign}, so that opening it would read other files. An index keeps all data in one file.\n"
            "  Do not use this file. Build the index with mixtera-hpc index build."
        )
    if file_format == FORMAT and version == VERSION:
        _check_size(file, path, max_bytes)
        return file
    file.close()
    problem = "is not a property index"
    if file_format == FORMAT:
        problem = f"has version {version}, but this is version {VERSION}"
    raise PropertyIndexError(f"{path} {problem}.\n  Build it with mixtera-hpc index build.")


def _foreign_storage(group: h5py.Group) -> str | None:
    """Return the first object of a file whose data lies elsewhere, or None; in O(objects) time."""
    for name in group:
        place = f"{group.name.rstrip('/')}/{name}"
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            return f"a link at {place}"
        node = group[name]
        if isinstance(node, h5py.Dataset):
            if node.is_virtual:
                return f"a virtual dataset at {place}"
            if node.external:
                return f"external storage at {place}"
        elif isinstance(node, h5py.Group) and (found := _foreign_storage(node)):
            return found
    return None


def _check_size(file: h5py.File, path: Path, max_bytes: int | None) -> None:
    """Refuse an index whose tables would not fit into memory: a compressed dataset of zeros takes no room on disk."""
    if max_bytes is None:
        return
    limit = max(max_bytes, MIN_TABLE_BYTES)
    try:
        size = _bytes_to_read(file)
    except DAMAGE as error:
        file.close()
        raise damaged(path, error) from None
    if size > limit:
        file.close()
        raise PropertyIndexError(
            f"{path} has tables of {size} bytes, more than data.max_block_bytes={max_bytes}.\n"
            "  Raise data.max_block_bytes if the index is that large; otherwise do not use this file."
        )


def _bytes_to_read(group: h5py.Group) -> int:
    """Return the decoded bytes of all datasets; of a column of samples, which is read in chunks, those of a chunk."""
    total = 0
    for name in group:
        node = group[name]
        if isinstance(node, h5py.Group):
            total += _bytes_to_read(node)
        elif node.name.startswith("/samples/"):
            total += math.prod(node.chunks or ()) * node.dtype.itemsize
        else:
            total += node.size * node.dtype.itemsize
    return total


def damaged(path: Path, error: Exception) -> PropertyIndexError:
    """Return the error to raise for a file that h5py failed on; `error` is one of `DAMAGE`."""
    lines = str(error).splitlines()
    reason = lines[0] if lines else type(error).__name__
    return PropertyIndexError(
        f"{path} is damaged or truncated: {reason}.\n  Copy it again, or rebuild it with mixtera-hpc index build."
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
