"""The rules for other users: they may not write files of a run, and their control files do not count."""

import os
import stat
from pathlib import Path

__all__ = ["deny_world_write", "is_trusted_request"]


def deny_world_write() -> None:
    """Let this process create no file that everybody may write; the rest of the user's umask stays."""
    # The mask can only be read by setting it.
    mask = os.umask(0o077)
    os.umask(mask | stat.S_IWOTH)


def is_trusted_request(path: Path) -> bool:
    """Return whether a control file counts: it belongs to the owner of its folder, or to the group that may write.

    Raises:
        OSError: the file does not exist, or cannot be looked at.
    """
    # A link counts as what it is, not as the file that it leads to.
    file = path.lstat()
    folder = path.parent.stat()
    if file.st_uid == folder.st_uid:
        return True
    # In a folder that everybody may write, the group of a file says nothing: setgid gives it to any file.
    is_group_folder = bool(folder.st_mode & stat.S_IWGRP) and not folder.st_mode & stat.S_IWOTH
    return is_group_folder and file.st_gid == folder.st_gid
