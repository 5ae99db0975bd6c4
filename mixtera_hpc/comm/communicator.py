"""Communication between ranks: one protocol, and `Local`, the communicator of a single process.

Collectives keep the names and meanings of MPI. Buffers are contiguous numpy arrays; nothing is pickled. Blocking calls
poll and sleep instead of spinning, so that ranks that share cores do not slow each other down, and Python signal
handlers run.
"""

import socket
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
    "bcast_dtype_and_shape",
    "byte_segments",
    "hosts_of",
    "wait",
]

Op = Literal["sum", "max", "min"]

HOST_BYTES = 64


class CollectiveRequest(Protocol):
    """A non-blocking collective in progress, like MPI's request."""

    def Test(self) -> bool:
        """Return True if the collective is complete, after advancing it. Does not block, and is not collective."""
        ...


class SharedCounters(Protocol):
    """Integers on rank 0 that every rank can add to at any time."""

    def Fetch_and_add(self, position: int, value: int) -> int:
        """Add `value` to the counter at `position` and return its previous value. Blocks, but is not collective.

        If the network has no atomic operations, this may wait until rank 0 calls any method of the communicator.
        """
        ...

    def Free(self) -> None:
        """Release the counters. **Collective.**"""
        ...


@runtime_checkable
class Communicator(Protocol):
    """A group of ranks.

    Every method but `Abort` is collective: all ranks must call it, in the same order. The methods that return a
    `CollectiveRequest` return at once. The others block until this rank's part of the operation is complete.
    """

    rank: int
    """Number of this process, in [0, size)."""
    size: int
    local_rank: int
    """Number of this process among those of its node, in [0, local_size)."""
    local_size: int
    hostname: str

    def Dup(self) -> "Communicator":
        """Return a communicator of the same ranks whose collectives are ordered independently. **Collective.**

        Blocks. The duplicate is released with this communicator.
        """
        ...

    def Split(self, color: int) -> "Communicator":
        """Return a communicator of the ranks that give the same `color`, in the order of their ranks. **Collective.**

        Blocks. It is released with this communicator.

        Args:
            color: not negative.
        """
        ...

    def Barrier(self) -> None:
        """Block until every rank has called it. **Collective.**"""
        ...

    def Bcast(self, buffer: NDArray[Any], root: int = 0) -> None:
        """Copy the `buffer` of rank `root` into the `buffer` of every rank. **Collective.**

        Blocks until this rank may use its buffer. The buffers have the same shape and dtype on all ranks, and any size.
        """
        ...

    def Ibcast(self, buffer: NDArray[Any], root: int = 0) -> CollectiveRequest:
        """Start a `Bcast`. **Collective.**

        Neither read nor write `buffer` until the request is complete.
        """
        ...

    def Allreduce(self, buffer: NDArray[Any], op: Op = "sum") -> NDArray[Any]:
        """Return the element-wise `op` of the buffers of all ranks; shape and dtype of `buffer`. **Collective.**

        Blocks until the result is complete.
        """
        ...

    def Iallreduce(self, buffer: NDArray[Any], result: NDArray[Any], op: Op = "sum") -> CollectiveRequest:
        """Start an `Allreduce` into `result`. **Collective.**

        Neither read `result` nor write either array until the request is complete.
        """
        ...

    def Allgather(self, buffer: NDArray[Any]) -> NDArray[Any]:
        """Return the buffers of all ranks, in rank order; shape (size, *buffer.shape). **Collective.**

        Blocks until the result is complete.
        """
        ...

    def Allocate_shared(self, array: NDArray[Any] | None) -> NDArray[Any]:
        """Return the `array` of rank 0, read-only, in memory that the ranks of a node share. **Collective.**

        Blocks until the array is complete. It is valid until `Free`.

        Args:
            array: the content on rank 0; ignored on other ranks.
        """
        ...

    def Allocate_counters(self, count: int) -> SharedCounters:
        """Return `count` shared counters, all 0. **Collective.**

        Blocks until every rank may add to them.
        """
        ...

    def Free(self) -> None:
        """Release shared memory, duplicates and parts; calling it twice does no harm. **Collective.**"""
        ...

    def Abort(self, code: int) -> None:
        """End all processes of the job with exit code `code`. Does not return, and is not collective."""
        ...


def wait(request: CollectiveRequest, poll_s: float = 1e-4) -> None:
    """Block until `request` is complete.

    Polls ten times without sleeping, then every `poll_s` seconds with a pause that grows to 1 ms.
    """
    for _ in range(10):
        if request.Test():
            return
    while not request.Test():
        time.sleep(poll_s)
        poll_s = min(poll_s * 1.1, 1e-3)


def bcast_bytes(comm: Communicator, data: bytes | None) -> bytes:
    """Return the `data` of rank 0 on every rank. **Collective.**

    Blocks until the data is there.

    Args:
        comm: all of its ranks call this.
        data: the bytes on rank 0, of any length; None on other ranks.
    """
    length = np.array([0 if data is None else len(data)], np.int64)
    comm.Bcast(length)
    if data is not None:
        buffer = np.frombuffer(data, np.uint8).copy()
    else:
        buffer = np.empty(int(length[0]), np.uint8)
    comm.Bcast(buffer)
    return buffer.tobytes()


def bcast_dtype_and_shape(comm: Communicator, array: NDArray[Any] | None) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Return the dtype and shape of rank 0's `array` on every rank. **Collective.**"""
    # [kind of dtype as a character code, bytes per item, number of dimensions, shape…]
    header = np.zeros(10, np.int64)
    if array is not None and comm.rank == 0:
        header[0] = ord(array.dtype.kind)
        header[1] = array.dtype.itemsize
        header[2 : 3 + array.ndim] = [array.ndim, *array.shape]
    comm.Bcast(header)
    shape = tuple(int(n) for n in header[3 : 3 + header[2]])
    return np.dtype(f"{chr(header[0])}{header[1]}"), shape


def hosts_of(comm: Communicator) -> list[str]:
    """Return the name of every rank's node. **Collective.** Names are cut to `HOST_BYTES` bytes."""
    own = np.zeros(HOST_BYTES, np.uint8)
    name = comm.hostname.encode()[:HOST_BYTES]
    own[: len(name)] = np.frombuffer(name, np.uint8)
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in comm.Allgather(own)]


def byte_segments(buffer: NDArray[Any], limit: int = 2**30) -> list[NDArray[np.uint8]]:
    """Return views of `buffer` of at most `limit` bytes each: MPI counts elements in 32 bits."""
    flat = buffer.reshape(-1).view(np.uint8)
    return [flat[i : i + limit] for i in range(0, len(flat), limit)]


class _CompletedRequest:
    def Test(self) -> bool:
        return True


COMPLETED_REQUEST: CollectiveRequest = _CompletedRequest()
"""A request that is already complete."""


class _LocalCounters:
    def __init__(self, count: int) -> None:
        self._values = [0] * count

    def Fetch_and_add(self, position: int, value: int) -> int:
        previous = self._values[position]
        self._values[position] += value
        return previous

    def Free(self) -> None:
        return None


class Local:
    """The communicator of one process, which needs no MPI library."""

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1

    def __init__(self) -> None:
        self.hostname = socket.gethostname()

    def Dup(self) -> "Local":
        return Local()

    def Split(self, color: int) -> "Local":
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
