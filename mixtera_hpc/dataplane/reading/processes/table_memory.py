"""Memory with the tables of an index, for the reading processes of all ranks of a node.

The first rank of a node copies the tables into memory without a name, and the others open it through the file system of
processes. Each rank passes its descriptor on to its own processes, which map the memory instead of copying the tables.
Price: the tables of the index once more per node, for any number of ranks and processes.
"""

import contextlib
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.comm.node_memory import machine_key

__all__ = [
    "BLOCKS_NAME",
    "NONCE_BYTES",
    "STAMPS_NAME",
    "WINDOWS_NAME",
    "TableMemory",
    "map_tables",
    "share_memory",
    "share_tables",
]

NAME = "mixtera-tables"
BLOCKS_NAME = "mixtera-blocks"
STAMPS_NAME = "mixtera-stamps"
WINDOWS_NAME = "mixtera-windows"
NAMES_IN_PROC = tuple(f"/memfd:{name}" for name in (NAME, BLOCKS_NAME, STAMPS_NAME, WINDOWS_NAME))
"""Start of the target of the links to this memory in `/proc/PID/fd`."""
MIN_BYTES = 1 << 20
"""Smaller tables are sent through the pipe."""
ALIGNMENT = 64
NONCE_BYTES = 8
"""The memory begins with a random number, so that a rank knows that it has opened the right one."""

ArraySpec = tuple[str, tuple[int, ...]]
"""Type and shape of an array."""


class TableMemory:
    """A descriptor of the memory; it is closed when nothing refers to this object any more."""

    def __init__(self, fd: int, specs: list[ArraySpec]) -> None:
        """Own a descriptor."""
        self.fd = fd
        self.specs = specs
        weakref.finalize(self, os.close, fd)

    def __reduce__(self) -> Any:
        """Pickle the arrays for a process that inherits the descriptor."""
        return map_tables, (self.fd, self.specs)


def share_tables(comm: Communicator, arrays: Sequence[NDArray[Any]]) -> TableMemory | None:
    """Put arrays, equal on all ranks, into memory of each node; None where they are small or cannot be shared.

    **Collective.**
    """
    specs: list[ArraySpec] = [(array.dtype.str, array.shape) for array in arrays]
    is_large = sum(array.nbytes for array in arrays) >= MIN_BYTES
    fd = share_memory(comm, partial(_create, arrays) if is_large else None)
    return None if fd < 0 else TableMemory(fd, specs)


def share_memory(comm: Communicator, create: Callable[[int], int] | None) -> int:
    """Return a descriptor of memory that the first rank of each node creates; -1 if there is none. **Collective.**

    Args:
        create: makes the memory, given the number that it begins with; None for no memory.
    """
    fd = -1
    nonce = 0
    if comm.local_rank == 0 and create is not None:
        # Without room for it, every process has its own.
        with contextlib.suppress(OSError):
            nonce = int.from_bytes(os.urandom(NONCE_BYTES), "little") >> 1
            fd = create(nonce)
    own = np.array([machine_key(), comm.local_rank, os.getpid(), fd, nonce], np.int64)
    for key, local_rank, pid, leader_fd, leader_nonce in comm.Allgather(own).tolist():
        if key == own[0] and local_rank == 0 and leader_fd >= 0:
            if comm.local_rank > 0:
                fd = _open(pid, leader_fd, leader_nonce)
            break
    return fd


def map_tables(fd: int, specs: Sequence[ArraySpec]) -> list[NDArray[Any]]:
    """Return the arrays behind a descriptor, read-only; the descriptor may be closed afterwards."""
    memory = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    arrays: list[NDArray[Any]] = []
    for (dtype, shape), offset in zip(specs, _offsets(specs), strict=True):
        count = int(np.prod(shape, dtype=np.int64))
        arrays.append(np.frombuffer(memory, dtype, count, offset).reshape(shape))
    return arrays


def _create(arrays: Sequence[NDArray[Any]], nonce: int) -> int:
    """Return the descriptor of new memory that holds a number and the arrays.

    Raises:
        OSError: there is not enough memory.
    """
    specs: list[ArraySpec] = [(array.dtype.str, array.shape) for array in arrays]
    offsets = _offsets(specs)
    end = offsets[-1] + arrays[-1].nbytes
    fd = os.memfd_create(NAME)
    try:
        # Reserves the memory: a write beyond the limit would kill the process.
        os.posix_fallocate(fd, 0, end)
        # Unmapped when no view refers to it any more.
        memory = mmap.mmap(fd, end)
        memory[:NONCE_BYTES] = nonce.to_bytes(NONCE_BYTES, "little")
        for array, offset in zip(arrays, offsets, strict=True):
            np.frombuffer(memory, array.dtype, array.size, offset)[:] = array.reshape(-1)
    except OSError:
        os.close(fd)
        raise
    return fd


def _open(pid: int, fd: int, nonce: int) -> int:
    """Open the memory of another process of this node; return -1 if it cannot be reached."""
    path = Path(f"/proc/{pid}/fd/{fd}")
    try:
        # In another container the same numbers may mean another process, or any file.
        if not str(path.readlink()).startswith(NAMES_IN_PROC):
            return -1
        own = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return -1
    if os.pread(own, NONCE_BYTES, 0) != nonce.to_bytes(NONCE_BYTES, "little"):
        os.close(own)
        return -1
    return own


def _offsets(specs: Sequence[ArraySpec]) -> list[int]:
    """Return the first byte of every array."""
    offsets = []
    end = NONCE_BYTES
    for dtype, shape in specs:
        begin = -(-end // ALIGNMENT) * ALIGNMENT
        offsets.append(begin)
        end = begin + int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return offsets
