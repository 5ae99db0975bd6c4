"""MPI ranks. The only file that imports mpi4py, and only inside functions: importing it starts MPI."""

import os
import socket
import sys
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import CollectiveRequest, Op, SharedCounters, wait
from mixtera_hpc.errors import CommError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Mpi"]


class Mpi:
    """A `Communicator` over an mpi4py communicator.

    Blocking verbs are their non-blocking twins polled with `wait`: MPICH spins when it blocks, and no signal handler runs
    meanwhile. Price: two communicators are duplicated at start, a few milliseconds.
    """

    def __init__(self, comm: "MPI.Intracomm | None" = None) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = (MPI.COMM_WORLD if comm is None else comm).Dup()
        self._node: Any = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self._leaders = self._comm.Split(0 if self._node.rank == 0 else MPI.UNDEFINED, self._comm.rank)
        self._windows: list[MPI.Win] = []
        self._duplicates: list[Mpi] = []
        self.rank: int = self._comm.rank
        self.size: int = self._comm.size
        self.local_rank: int = self._node.rank
        self.local_size: int = self._node.size
        self.hostname = socket.gethostname()

    @classmethod
    def world(cls) -> "Mpi":
        """All ranks of the job.

        Raises:
            CommError: the launcher says how many there are, and MPI sees another number.
        """
        from mpi4py import MPI

        _check_size(MPI.COMM_WORLD.size)
        return cls()

    def Dup(self) -> "Mpi":
        duplicate = Mpi(self._comm)
        self._duplicates.append(duplicate)
        return duplicate

    def Barrier(self) -> None:
        wait(self._comm.Ibarrier())

    def Bcast(self, buffer: NDArray[Any], root: int = 0) -> None:
        for piece in _pieces(buffer):
            wait(self._comm.Ibcast(piece, root))

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
        dtype, shape = self._describe(array)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        window = self._mpi.Win.Allocate_shared(size if self.local_rank == 0 else 0, 1, comm=self._node)
        self._windows.append(window)
        memory, _ = window.Shared_query(0)
        shared = np.frombuffer(cast("Any", memory), np.uint8, size).view(dtype).reshape(shape)
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
            if comm != self._mpi.COMM_NULL:  # Free sets it: freeing twice does no harm.
                comm.Free()

    def library(self) -> str:
        """Name and version of the MPI library."""
        return str(self._mpi.Get_library_version()).splitlines()[0].strip()

    def Abort(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._mpi.COMM_WORLD.Abort(code)
        os._exit(code)  # Abort returns under MPICH with PMI2: the rank would go on and report success.

    def _describe(self, array: NDArray[Any] | None) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Root's dtype and shape, on every rank."""
        header = np.zeros(10, np.int64)
        if array is not None and self.rank == 0:
            header[0], header[1] = ord(array.dtype.kind), array.dtype.itemsize
            header[2 : 3 + array.ndim] = [array.ndim, *array.shape]
        self.Bcast(header)
        return np.dtype(f"{chr(header[0])}{header[1]}"), tuple(int(n) for n in header[3 : 3 + header[2]])

    def _bcast_to_leaders(self, shared: NDArray[Any]) -> None:
        """Root is the first rank of its node and of the leaders."""
        for piece in _pieces(shared):
            wait(self._leaders.Ibcast(piece, 0))


class _MpiCounters:
    """One-sided additions to a window of rank 0."""

    def __init__(self, mpi: Any, comm: Any, count: int) -> None:
        self._mpi = mpi
        self._window = mpi.Win.Allocate(8 * count if comm.rank == 0 else 0, 8, comm=comm)
        if comm.rank == 0:
            np.frombuffer(cast("Any", self._window.tomemory()), np.int64)[:] = 0
        self._window.Lock_all()

    def Fetch_and_add(self, position: int, value: int) -> int:
        given, before = np.array([value], np.int64), np.empty(1, np.int64)
        self._window.Fetch_and_op(given, before, 0, position, self._mpi.SUM)
        self._window.Flush(0)
        return int(before[0])

    def Free(self) -> None:
        self._window.Unlock_all()
        self._window.Free()


def _pieces(buffer: NDArray[Any], limit: int = 2**30) -> list[NDArray[Any]]:
    """Views of `buffer` of at most `limit` bytes each: counts in MPI are 32-bit."""
    flat = buffer.reshape(-1).view(np.uint8)
    return [flat[i : i + limit] for i in range(0, len(flat), limit)]


def _check_size(size: int) -> None:
    """N processes that each believe to be alone are N runs writing over each other: find out before they start."""
    in_step = "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_STEP_ID") not in ("4294967291", "4294967290")
    expected = os.environ.get("SLURM_STEP_NUM_TASKS") if in_step else None
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
        expected = os.environ.get(name, expected)
    if expected is not None and int(expected) != size:
        raise CommError(
            f"The launcher started {expected} ranks, but MPI sees {size}: this MPI and the launcher do not understand each "
            "other.\n  Under Slurm choose the right srun --mpi (cluster.mpi=pmi2 for MPICH, pmix for Open MPI); elsewhere use "
            "the mpiexec that belongs to this MPI."
        )
