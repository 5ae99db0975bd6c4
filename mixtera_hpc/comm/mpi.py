"""The MPI communicator.

This is the only file that imports mpi4py, and it does so inside functions only, because importing mpi4py starts MPI.
"""

import os
import socket
import sys
import time
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import (
    CollectiveRequest,
    Op,
    SharedCounters,
    bcast_dtype_and_shape,
    byte_segments,
    wait,
)
from mixtera_hpc.comm.pipes import wait_until_read

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Mpi"]

OUTPUT_LIMIT_S = 2.0
"""Longest wait of a rank that aborts the job until the launcher has read its output."""
OUTPUT_GRACE_S = 0.05
"""Time for the launcher to forward this output."""


class Mpi:
    """A `Communicator` over an mpi4py communicator.

    A blocking call starts the non-blocking collective and polls it with `wait`. A blocking call of MPICH would spin,
    and Python would run no signal handler meanwhile.

    Price: a few milliseconds at start, to duplicate and split communicators.
    """

    def __init__(self, comm: "MPI.Intracomm | None" = None) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        # A duplicate: collectives of other libraries on the same communicator cannot interfere.
        self._comm = (MPI.COMM_WORLD if comm is None else comm).Dup()
        self._node: Any = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self._leaders = self._comm.Split(0 if self._node.rank == 0 else MPI.UNDEFINED, self._comm.rank)
        self._windows: list[MPI.Win] = []
        self._duplicates: list[Mpi] = []
        self.rank: int = self._comm.rank
        self.size: int = self._comm.size
        self.world_size: int = MPI.COMM_WORLD.size
        """Number of processes that MPI sees, also those outside of this communicator."""
        self.local_rank: int = self._node.rank
        self.local_size: int = self._node.size
        self.hostname = socket.gethostname()

    @classmethod
    def world(cls) -> "Mpi":
        """Return the communicator of all ranks that MPI sees. **Collective.**

        `open_communicator` compares their number with the launcher's.
        """
        return cls()

    def Dup(self) -> "Mpi":
        duplicate = Mpi(self._comm)
        self._duplicates.append(duplicate)
        return duplicate

    def Split(self, color: int) -> "Mpi":
        members: Any = self._comm.Split(color, self.rank)
        part = Mpi(members)
        members.Free()  # `part` has a duplicate of it.
        self._duplicates.append(part)
        return part

    def Barrier(self) -> None:
        wait(self._comm.Ibarrier())

    def Bcast(self, buffer: NDArray[Any], root: int = 0) -> None:
        for segment in byte_segments(buffer):
            wait(self._comm.Ibcast(segment, root))

    def Ibcast(self, buffer: NDArray[Any], root: int = 0) -> CollectiveRequest:
        return self._comm.Ibcast(buffer, root)

    def Allreduce(self, buffer: NDArray[Any], op: Op = "sum") -> NDArray[Any]:
        result = np.empty_like(buffer)
        wait(self.Iallreduce(buffer, result, op))
        return result

    def Iallreduce(self, buffer: NDArray[Any], result: NDArray[Any], op: Op = "sum") -> CollectiveRequest:
        operation = {"sum": self._mpi.SUM, "max": self._mpi.MAX, "min": self._mpi.MIN}[op]
        return self._comm.Iallreduce(buffer, result, operation)

    def Allgather(self, buffer: NDArray[Any]) -> NDArray[Any]:
        result = np.empty((self.size, *buffer.shape), buffer.dtype)
        wait(self._comm.Iallgather(np.ascontiguousarray(buffer), result))
        return result

    def Allocate_shared(self, array: NDArray[Any] | None) -> NDArray[Any]:
        dtype, shape = bcast_dtype_and_shape(self, array)

        # The first rank of every node allocates the memory; the others map it.
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        window = self._mpi.Win.Allocate_shared(size if self.local_rank == 0 else 0, 1, comm=self._node)
        self._windows.append(window)
        memory, _ = window.Shared_query(0)
        shared = np.frombuffer(cast("Any", memory), np.uint8, size).view(dtype).reshape(shape)

        # Rank 0 fills its own memory and sends the content to the first rank of every other node.
        if self.rank == 0:
            shared[...] = array
        if self.local_rank == 0 and self.size > self.local_size:
            self._bcast_to_leaders(shared)
        wait(self._node.Ibarrier())
        shared.flags.writeable = False
        return shared

    def Allocate_counters(self, count: int) -> SharedCounters:
        counters = _MpiCounters(self._mpi, self._comm, count)
        wait(self._comm.Ibarrier())
        return counters

    def Free(self) -> None:
        for duplicate in self._duplicates:
            duplicate.Free()
        for window in self._windows:
            window.Free()
        self._windows.clear()
        self._duplicates.clear()
        for comm in (self._leaders, self._node, self._comm):
            if comm != self._mpi.COMM_NULL:  # comm.Free sets the handle to COMM_NULL, so Free may be called twice.
                comm.Free()

    def library(self) -> str:
        """Return the name and version of the MPI library."""
        return str(self._mpi.Get_library_version()).splitlines()[0].strip()

    def Abort(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        # After an abort, MPICH's mpiexec ends the ranks at once and drops output that it has not read.
        for descriptor in (1, 2):
            wait_until_read(descriptor, OUTPUT_LIMIT_S)
        time.sleep(OUTPUT_GRACE_S)
        self._mpi.COMM_WORLD.Abort(code)
        os._exit(code)  # With MPICH and PMI2, Abort returns. The rank would go on and report success.

    def _bcast_to_leaders(self, shared: NDArray[Any]) -> None:
        """Copy rank 0's content to the first rank of every node; all of these call it. Rank 0 is the first of them."""
        for segment in byte_segments(shared):
            wait(self._leaders.Ibcast(segment, 0))


class _MpiCounters:
    """Shared counters in a window of rank 0, changed by one-sided operations."""

    def __init__(self, mpi: Any, comm: Any, count: int) -> None:
        self._mpi = mpi
        self._window = mpi.Win.Allocate(8 * count if comm.rank == 0 else 0, 8, comm=comm)
        if comm.rank == 0:
            np.frombuffer(cast("Any", self._window.tomemory()), np.int64)[:] = 0
        self._window.Lock_all()

    def Fetch_and_add(self, position: int, value: int) -> int:
        addend = np.array([value], np.int64)
        previous = np.empty(1, np.int64)
        self._window.Fetch_and_op(addend, previous, 0, position, self._mpi.SUM)
        self._window.Flush(0)
        return int(previous[0])

    def Free(self) -> None:
        self._window.Unlock_all()
        self._window.Free()
