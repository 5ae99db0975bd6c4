"""Map files into memory without a file descriptor each: users may often open only 1,024 files at a time.

Python's `mmap` keeps a descriptor open for every mapping before version 3.13, so the functions of the C library are
called instead. A mapping does not need the descriptor it was made with.
"""

import ctypes
import errno
import mmap
import os
import weakref

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "load_pages",
    "map_descriptor",
    "read_single_pages",
    "release_pages",
    "request_pages",
    "shared_bytes",
    "spanning_memory",
]

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
# The offset has 64 bits on all 64-bit Linux systems.
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MADV_POPULATE_READ = 22
"""Python's `mmap` has no name for it."""
_FAILED = ctypes.c_void_p(-1).value


def map_descriptor(descriptor: int) -> NDArray[np.uint8]:
    """Map an open file as read-only memory, which is freed with the last array that refers to it.

    Args:
        descriptor: of a regular file; may be closed afterwards.

    Returns:
        All bytes of the file; shape (size,).

    Raises:
        OSError: the file cannot be mapped.
    """
    size = os.fstat(descriptor).st_size
    # An empty file cannot be mapped.
    if not size:
        return np.zeros(0, np.uint8)
    address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    memory = _Mapping(address, size)
    # At exit, other threads may still read: the system frees the memory then.
    weakref.finalize(memory, _LIBC.munmap, address, size).atexit = False
    return np.asarray(memory)


def spanning_memory(first: int, stop: int, owners: object) -> NDArray[np.uint8]:
    """Return the memory between two addresses, which may also cover addresses that belong to nobody.

    Args:
        first: address of the first byte.
        stop: one past the address of the last byte.
        owners: arrays of mapped memory, which live as long as a view of the result.
    """
    return np.asarray(_Mapping(first, stop - first, owners))


def load_pages(address: int, num_bytes: int) -> bool:
    """Read mapped memory into the page cache and map its pages, so that no access to it waits for the file system.

    Other threads run meanwhile. An access would hold the interpreter's lock, and kill the process on an error.

    Args:
        address: of memory that `map_descriptor` has returned.
        num_bytes: size of the memory.

    Returns:
        False if the kernel is older than Linux 5.14, which cannot do so.

    Raises:
        OSError: the file is too short, or cannot be read (EFAULT).
    """
    if _advise(address, num_bytes, _MADV_POPULATE_READ):
        return True
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(code, os.strerror(code))
    return False


def read_single_pages(address: int, num_bytes: int) -> None:
    """Let an access to mapped memory read its own page of the file only, and none around it."""
    _advise(address, num_bytes, mmap.MADV_RANDOM)


def request_pages(address: int, num_bytes: int) -> None:
    """Let the kernel begin to read mapped memory, without waiting for it. Takes 4 µs per 128 kB in the page cache."""
    _advise(address, num_bytes, mmap.MADV_WILLNEED)


def release_pages(address: int, num_bytes: int) -> None:
    """Remove mapped pages from the memory of this process. The next access takes them from the page cache or reads."""
    _advise(address, num_bytes, mmap.MADV_DONTNEED)


def _advise(address: int, num_bytes: int, advice: int) -> bool:
    """Give an advice, and return True unless the kernel ignores it."""
    if num_bytes <= 0:
        # The page of the address may belong to others: `MADV_DONTNEED` would fill it with zeros.
        return True
    begin = address & -mmap.PAGESIZE
    is_ignored = _LIBC.madvise(begin, address + num_bytes - begin, advice)
    return not is_ignored


def shared_bytes() -> int:
    """Return the memory of this process that belongs to mapped files or is shared with others. Takes 5 µs."""
    descriptor = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return int(os.read(descriptor, 256).split()[2]) * mmap.PAGESIZE
    finally:
        os.close(descriptor)


class _Mapping:
    """Read-only memory that numpy takes as an array. An array of ctypes would make a type of 3 kB for every size."""

    __slots__ = ("__array_interface__", "__weakref__", "owners")

    def __init__(self, address: int, size: int, owners: object = None) -> None:
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (size,), "data": (address, True)}
        self.owners = owners
        """The objects that the memory belongs to; None if it is this one."""
