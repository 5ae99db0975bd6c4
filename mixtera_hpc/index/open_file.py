"""An index file as a file: opened without locks, refused when it is missing, damaged or of another version."""

from pathlib import Path

import h5py

from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.index.layout import FORMAT, VERSION, read_text
from mixtera_hpc.index.scan.scan_log import building_folder

__all__ = ["DAMAGE", "damaged", "open_file"]

DAMAGE = (OSError, KeyError, ValueError, TypeError, RuntimeError, UnicodeDecodeError)
"""What h5py raises on a file that is not what it should be."""


def open_file(path: Path) -> h5py.File:
    """Open an index for reading.

    Raises:
        PropertyIndexError: it is missing, not built yet, damaged, no index, or of another version.
    """
    if not path.is_file():
        raise _missing(path)
    try:
        file = h5py.File(path, "r", locking=False)
        found, version = _format_of(file), file.attrs.get("version")
    except DAMAGE as error:
        raise damaged(path, error) from None
    if found != FORMAT or version != VERSION:
        file.close()
        what = "is not a property index" if found != FORMAT else f"is of version {version}, this is version {VERSION}"
        raise PropertyIndexError(f"{path} {what}.\n  Build it with mixtera-hpc index build.")
    return file


def _format_of(file: h5py.File) -> str | None:
    """What the file says it is; None when another program wrote it."""
    return read_text(file, "format") if "format" in file.attrs else None


def _missing(path: Path) -> PropertyIndexError:
    if building_folder(path).is_dir():
        return PropertyIndexError(
            f"There is no property index at {path} yet: it is being built, or a build was interrupted.\n"
            "  Wait for it, or run mixtera-hpc index build again: it goes on where it stopped."
        )
    return PropertyIndexError(
        f"There is no property index at {path}.\n  Build it with mixtera-hpc index build, or set index.path."
    )


def damaged(path: Path, error: Exception) -> PropertyIndexError:
    """The error for a file that h5py failed on; `error` is one of `DAMAGE`."""
    return PropertyIndexError(
        f"{path} is damaged or cut short: {str(error).splitlines()[0] if str(error) else type(error).__name__}.\n"
        "  Copy it again, or build it again with mixtera-hpc index build."
    )
