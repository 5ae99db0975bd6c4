"""Memory that the processes of one node share: files in /dev/shm that are unlinked once every process has mapped them.

A mapping outlives the name of its file. So after the unlink the kernel frees the memory when the last process ends,
also after a crash, and nothing can remain in /dev/shm.
"""

import contextlib
import hashlib
import mmap
import os
import socket
from pathlib import Path

__all__ = ["create_memory", "machine_key", "map_memory", "memory_folder_key", "unlink_memory"]

FOLDER = Path("/dev/shm")  # noqa: S108


def machine_key(*namespaces: str) -> int:
    """Return a signed 64-bit number that is equal for processes of one machine that give equal `namespaces`."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    parts = [socket.gethostname(), boot_id.read_text() if boot_id.exists() else "", *namespaces]
    digest = hashlib.blake2b("|".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def memory_folder_key() -> int:
    """Return a number that is equal for processes that share /dev/shm: containers of one machine may have their own."""
    device = str(FOLDER.stat().st_dev) if FOLDER.is_dir() else f"none, process {os.getpid()}"
    return machine_key(device)


def create_memory(name: str, size: int) -> mmap.mmap:
    """Create `size` bytes of shared memory under a new name and map them.

    Raises:
        OSError: /dev/shm is too small, or the name exists.
    """
    descriptor = os.open(FOLDER / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # Reserves the memory: without it, a write beyond the limit of /dev/shm would kill the process (SIGBUS).
        os.posix_fallocate(descriptor, 0, max(size, 1))
        return mmap.mmap(descriptor, max(size, 1))
    finally:
        os.close(descriptor)


def map_memory(name: str, size: int) -> mmap.mmap:
    """Map the shared memory that another process of the node created.

    Raises:
        OSError: this process does not see it.
    """
    descriptor = os.open(FOLDER / name, os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(descriptor, max(size, 1))
    finally:
        os.close(descriptor)


def unlink_memory(name: str) -> None:
    """Remove the name; mappings stay valid. A name that does not exist is no error."""
    with contextlib.suppress(FileNotFoundError):
        (FOLDER / name).unlink()
