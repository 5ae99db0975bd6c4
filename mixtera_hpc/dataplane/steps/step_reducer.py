"""Per-domain losses on their way to all ranks: one non-blocking integer reduction per step, overlapping the next step.

The same reduction carries what ranks must agree on: requests to stop or save, and the digest of the plan they serve.
Price: 32 bytes per domain and step.
"""

import hashlib
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import CollectiveRequest, Communicator, wait
from mixtera_hpc.core.statistics import NUM_BUFFER_ROWS, DomainStatistics, statistics_from_buffer
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.errors import CommError

__all__ = ["AgreedRequests", "RankFlags", "StepReducer", "StepResult"]

Ints = NDArray[np.int64]

DIGEST_MASK = (1 << 32) - 1
"""The bits of a digest that are compared: sums of 32-bit numbers over all ranks fit into an int64."""

NUM_FLAGS = 4
"""Integers that follow the losses in the buffer: stop, save, sum of the group numbers that recorded, digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFlags:
    """What one rank reports about a step besides its losses."""

    stop: bool
    save: bool
    digest: int
    """Digest of the plan that it served the step from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What all ranks reported about one step."""

    statistics: DomainStatistics
    stop: bool
    """Whether any rank was asked to stop."""
    save: bool
    """Whether any rank was asked to save."""
    reduce_s: float
    """Seconds that this rank waited for the reduction; 0 when it was complete before it was needed."""


@dataclass(slots=True)
class _Reduction:
    """A reduction in progress."""

    step: int
    buffer: Ints
    result: Ints
    request: CollectiveRequest


class StepReducer:
    """Reductions of consecutive steps, in order."""

    def __init__(self, comm: Communicator, num_domains: int, global_batch_size: int, batch_slice: BatchSlice) -> None:
        """Reduce over a duplicate of `comm`. **Collective.**

        Args:
            comm: all ranks; also used by `wait_for`.
            num_domains: K.
            global_batch_size: sequences of one step, over all groups of ranks.
            batch_slice: what this rank gets of every step; ranks of one group have equal ones.
        """
        self._comm = comm
        # When ranks agree on a mismatch, they have started different numbers of reductions. On one communicator, their
        # collectives would not match.
        self._reductions = comm.Dup()
        self._num_domains = num_domains
        self._global_batch_size = global_batch_size
        self._group = batch_slice.first // batch_slice.size
        # Sums of hashes tell how often each group recorded: unequal numbers of copies give another sum.
        hashes = [_hash_of(group) for group in range(global_batch_size // batch_slice.size)]
        self._group_hash = hashes[self._group]
        self._all_groups_hash = sum(hashes)
        self._running: deque[_Reduction] = deque()
        self._results: list[StepResult] = []
        """Complete, and not returned yet."""
        self._mismatch: _Reduction | None = None
        """The first step that ranks served from different plans, or recorded in part."""

    def post(self, step: int, rows: Ints, flags: RankFlags) -> None:
        """Start the reduction of `step`. Every rank starts those of all steps, in order, at a time of its own.

        Args:
            step: the training step after the one of the previous call.
            rows: this rank's sums, shape (NUM_BUFFER_ROWS, K); see `core.statistics.accumulate_losses`.
            flags: what this rank reports about the step.
        """
        vote = self._group_hash if rows[2].any() else 0
        tail = [int(flags.stop), int(flags.save), vote, flags.digest & DIGEST_MASK]
        # One buffer, so that losses and flags need a single collective.
        buffer = np.concatenate([rows.reshape(-1), np.array(tail, np.int64)])
        result = np.empty_like(buffer)
        request = self._reductions.Iallreduce(buffer, result)
        # MPI owns both arrays until the request is complete; the entry keeps them alive.
        self._running.append(_Reduction(step, buffer, result, request))

    def poll(self) -> list[StepResult]:
        """Return the results that have become complete since the last call, in order."""
        while self._running and self._running[0].request.Test():
            self._complete_first(reduce_s=0.0)
        return self._take_results()

    def wait_for(self, step: int) -> list[StepResult]:
        """Return the same as `poll`, after waiting for every reduction up to that of `step`. **Collective.**

        All ranks must have started the reduction of `step`, or start it without waiting for this rank.

        Raises:
            CommError: ranks served one of those steps from different plans, or recorded it in part.
        """
        self._complete_to(step)
        # Every rank waits here for the same step, whatever it has polled before: all of them raise together.
        if self._mismatch is not None and self._mismatch.step <= step:
            self._raise_mismatch(self._mismatch)
        return self._take_results()

    def drain(self) -> list[StepResult]:
        """Return the same as `poll`, after waiting for all reductions, without checking them. **Collective.**"""
        if self._running:
            self._complete_to(self._running[-1].step)
        return self._take_results()

    def _complete_to(self, step: int) -> None:
        while self._running and self._running[0].step <= step:
            # Time spent here means that the network, or another rank, is slower than a step.
            began = time.perf_counter()
            wait(self._running[0].request)
            self._complete_first(reduce_s=time.perf_counter() - began)

    def _take_results(self) -> list[StepResult]:
        results = self._results
        self._results = []
        return results

    def _complete_first(self, reduce_s: float) -> None:
        """Move the oldest reduction to the results."""
        reduction = self._running.popleft()
        rows = reduction.result[:-NUM_FLAGS].reshape(NUM_BUFFER_ROWS, self._num_domains)
        stop, save, votes, digest_sum = reduction.result[-NUM_FLAGS:].tolist()

        # Equal digests add up to a multiple of this rank's own.
        own_digest = int(reduction.buffer[-1])
        differs = digest_sum != self._comm.size * own_digest
        # Every group must have recorded the same number of copies; of equal copies one is the quotient.
        num_sequences = int(rows[2].sum())
        num_copies = max(num_sequences // self._global_batch_size, 1)
        is_partial = num_sequences > 0 and (
            num_sequences != num_copies * self._global_batch_size or votes != num_copies * self._all_groups_hash
        )
        statistics = statistics_from_buffer(reduction.step, rows // num_copies)
        if (differs or is_partial) and self._mismatch is None:
            self._mismatch = reduction

        self._results.append(StepResult(statistics=statistics, stop=stop > 0, save=save > 0, reduce_s=reduce_s))

    def _raise_mismatch(self, reduction: _Reduction) -> None:
        """Name the ranks that served a step from another plan than most, or did not record it. **Collective.**

        Ranks may notice a wrong sum at different times. They all raise in the first `wait_for` that includes its step,
        which is the same call of the program on every rank. They may have started reductions of later steps, and not
        all of them the same.
        """
        digests = self._comm.Allgather(reduction.buffer[-1:])[:, 0]
        values, counts = np.unique(digests, return_counts=True)
        differing = np.flatnonzero(digests != values[np.argmax(counts)])
        if not len(differing):
            self._raise_partial(reduction)
        raise CommError(
            f"Ranks {differing.tolist()} served step {reduction.step} from another plan: they use "
            "different code or read different indexes.\n  Give all nodes the same installation and the same index.path."
        )

    def _raise_partial(self, reduction: _Reduction) -> None:
        """Name the ranks that did not record a step that others recorded. **Collective.**"""
        recorded = int(reduction.buffer[:-NUM_FLAGS].reshape(NUM_BUFFER_ROWS, self._num_domains)[2].any())
        by_rank = self._comm.Allgather(np.array([self._group, recorded], np.int64))
        copies = np.bincount(by_rank[:, 0], weights=by_rank[:, 1])
        # In groups with fewer copies than others, the ranks that did not record.
        silent = np.flatnonzero((copies[by_rank[:, 0]] < copies.max()) & (by_rank[:, 1] == 0))
        raise CommError(
            f"Step {reduction.step} was recorded in part: ranks {silent.tolist()} did not record their losses, others "
            "did.\n  Call record() for every step in all data-parallel groups, on as many ranks in each, or in none."
        )


def _hash_of(group: int) -> int:
    return int.from_bytes(hashlib.blake2b(group.to_bytes(8, "little"), digest_size=4).digest(), "little")


class AgreedRequests:
    """What any rank was asked to do, as all ranks know it from the results of steps.

    Ranks receive results at different times. They ask about the same step, and get the same answer.
    """

    def __init__(self) -> None:
        """Begin without requests."""
        self._first_stop: int | None = None
        self._saves: set[int] = set()

    def add(self, result: StepResult) -> None:
        """Take the requests from the result of a step; results arrive in order."""
        self.add_flags(result.statistics.step, stop=result.stop, save=result.save)

    def add_flags(self, step: int, *, stop: bool, save: bool) -> None:
        """Take requests that all ranks know to belong to `step`."""
        # The first request counts; a stop is never withdrawn.
        if stop and self._first_stop is None:
            self._first_stop = step
        if save:
            self._saves.add(step)

    def stop_by(self, step: int) -> bool:
        """Return whether a stop was requested up to training step `step`."""
        return self._first_stop is not None and self._first_stop <= step

    def take_save_by(self, step: int) -> bool:
        """Return whether a save was requested up to `step` and not returned before."""
        due = {requested for requested in self._saves if requested <= step}
        self._saves -= due
        return bool(due)
