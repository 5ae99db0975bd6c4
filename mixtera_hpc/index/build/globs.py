"""Expand the globs of `data.include` and `data.exclude`, and refuse what a glob would pass over silently.

Python's `glob` skips folders that it cannot list, and it follows links without a word about those that lead nowhere.
Either would drop shards. Price: every folder that a glob lists is listed once more.
"""

import errno
import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Set
from pathlib import Path, PurePosixPath

from mixtera_hpc.errors import ConfigError, DataError

__all__ = ["check_listed_folders", "dangling_link_error", "expand_glob", "leads_nowhere", "unreadable_path_error"]

# The innermost braces with a comma: `{a,b}`. Braces without one are part of a file name, as in a shell.
_BRACES = re.compile(r"\{([^{}]*,[^{}]*)\}")


def expand_glob(root: Path, pattern: str, key: str) -> list[str]:
    """Return the paths that a glob matches, relative to `root`, each once.

    `{a,b}` in a glob stands for either `a` or `b`.

    Raises:
        ConfigError: the glob leaves the root; `key` names the setting.
    """
    if PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts:
        raise ConfigError(f"{key} has {pattern!r}, expected a glob below data.root, without '..'.")
    return list(dict.fromkeys(path for plain in _alternatives(pattern) for path in _expand(root, plain)))


def check_listed_folders(root: Path, pattern: str, excluded: Set[str]) -> None:
    """Refuse folders that the expansion of a glob has to list but cannot, and links in them that lead nowhere.

    Args:
        root: the data root.
        pattern: the glob, relative to `root`.
        excluded: paths that are left out, relative to `root`.

    Raises:
        DataError: there is such a folder or link.
    """
    for plain in _alternatives(pattern):
        for folder, part in sorted(_listed_folders(root, plain)):
            if folder not in excluded:
                _check_folder(root, folder, part, excluded)


def unreadable_path_error(path: Path, reason: str | None) -> DataError:
    """Build the error for a file or folder that may not be read."""
    return DataError(f"{path} cannot be read: {reason}.\n  Change its permissions, or leave it out with data.exclude.")


def dangling_link_error(path: Path) -> DataError:
    """Build the error for a link that leads nowhere."""
    return DataError(
        f"{path} is a link to {str(path.readlink())!r}, which does not exist or is a loop of links.\n"
        "  Restore the target, remove the link, or leave it out with data.exclude."
    )


def leads_nowhere(path: Path) -> bool:
    """Return True for a link whose target does not exist, or that is part of a loop of links."""
    if not path.is_symlink():
        return False
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    # Relative to the folder, so that links on the way to it do not count as a loop.
    try:
        os.stat(path.name, dir_fd=folder)
    except OSError as error:
        # Anything else, such as a missing permission, is reported where the file is read.
        return error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)
    finally:
        os.close(folder)
    return False


def _alternatives(pattern: str) -> list[str]:
    """Return the globs without braces that a glob stands for."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    before = pattern[: match.start()]
    after = pattern[match.end() :]
    # Braces may nest, and there may be several: expand the remaining ones of each alternative.
    return [plain for choice in match[1].split(",") for plain in _alternatives(before + choice + after)]


def _expand(root: Path, pattern: str) -> list[str]:
    return glob.glob(pattern, root_dir=root, recursive=True)  # noqa: PTH207 (pathlib does not follow links to folders)


def _listed_folders(root: Path, pattern: str) -> set[tuple[str, str]]:
    """Return the folders that the expansion of a glob lists, and the part of the glob that it lists them for.

    Paths are relative to `root`; '' is the root.
    """
    parts = PurePosixPath(pattern).parts
    folders = set[tuple[str, str]]()
    for i, part in enumerate(parts):
        # A part without wildcards is looked up by name, so no folder is listed for it.
        if not glob.has_magic(part):
            continue
        # `**` also lists the folders that it matches; any other wildcard lists only the folders before it.
        above = parts[: i + 1] if part == "**" else parts[:i]
        if above:
            # The empty last part restricts the glob to folders.
            folders.update((folder.rstrip("/"), part) for folder in _expand(root, "/".join([*above, ""])))
        if i == 0:
            folders.add(("", part))
    return folders


def _check_folder(root: Path, folder: str, part: str, excluded: Set[str]) -> None:
    """Refuse a folder that cannot be listed, or that has a link to nowhere whose name matches `part`."""
    try:
        links = list(_links_to_nowhere(root / folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise unreadable_path_error(root / folder, error.strerror) from None
    for name in links:
        path = f"{folder}/{name}" if folder else name
        # A link may have led to a folder of shards, so `**` could have matched it whatever its name.
        if path not in excluded and (part == "**" or fnmatch.fnmatchcase(name, part)):
            raise dangling_link_error(root / path)


def _links_to_nowhere(folder: Path) -> Iterator[str]:
    """Yield the names of links in a folder that lead nowhere; hidden ones are never matched by a glob."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink() and not entry.name.startswith(".") and leads_nowhere(Path(entry.path)):
                yield entry.name
