"""Per-domain losses on their way to everybody: one non-blocking integer reduction per step, overlapping the next step.

The same reduction carries what ranks must agree on: requests to stop or save, and the digest of the plan they serve. Price:
32 bytes per domain and step.
"""

import time
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import CollectiveRequest, Communicator, wait
from mixtera_hpc.core.statistics import NUM_BUFFER_ROWS, DomainStatistics, statistics_from_buffer
from mixtera_hpc.errors import CommError

__all__ = ["RankFlags", "StepReducer", "StepResult"]

Ints = NDArray[np.int64]
_LOW = (1 << 32) - 1
"""The part of a digest that is compared, so that sums over all ranks fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFlags:
    """What one rank says beside its losses."""

    stop: bool
    save: bool
    digest: int
    """Of the plan it served the step from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What all ranks said of one step."""

    statistics: DomainStatistics
    stop: bool
    save: bool
    reduce_s: float
    """Seconds this rank waited for it; 0 when it was done before it was needed."""


@dataclass(slots=True)
class _UnderWay:
    step: int
    buffer: Ints
    result: Ints
    request: CollectiveRequest


class StepReducer:
    """Reductions of consecutive steps, in order."""

    def __init__(self, comm: Communicator, num_domains: int) -> None:
        self._comm = comm.Dup()
        self._num_domains = num_domains
        self._under_way: deque[_UnderWay] = deque()
        self._done: list[StepResult] = []
        self._odd: _UnderWay | None = None

    def post(self, step: int, rows: Ints, notes: RankFlags) -> None:
        """Start the reduction of `step`, once those before the last are done. **Collective.**

        Args:
            rows: this rank's sums, shape (NUM_ROWS, K); see `core.statistics.accumulate`.

        Raises:
            CommError: ranks served an earlier step from different plans.
        """
        self._done = self.wait_for(step - 2)
        tail = [int(notes.stop), int(notes.save), notes.digest & _LOW]
        buffer = np.concatenate([rows.reshape(-1), np.array(tail, np.int64)])
        result = np.empty_like(buffer)
        request = self._comm.Iallreduce(buffer, result)
        self._under_way.append(_UnderWay(step, buffer, result, request))

    def poll(self) -> list[StepResult]:
        """What has completed since the last call."""
        while self._under_way and self._under_way[0].request.Test():
            self._take(reduce_s=0.0)
        return self._hand_over()

    def wait_for(self, step: int) -> list[StepResult]:
        """Like `poll`, but with everything up to `step` in it. **Collective.**

        Raises:
            CommError: ranks served one of those steps from different plans.
        """
        while self._under_way and self._under_way[0].step <= step:
            began = time.perf_counter()
            wait(self._under_way[0].request)
            self._take(reduce_s=time.perf_counter() - began)
        if self._odd is not None and self._odd.step <= step:
            self._name_the_odd_ones(self._odd)
        return self._hand_over()

    def _hand_over(self) -> list[StepResult]:
        done, self._done = self._done, []
        return done

    def _take(self, reduce_s: float) -> None:
        sent = self._under_way.popleft()
        rows = sent.result[:-3].reshape(NUM_BUFFER_ROWS, self._num_domains)
        stop, save, digest = (int(n) for n in sent.result[-3:])
        if digest != self._comm.size * int(sent.buffer[-1]):
            self._odd = self._odd or sent
        statistics = statistics_from_buffer(sent.step, rows)
        self._done.append(StepResult(statistics=statistics, stop=stop > 0, save=save > 0, reduce_s=reduce_s))

    def _name_the_odd_ones(self, sent: _UnderWay) -> None:
        """Every rank sees the wrong sum, and comes here at the same point of its program, whenever it saw it."""
        digests = self._comm.Allgather(sent.buffer[-1:])[:, 0]
        values, counts = np.unique(digests, return_counts=True)
        odd = np.flatnonzero(digests != values[np.argmax(counts)])
        raise CommError(
            f"Ranks {odd.tolist()} served step {sent.step} from another plan than the others: they run different code or "
            "read different indexes.\n  Give all nodes the same installation and the same index.path."
        )
