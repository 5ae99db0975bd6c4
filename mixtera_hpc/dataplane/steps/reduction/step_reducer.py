"""Per-domain losses on their way to all ranks: one non-blocking integer reduction per step, overlapping the next step.

The same reduction carries what ranks must agree on: requests to stop or save, the digest of the plan they serve, and
with `dataplane.audit` whether peers were handed the same sequences; and it carries how long each stage took on every
rank (`stage_times`). Price: 32 bytes per domain and step, and 8 bytes per rank and step.

If several ranks record parts of each sequence, the parts meet inside the group first (`loss_parts`), and only the
leader of each group takes part in the sum with its losses.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Communicator, wait
from mixtera_hpc.core.measures.scalars import ROWS_PER_SCALAR
from mixtera_hpc.core.statistics import DomainStatistics, ZeroStatistics, statistics_from_buffer
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.recording.loss_log import LossLog
from mixtera_hpc.dataplane.steps.loss_parts import LossParts, PartLayout, PendingParts
from mixtera_hpc.dataplane.steps.reduction.stage_times import maxima_of, pack_times, times_alone
from mixtera_hpc.dataplane.steps.reduction.step_buffer import BufferFlags, BufferLayout, StepContribution
from mixtera_hpc.dataplane.steps.reduction.step_mismatch import Reduction, raise_mismatch
from mixtera_hpc.dataplane.steps.step_losses import StepLosses
from mixtera_hpc.dataplane.steps.step_scalars import StepScalars, checks_of

__all__ = ["RankFlags", "StepReducer", "StepResult"]

Ints = NDArray[np.int64]

DIGEST_MASK = (1 << 32) - 1
"""The bits of a digest that are compared: sums of 32-bit numbers over all ranks fit into an int64."""


class RankFlags(NamedTuple):
    """The report of one rank about a step, besides its losses."""

    stop: bool
    save: bool
    digest: int
    """Digest of the plan that it served the step from."""
    contents: tuple[str, ...] = ()
    """With `dataplane.audit`, the digest of every sequence that it handed out."""
    times: Mapping[str, float] = MappingProxyType({})
    """Seconds of each stage."""


class StepResult(NamedTuple):
    """The reports of all ranks about one step, reduced."""

    statistics: DomainStatistics
    stop: bool
    """True if any rank was asked to stop."""
    save: bool
    """True if any rank was asked to save."""
    reduce_s: float | None
    """Seconds that this rank waited for the reduction; 0 when it was complete in time. None without other ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _WaitingStep:
    """A finished step whose losses may be on their way from an accelerator."""

    step: int
    losses: StepLosses
    flags: RankFlags
    is_counted: bool
    """False for a step that was not finished: its losses are left out."""
    scalars: StepScalars | None

    @property
    def is_ready(self) -> bool:
        """True if its reduction can start without waiting for the accelerator."""
        if not self.is_counted:
            return True
        return self.losses.are_on_host and (self.scalars is None or self.scalars.are_on_host)


class StepReducer:
    """Reductions of consecutive steps, in order."""

    def __init__(
        self,
        comm: Communicator,
        num_domains: int,
        size_of_step: Callable[[int], int],
        batch_slice: BatchSlice,
        parts: PartLayout | None = None,
        loss_log: LossLog | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> None:
        """Reduce over a duplicate of `comm`. **Collective.**

        Args:
            comm: all ranks; also used by `wait_for`.
            num_domains: K.
            size_of_step: returns the sequences of a training step, over all groups of ranks.
            batch_slice: what this rank gets of every step; ranks of one group have equal ones.
            parts: which part of every sequence this rank records; None if ranks record whole sequences.
            loss_log: receives the mean loss of every sequence; None if nobody wants them.
            scales: of the scalars that may be recorded besides losses; see `core.measures.scalars`.
        """
        self._comm = comm
        # When ranks agree on a mismatch, they have started different numbers of reductions. On one communicator, their
        # collectives would not match.
        self._reductions = comm.Dup()
        self._num_domains = num_domains
        self._scales = scales or {}
        self._layout = BufferLayout(comm.size, num_domains, len(self._scales))
        self._size_of_step = size_of_step
        self._group = batch_slice.group
        # Sums of hashes tell how often each group recorded: unequal numbers of copies give another sum.
        hashes = [_hash_of(group) for group in range(batch_slice.num_groups)]
        self._group_hash = hashes[self._group]
        self._all_groups_hash = sum(hashes)
        # Weights that add up to 0 in a group, so that equal contents do: the leader's outweighs all others.
        num_peers = comm.size // len(hashes)
        self._content_weight = 1 - num_peers if batch_slice.is_group_leader else 1
        self._is_leader = batch_slice.is_group_leader
        self._parts = LossParts(parts) if parts is not None else None
        self._is_alone = comm.size == 1 and parts is None
        self._without_losses = ZeroStatistics(num_domains, self._scales)
        self._loss_log = loss_log
        self._waiting: deque[_WaitingStep] = deque()
        """Steps whose losses may be on their way from an accelerator, in order; the newest ones."""
        self._merging: deque[tuple[_WaitingStep, PendingParts]] = deque()
        """Steps whose parts are on their way, in order; their reductions start after those of `_running`."""
        self._running: deque[Reduction] = deque()
        self._results: list[StepResult] = []
        """Complete, and not returned yet."""
        self._mismatch: Reduction | None = None
        """The first step that ranks served from different plans, or recorded in part."""

    def post_losses(
        self, step: int, losses: StepLosses, flags: RankFlags, *, is_counted: bool, scalars: StepScalars | None = None
    ) -> None:
        """Start the reduction of `step`, or first that of its parts. Every rank starts those of all steps, in order.

        If the losses are still on their way from an accelerator, it starts later: in `advance`, or when a step is
        waited for. So the trainer's thread does not wait for the device when it asks for the next batch.

        Args:
            step: the training step after the one of the previous call.
            losses: what this rank recorded.
            flags: what this rank reports about the step.
            is_counted: False for a step that was not finished: its losses are left out.
            scalars: this rank's scalars. If ranks record parts of sequences, those of the group's leader count.
        """
        if self._is_alone and not (is_counted and losses.has_losses) and not (self._waiting or self._running):
            self._complete_alone(step, flags)
            return
        self._waiting.append(
            _WaitingStep(step=step, losses=losses, flags=flags, is_counted=is_counted, scalars=scalars)
        )
        self.advance()

    def _complete_alone(self, step: int, flags: RankFlags) -> None:
        """Complete a step without losses on the only rank: there is nothing to add up, and nothing to compare."""
        statistics = self._without_losses.of_step(step, times_alone(flags.times))
        self._results.append(StepResult(statistics=statistics, stop=flags.stop, save=flags.save, reduce_s=None))

    def _post_waiting(self) -> None:
        """Start the reduction of the oldest step that waits for its losses; wait for the device."""
        waiting = self._waiting.popleft()
        losses = waiting.losses
        if self._parts is not None:
            self._merging.append((waiting, self._parts.start(losses, waiting.is_counted)))
            return
        self.post(waiting.step, self._contribution_of(waiting), waiting.flags)
        if self._loss_log and waiting.is_counted and losses.has_losses:
            self._loss_log.write(waiting.step, losses.positions, losses.means())

    def _contribution_of(self, waiting: _WaitingStep) -> StepContribution:
        """Return what this rank recorded of a step, where ranks record whole sequences."""
        losses = waiting.losses
        if not waiting.is_counted or not (self._scales or losses.has_losses):
            return StepContribution()
        scalars = self._scalar_rows(waiting)
        rows = np.concatenate([losses.total(), scalars])
        if not losses.has_losses:
            return StepContribution(rows=rows)
        checks = checks_of(scalars) if self._scales else None
        return StepContribution(rows=rows, num_padding=losses.num_padding, checks=checks)

    def _scalar_rows(self, waiting: _WaitingStep) -> Ints:
        """Return the sums of this rank's scalars of a step; shape (ROWS_PER_SCALAR × number of scalars, K)."""
        if waiting.scalars is None or not waiting.is_counted:
            return np.zeros((ROWS_PER_SCALAR * len(self._scales), self._num_domains), np.int64)
        return waiting.scalars.rows(self._num_domains)

    def advance(self) -> None:
        """Start the reductions of the steps whose losses are here and have met. Does not block; not collective."""
        while self._waiting and self._waiting[0].is_ready:
            self._post_waiting()
        while self._merging and self._merging[0][1].request.Test():
            self._post_merged()

    def post(self, step: int, contribution: StepContribution, flags: RankFlags) -> None:
        """Start the reduction of `step`. Every rank starts those of all steps, in order, at a time of its own.

        Args:
            step: the training step after the one of the previous call.
            contribution: what this rank recorded.
            flags: what this rank reports about the step.
        """
        content = _digest_of(flags.contents) * self._content_weight if flags.contents else 0
        buffer_flags = BufferFlags(
            stop=flags.stop,
            save=flags.save,
            is_partial=contribution.is_partial,
            content=content,
            num_padding=contribution.num_padding,
            vote=self._group_hash if contribution.has_sequences else 0,
            digest=flags.digest & DIGEST_MASK,
        )
        buffer = self._layout.fill(self._comm.rank, pack_times(flags.times), contribution, buffer_flags)
        # MPI owns both arrays until the request is complete; the entry keeps them alive.
        result = np.empty_like(buffer)
        request = self._reductions.Iallreduce(buffer, result)
        self._running.append(Reduction(step, buffer, result, request, contribution, flags.contents))

    def poll(self) -> list[StepResult]:
        """Return the results that have become complete since the last call, in order."""
        self.advance()
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
            raise_mismatch(self._comm, self._group, self._mismatch)
        return self._take_results()

    def drain(self) -> list[StepResult]:
        """Return the same as `poll`, after waiting for all reductions, without checking them. **Collective.**"""
        steps = [r.step for r in self._running] + [w.step for w, _ in self._merging] + [w.step for w in self._waiting]
        if steps:
            self._complete_to(steps[-1])
        return self._take_results()

    def _post_merged(self) -> None:
        """Start the reduction of the oldest step whose parts have met."""
        waiting, pending = self._merging.popleft()
        losses = pending.merge()
        contribution = StepContribution(
            is_partial=losses.is_partial, num_recorded=waiting.losses.num_recorded_tokens if losses.is_partial else 0
        )
        # All ranks of the group have the same sums; one of them contributes.
        if self._is_leader:
            rows = np.concatenate([losses.rows, self._scalar_rows(waiting)])
            contribution = replace(contribution, rows=rows, num_padding=losses.num_padding)
        self.post(waiting.step, contribution, waiting.flags)
        if self._loss_log and self._is_leader and losses.means is not None:
            self._loss_log.write(waiting.step, pending.positions, losses.means)

    def _complete_to(self, step: int) -> None:
        while self._waiting and self._waiting[0].step <= step:
            self._post_waiting()
        while self._merging and self._merging[0][0].step <= step:
            wait(self._merging[0][1].request)
            self._post_merged()
        while self._running and self._running[0].step <= step:
            # Time spent here means that the network, or another rank, is slower than a step.
            began = time.perf_counter()
            wait(self._running[0].request)
            self._complete_first(reduce_s=time.perf_counter() - began)

    def _take_results(self) -> list[StepResult]:
        results, self._results = self._results, []
        return results

    def _complete_first(self, reduce_s: float) -> None:
        """Move the oldest reduction to the results."""
        reduction = self._running.popleft()
        num_ranks = self._comm.size
        rows = self._layout.rows(reduction.result)
        sums = BufferFlags.of(reduction.result)

        # Equal digests add up to a multiple of this rank's own.
        differs = sums.digest != num_ranks * BufferFlags.of(reduction.buffer).digest
        # Every group must have recorded the same number of copies; of equal copies one is the quotient.
        num_sequences = int(rows[2].sum()) + sums.num_padding
        global_batch_size = self._size_of_step(reduction.step)
        num_copies = max(num_sequences // global_batch_size, 1)
        is_partial = num_sequences > 0 and (
            num_sequences != num_copies * global_batch_size or sums.vote != num_copies * self._all_groups_hash
        )
        stages = maxima_of(self._layout.packed_times(reduction.result)) if self._comm.rank == 0 else None
        if num_sequences == 0 and not self._scales:
            statistics = self._without_losses.of_step(reduction.step, stages)
        else:
            statistics = statistics_from_buffer(reduction.step, rows // num_copies, self._scales, stages)
        checks = self._layout.checks(reduction.result)
        reduction.has_other_scalars = not is_partial and bool((checks % num_copies).any())
        is_wrong = differs or is_partial or sums.is_partial or sums.content or reduction.has_other_scalars
        if is_wrong and self._mismatch is None:
            self._mismatch = reduction

        waited_s = reduce_s if num_ranks > 1 else None
        result = StepResult(statistics=statistics, stop=sums.stop > 0, save=sums.save > 0, reduce_s=waited_s)
        self._results.append(result)


def _digest_of(contents: tuple[str, ...]) -> int:
    """Return 32 bits that depend on the digests of all sequences."""
    return int.from_bytes(hashlib.blake2b("".join(contents).encode(), digest_size=4).digest(), "little")


def _hash_of(group: int) -> int:
    return int.from_bytes(hashlib.blake2b(group.to_bytes(8, "little"), digest_size=4).digest(), "little")
