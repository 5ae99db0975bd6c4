"""Batches that every rank holds: a batch is handed out only when no rank waits for it any more.

If a read hangs on one rank, all ranks therefore wait at the same step, and can agree to save or to stop there. Without
this, the other ranks would be inside a collective of the trainer, from which nobody can call them back.

Ranks agree on the end of a range of steps, so that one reduction serves several steps. It is started during the last
step of the range before, and overlaps with it. It is not the reduction of a step: a trainer that holds batches starts
those late, and no rank could wait for them. While batches are missing, a rank takes part once per second, also if it
has nothing: that is how the ranks hear of requests. Price: one reduction of 32 bytes per `prefetch_batches` - 1 steps.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mixtera_hpc.comm.communicator import CollectiveRequest, Communicator, wait

__all__ = ["NO_LIMIT", "OpenRequests", "RankPosition", "ReadyAgreement"]

NO_LIMIT = 1 << 62
"""The end of the steps that a rank holds, if it never waits for a batch itself."""
PERIOD_S = 1.0
"""Time between two agreements that a rank without its batch takes part in."""
INTERRUPT_AFTER_S = 3.0
"""Time after which a request ends the wait for a batch. Slow reads are shorter."""
PATIENCE_S = 2.0
"""Time for which a rank whose trainer holds batches waits for ranks that do not ask for one."""
LONG_PATIENCE_S = 10.0
"""The same for a rank whose trainer holds none, if that of another rank does."""
FINISH_POLL_S = 1e-3
MAX_RELEASES = 3
"""Number of waits in vain after which a rank whose trainer holds batches does not wait any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRequests:
    """Requests to a rank that it has not answered."""

    stop: bool = False
    save: bool = False


class RankPosition(NamedTuple):
    """The batches that one rank holds."""

    next_step: int
    """The step of the batch that is handed out next."""
    held_end: int
    """One past the last step whose batch this rank holds."""
    has_unfinished: bool = False
    """True if its trainer holds batches."""


class ReadyAgreement:
    """The steps whose batches all ranks hold, as one rank knows them."""

    def __init__(self, comm: Communicator, first_step: int) -> None:
        """Begin with no batch. **Collective.**"""
        self._comm = comm
        self.has_peers = comm.size > 1
        """True if there are other ranks, whose messages `poll` waits for."""
        # Ranks have started different numbers of these reductions while other collectives run.
        self._ranges = comm.Dup()
        self._end = first_step
        """The first step whose batch some rank may not hold."""
        self._newest = first_step
        """One past the last step whose batch any rank was handed."""
        self._is_ahead = False
        """True if the trainer of any rank was seen to hold batches."""
        self._buffer = np.zeros(6, np.int64)
        self._result = np.zeros(6, np.int64)
        self._request: CollectiveRequest | None = None
        self._num_started = 0
        self._started_s = 0.0
        self._num_releases = 0
        self._interrupt: OpenRequests | None = None

    def covers(self, step: int) -> bool:
        """Return whether the batch of `step` may be handed out: every rank holds it, or another rank was handed it."""
        return step < max(self._end, self._newest)

    def needs_offer(self, next_step: int) -> bool:
        """Return whether `offer` has something to do; earlier, this rank would report fewer batches."""
        return next_step >= self._end - 1

    def offer(self, position: RankPosition) -> None:
        """Take part early if this rank holds a batch beyond those agreed on. Does not block, and is not collective."""
        self._complete()
        # The reduction that was complete may have made another one unnecessary for some steps.
        if self._request is None and position.held_end > self._end and self.needs_offer(position.next_step):
            self._start(position)
            self._complete()

    def poll(self, position: RankPosition, waited_s: float, open_requests: Callable[[], OpenRequests]) -> None:
        """Take part while the next batch is waited for. Does not block, and is not collective.

        Args:
            position: of this rank.
            waited_s: seconds that this rank has waited.
            open_requests: returns the requests that this rank has seen; called once per second.
        """
        self._complete()
        if self._request is not None or self.covers(position.next_step) or self._interrupt is not None:
            return
        is_overdue = waited_s >= INTERRUPT_AFTER_S
        if position.held_end > self._end and not is_overdue:
            self._start(position)
        elif time.monotonic() - self._started_s >= PERIOD_S and waited_s >= PERIOD_S:
            self._start(position, open_requests(), is_overdue)
        self._complete()

    def is_released(self, has_unfinished: bool) -> bool:
        """Return whether this rank hands out its batch although others may not hold it.

        If trainers hold batches, ranks may ask for different steps, and one that is behind may be unable to ask before
        this one goes on.
        """
        if self._request is None or not (has_unfinished or self._is_ahead):
            return False
        waited_s = time.monotonic() - self._started_s
        if not has_unfinished:
            return waited_s >= LONG_PATIENCE_S
        if self._num_releases < MAX_RELEASES:
            if waited_s < PATIENCE_S:
                return False
            self._num_releases += 1
        return True

    def take_interrupt(self) -> OpenRequests | None:
        """Return the requests for which all ranks end their wait, once; None if there is no such request."""
        interrupt = self._interrupt
        self._interrupt = None
        return interrupt

    def finish(self) -> None:
        """Complete what other ranks may wait for. **Collective.**"""
        everything = RankPosition(self._newest, NO_LIMIT)
        # Other ranks may still wait for batches; when all are here, none does.
        here = np.zeros(2, np.int64)
        all_are_here = self._comm.Iallreduce(here[:1], here[1:])
        while not all_are_here.Test():
            self._complete()
            if self._request is None and self._end < NO_LIMIT:
                self._start(everything)
            time.sleep(FINISH_POLL_S)
        # A rank that was ahead of the others may not have started all that they have.
        last = int(self._comm.Allreduce(np.array([self._num_started], np.int64), "max")[0])
        self._wait()
        while self._num_started < last:
            self._start(everything)
            self._wait()

    def _start(self, position: RankPosition, requests: OpenRequests | None = None, is_overdue: bool = False) -> None:
        requests = requests or OpenRequests()
        next_step, held_end, has_unfinished = position
        # One maximum for all: the smallest end is the largest negative one.
        self._buffer[:] = -held_end, next_step, has_unfinished, requests.stop, requests.save, is_overdue
        self._request = self._ranges.Iallreduce(self._buffer, self._result, "max")
        self._num_started += 1
        self._started_s = time.monotonic()

    def _wait(self) -> None:
        if self._request is not None:
            wait(self._request)
            self._complete()

    def _complete(self) -> None:
        if self._request is None or not self._request.Test():
            return
        self._request = None
        self._num_releases = 0
        negative_end, newest, is_ahead, stop, save, is_overdue = self._result.tolist()
        self._newest = max(self._newest, newest)
        self._is_ahead |= is_ahead > 0
        if -negative_end > self._end:
            self._end = -negative_end
        elif is_overdue and (stop or save):
            # Every rank gets this result before it can be handed the batch of `_end`.
            self._interrupt = OpenRequests(stop=stop > 0, save=save > 0)
