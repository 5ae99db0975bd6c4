"""How ranks talk: one protocol, and `Local`, the communicator of a single process.

Verbs keep MPI's names. Buffers are contiguous numpy arrays, never pickled objects. Waiting polls and sleeps, so that ranks
that share cores leave them to those that work and Python signal handlers get to run.
"""

import time
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "COMPLETED_REQUEST",
    "CollectiveRequest",
    "Communicator",
    "Local",
    "Op",
    "SharedCounters",
    "bcast_bytes",
    "wait",
]

Op = Literal["sum", "max", "min"]


class CollectiveRequest(Protocol):
    """A collective under way."""

    def Test(self) -> bool:
        """Whether it has completed; drives it forward."""
        ...


class SharedCounters(Protocol):
    """A few integers that all ranks count with, each when it pleases; they lie on rank 0.

    Where the network cannot add by itself, an addition waits until rank 0 makes some call of this communicator.
    """

    def Fetch_and_add(self, position: int, value: int) -> int:
        """Add to one of them; returns what it was before. Not collective."""
        ...

    def Free(self) -> None:
        """Give them back. **Collective.**"""
        ...


@runtime_checkable
class Communicator(Protocol):
    """A group of ranks. Every method but `Abort` is collective: all ranks call it, in the same order."""

    rank: int
    size: int
    local_rank: int
    """Position among the ranks of this node."""
    local_size: int
    """Ranks of this node."""
    hostname: str

    def Dup(self) -> "Communicator":
        """The same ranks with their own ordering of collectives. **Collective.**"""
        ...

    def Barrier(self) -> None:
        """Wait until every rank is here. **Collective.**"""
        ...

    def Bcast(self, buffer: NDArray[Any], root: int = 0) -> None:
        """Copy root's `buffer` into everybody's. **Collective.**"""
        ...

    def Ibcast(self, buffer: NDArray[Any], root: int = 0) -> CollectiveRequest:
        """Start a `Bcast`; the buffer belongs to MPI until the request is done. **Collective.**"""
        ...

    def Allreduce(self, buffer: NDArray[Any], op: Op = "sum") -> NDArray[Any]:
        """Combine everybody's `buffer` element by element. **Collective.**"""
        ...

    def Iallreduce(self, buffer: NDArray[Any], result: NDArray[Any], op: Op = "sum") -> CollectiveRequest:
        """Start an `Allreduce` into `result`; both belong to MPI until the request is done. **Collective.**"""
        ...

    def Allgather(self, buffer: NDArray[Any]) -> NDArray[Any]:
        """Everybody's `buffer`, stacked; shape (size, *buffer.shape). **Collective.**"""
        ...

    def Allocate_shared(self, array: NDArray[Any] | None) -> NDArray[Any]:
        """Root's `array` (others give None), read-only on every rank and stored once per node. **Collective.**"""
        ...

    def Allocate_counters(self, count: int) -> SharedCounters:
        """Shared counters, all 0. **Collective.**"""
        ...

    def Free(self) -> None:
        """Give back shared memory and duplicates. **Collective.**"""
        ...

    def Abort(self, code: int) -> None:
        """End the whole job now; does not return."""
        ...


def wait(request: CollectiveRequest, poll_s: float = 1e-4) -> None:
    """Poll `request` until it is done, sleeping between polls; starts eagerly and backs off to 1 ms."""
    for _ in range(10):
        if request.Test():
            return
    while not request.Test():
        time.sleep(poll_s)
        poll_s = min(poll_s * 1.1, 1e-3)


def bcast_bytes(comm: Communicator, data: bytes | None) -> bytes:
    """Root's `data` on every rank; others give None. **Collective.**"""
    length = np.array([0 if data is None else len(data)], np.int64)
    comm.Bcast(length)
    buffer = np.frombuffer(data, np.uint8).copy() if data is not None else np.empty(int(length[0]), np.uint8)
    comm.Bcast(buffer)
    return buffer.tobytes()


class _CompletedRequest:
    def Test(self) -> bool:
        return True


COMPLETED_REQUEST: CollectiveRequest = _CompletedRequest()
"""A request that has completed."""


class _LocalCounters:
    def __init__(self, count: int) -> None:
        self._values = [0] * count

    def Fetch_and_add(self, position: int, value: int) -> int:
        before = self._values[position]
        self._values[position] += value
        return before

    def Free(self) -> None:
        return None


class Local:
    """A group of one: the same code runs with no MPI installed."""

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1

    def __init__(self) -> None:
        import socket

        self.hostname = socket.gethostname()

    def Dup(self) -> "Local":
        return Local()

    def Barrier(self) -> None:
        return None

    def Bcast(self, buffer: NDArray[Any], root: int = 0) -> None:
        return None

    def Ibcast(self, buffer: NDArray[Any], root: int = 0) -> CollectiveRequest:
        return COMPLETED_REQUEST

    def Allreduce(self, buffer: NDArray[Any], op: Op = "sum") -> NDArray[Any]:
        return buffer.copy()

    def Iallreduce(self, buffer: NDArray[Any], result: NDArray[Any], op: Op = "sum") -> CollectiveRequest:
        result[...] = buffer
        return COMPLETED_REQUEST

    def Allgather(self, buffer: NDArray[Any]) -> NDArray[Any]:
        return buffer[None].copy()

    def Allocate_shared(self, array: NDArray[Any] | None) -> NDArray[Any]:
        shared = np.ascontiguousarray(array).view()
        shared.flags.writeable = False
        return shared

    def Allocate_counters(self, count: int) -> SharedCounters:
        return _LocalCounters(count)

    def Free(self) -> None:
        return None

    def Abort(self, code: int) -> None:
        raise SystemExit(code)
