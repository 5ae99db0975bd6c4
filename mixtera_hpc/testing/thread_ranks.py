"""Ranks as threads of one process: a communicator for tests that want many small jobs without a launcher.

Collectives are matched by their order on each duplicate, as MPI matches them; buffers are copied under one lock.
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
Key = tuple[tuple[int, ...], int]
_COMBINE: dict[str, Callable[..., Any]] = {"sum": np.sum, "max": np.max, "min": np.min}


@dataclass
class _World:
    """What the ranks of one job share."""

    size: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    given: dict[Key, dict[int, NDArray[Any]]] = field(default_factory=dict)
    taken: dict[Key, int] = field(default_factory=dict)
    counters: dict[Key, NDArray[np.int64]] = field(default_factory=dict)
    failed: bool = False


class _Pending:
    """One rank's part of a collective."""

    def __init__(self, world: _World, key: Key, awaited: tuple[int, ...], finish: Callable[..., None]) -> None:
        self._world, self._key, self._awaited, self._finish = world, key, awaited, finish
        self._done = False

    def Test(self) -> bool:
        if self._done:
            return True
        with self._world.lock:
            if self._world.failed:
                raise CommError("Another rank has failed.")
            given = self._world.given[self._key]
            if any(rank not in given for rank in self._awaited):
                return False
            self._finish(given)
            self._done = True
            self._world.taken[self._key] = self._world.taken.get(self._key, 0) + 1
            if self._world.taken[self._key] == self._world.size:
                del self._world.given[self._key], self._world.taken[self._key]
        return True


class _Counters:
    def __init__(self, world: _World, values: NDArray[np.int64]) -> None:
        self._world, self._values = world, values

    def Fetch_and_add(self, position: int, value: int) -> int:
        with self._world.lock:
            before = int(self._values[position])
            self._values[position] += value
        return before

    def Free(self) -> None:
        return None


class ThreadCommunicator:
    """One thread's view of a job; see `run_ranks`."""

    hostname = "localhost"

    def __init__(self, world: _World, rank: int, path: tuple[int, ...] = ()) -> None:
        self.rank = self.local_rank = rank
        self.size = self.local_size = world.size
        self._world, self._path = world, path
        self._calls = self._duplicates = 0

    def Dup(self) -> "ThreadCommunicator":
        self._duplicates += 1
        return ThreadCommunicator(self._world, self.rank, (*self._path, self._duplicates))

    def Barrier(self) -> None:
        self.Allgather(np.zeros(1))

    def Bcast(self, buffer: NDArray[Any], root: int = 0) -> None:
        wait(self.Ibcast(buffer, root))

    def Ibcast(self, buffer: NDArray[Any], root: int = 0) -> CollectiveRequest:
        def finish(given: dict[int, NDArray[Any]]) -> None:
            if self.rank != root:
                buffer[...] = given[root]

        return self._post(buffer.copy(), (root,), finish)

    def Allreduce(self, buffer: NDArray[Any], op: Op = "sum") -> NDArray[Any]:
        result = np.empty_like(buffer)
        wait(self.Iallreduce(buffer, result, op))
        return result

    def Iallreduce(self, buffer: NDArray[Any], result: NDArray[Any], op: Op = "sum") -> CollectiveRequest:
        def finish(given: dict[int, NDArray[Any]]) -> None:
            result[...] = _COMBINE[op](np.stack([given[r] for r in range(self.size)]), axis=0)

        return self._post(buffer.copy(), tuple(range(self.size)), finish)

    def Allgather(self, buffer: NDArray[Any]) -> NDArray[Any]:
        result = np.empty((self.size, *buffer.shape), buffer.dtype)

        def finish(given: dict[int, NDArray[Any]]) -> None:
            for rank in range(self.size):
                result[rank] = given[rank]

        wait(self._post(buffer.copy(), tuple(range(self.size)), finish))
        return result

    def Allocate_shared(self, array: NDArray[Any] | None) -> NDArray[Any]:
        found: list[NDArray[Any]] = []
        wait(self._post(np.zeros(0) if array is None else array, (0,), lambda given: found.append(given[0])))
        shared = found[0].view()
        shared.flags.writeable = False
        return shared

    def Allocate_counters(self, count: int) -> SharedCounters:
        self._calls += 1
        with self._world.lock:
            values = self._world.counters.setdefault((self._path, self._calls), np.zeros(count, np.int64))
        return _Counters(self._world, values)

    def Free(self) -> None:
        return None

    def Abort(self, code: int) -> None:
        self._world.failed = True
        raise SystemExit(code)

    def _post(self, given: NDArray[Any], awaited: tuple[int, ...], finish: Callable[..., None]) -> CollectiveRequest:
        self._calls += 1
        key = (self._path, self._calls)
        with self._world.lock:
            self._world.given.setdefault(key, {})[self.rank] = given
        return _Pending(self._world, key, awaited, finish)


def run_ranks(num_ranks: int, body: Callable[[ThreadCommunicator], T]) -> list[T]:
    """Run `body` as every rank of a job; results by rank. The first failure is raised, and ends the others."""
    world = _World(num_ranks)
    results: list[Any] = [None] * num_ranks
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = body(ThreadCommunicator(world, rank))
        except BaseException as error:
            failures.append(error)
            world.failed = True

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results
