"""A communicator whose ranks are threads of one process, for tests that run many small jobs without a launcher.

As in MPI, the n-th collective call of a rank on a communicator matches the n-th call of every other rank on it. Buffers
are copied under one lock.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import CollectiveRequest, Op, SharedCounters, wait
from mixtera_hpc.errors import CommError

__all__ = ["ThreadCommunicator", "run_ranks"]

T = TypeVar("T")

Arrays = dict[int, NDArray[Any]]
"""Rank → the array that it contributes to a collective."""

CallKey = tuple[tuple[int, ...], int]
"""One collective call of all ranks: the path that leads to the communicator, and the number of the call on it."""

_REDUCTIONS: dict[str, Callable[..., Any]] = {"sum": np.sum, "max": np.max, "min": np.min}


@dataclass
class _ThreadJob:
    """State shared by the ranks of one job; guarded by `lock`."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    contributions: dict[CallKey, Arrays] = field(default_factory=dict)
    num_finished: dict[CallKey, int] = field(default_factory=dict)
    """Number of ranks that have finished a call; its contributions are freed when all have."""
    counters: dict[CallKey, NDArray[np.int64]] = field(default_factory=dict)
    failed: bool = False


class _ThreadRequest:
    """The pending collective of one rank: it completes when all `senders` have contributed."""

    def __init__(
        self, job: _ThreadJob, key: CallKey, size: int, senders: tuple[int, ...], finish: Callable[[Arrays], None]
    ) -> None:
        self._job = job
        self._size = size
        self._key = key
        self._senders = senders
        self._finish = finish
        self._is_complete = False

    def Test(self) -> bool:
        """Complete the collective if possible; return whether it is complete."""
        if self._is_complete:
            return True
        with self._job.lock:
            if self._job.failed:
                raise CommError("Another rank has failed.")
            contributions = self._job.contributions[self._key]
            if any(rank not in contributions for rank in self._senders):
                return False
            self._finish(contributions)
            self._is_complete = True
            self._free_if_last()
        return True

    def _free_if_last(self) -> None:
        num_finished = self._job.num_finished.get(self._key, 0) + 1
        self._job.num_finished[self._key] = num_finished
        if num_finished == self._size:
            del self._job.contributions[self._key]
            del self._job.num_finished[self._key]


class _ThreadCounters:
    """Counters shared by all ranks, with atomic additions."""

    def __init__(self, job: _ThreadJob, values: NDArray[np.int64]) -> None:
        self._job = job
        self._values = values

    def Fetch_and_add(self, position: int, value: int) -> int:
        """Add `value` to a counter and return its previous value."""
        with self._job.lock:
            previous = int(self._values[position])
            self._values[position] += value
        return previous

    def Free(self) -> None:
        """Do nothing: the memory is freed with the job."""


class ThreadCommunicator:
    """The communicator of one thread; `run_ranks` creates them. See `Communicator` for the methods."""

    hostname = "localhost"

    def __init__(self, job: _ThreadJob, rank: int, size: int, path: tuple[int, ...] = ()) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = rank
        self.local_size = size
        self._job = job
        self._path = path
        """Numbers of the `Dup` and `Split` calls that lead to this communicator, and colors; equal on all its ranks."""
        self._num_calls = 0
        self._num_duplicates = 0

    def Dup(self) -> "ThreadCommunicator":
        self._num_duplicates += 1
        return ThreadCommunicator(self._job, self.rank, self.size, (*self._path, self._num_duplicates))

    def Split(self, color: int) -> "ThreadCommunicator":
        members = np.flatnonzero(self.Allgather(np.array([color]))[:, 0] == color).tolist()
        self._num_duplicates += 1
        path = (*self._path, self._num_duplicates, color)
        return ThreadCommunicator(self._job, members.index(self.rank), len(members), path)

    def Barrier(self) -> None:
        self.Allgather(np.zeros(1))

    def Bcast(self, buffer: NDArray[Any], root: int = 0) -> None:
        wait(self.Ibcast(buffer, root))

    def Ibcast(self, buffer: NDArray[Any], root: int = 0) -> CollectiveRequest:
        def finish(contributions: Arrays) -> None:
            if self.rank != root:
                buffer[...] = contributions[root]

        # As in gloo, and in MPI for large buffers, the root needs the others too.
        senders = tuple(range(self.size)) if self.rank == root else (root,)
        return self._post(buffer.copy(), senders, finish)

    def Allreduce(self, buffer: NDArray[Any], op: Op = "sum") -> NDArray[Any]:
        result = np.empty_like(buffer)
        wait(self.Iallreduce(buffer, result, op))
        return result

    def Iallreduce(self, buffer: NDArray[Any], result: NDArray[Any], op: Op = "sum") -> CollectiveRequest:
        def finish(contributions: Arrays) -> None:
            by_rank = np.stack([contributions[rank] for rank in range(self.size)])
            result[...] = _REDUCTIONS[op](by_rank, axis=0)

        return self._post(buffer.copy(), tuple(range(self.size)), finish)

    def Allgather(self, buffer: NDArray[Any]) -> NDArray[Any]:
        result = np.empty((self.size, *buffer.shape), buffer.dtype)

        def finish(contributions: Arrays) -> None:
            for rank in range(self.size):
                result[rank] = contributions[rank]

        wait(self._post(buffer.copy(), tuple(range(self.size)), finish))
        return result

    def Allocate_shared(self, array: NDArray[Any] | None) -> NDArray[Any]:
        received: list[NDArray[Any]] = []
        contribution = np.zeros(0) if array is None else array
        wait(self._post(contribution, (0,), lambda contributions: received.append(contributions[0])))
        shared = received[0].view()
        shared.flags.writeable = False
        return shared

    def Allocate_counters(self, count: int) -> SharedCounters:
        self._num_calls += 1
        key = (self._path, self._num_calls)
        with self._job.lock:
            values = self._job.counters.setdefault(key, np.zeros(count, np.int64))
        return _ThreadCounters(self._job, values)

    def Free(self) -> None:
        """Do nothing: the memory is freed with the job."""

    def Abort(self, code: int) -> None:
        self._job.failed = True
        raise SystemExit(code)

    def _post(
        self, contribution: NDArray[Any], senders: tuple[int, ...], finish: Callable[[Arrays], None]
    ) -> CollectiveRequest:
        """Start a collective: contribute an array, and call `finish` when all `senders` have contributed."""
        self._num_calls += 1
        key = (self._path, self._num_calls)
        with self._job.lock:
            self._job.contributions.setdefault(key, {})[self.rank] = contribution
        return _ThreadRequest(self._job, key, self.size, senders, finish)


def run_ranks(num_ranks: int, body: Callable[[ThreadCommunicator], T]) -> list[T]:
    """Run `body` once per rank, each in its own thread, and return the results by rank.

    If a rank fails, the others fail at their next collective, and the first exception is raised.
    """
    job = _ThreadJob()
    results: list[Any] = [None] * num_ranks
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = body(ThreadCommunicator(job, rank, num_ranks))
        except BaseException as error:
            failures.append(error)
            job.failed = True

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results
