"""The steps of a trainer on one rank: which it holds, which it has finished, and what all ranks agree on about them.

The reduction of a step starts when its trainer has finished it. It carries the losses, and the requests to stop or save
that this rank has seen. All ranks agree on a step by its number; `step_ledger` has the neighbouring steps.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mixtera_hpc.dataplane.reading.batches import Batch, positions_of, step_of
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.resources import PlaneResources
from mixtera_hpc.dataplane.step_results import StepResults
from mixtera_hpc.dataplane.steps.flag_exchange import FlagExchange
from mixtera_hpc.dataplane.steps.open_steps import OpenSteps, RecordedPart, unknown_progress_error
from mixtera_hpc.dataplane.steps.ready_agreement import OpenRequests
from mixtera_hpc.dataplane.steps.reduction.step_reducer import StepReducer
from mixtera_hpc.dataplane.steps.step_ledger import StepLedger

__all__ = ["TrainerSteps"]

NAMES_NO_STEPS = int(np.iinfo(np.int64).max)
"""Stands for the last finished step of a rank whose trainer names no steps; larger than every step."""


class TrainerSteps:
    """The steps of one rank from the hand-out of their batches to the start of their reductions."""

    def __init__(self, resources: PlaneResources, source: Source, ledger: StepLedger, results: StepResults) -> None:
        """Begin at the next step of `ledger`. **Collective.**

        Args:
            resources: ranks, requests and records.
            source: what is served.
            ledger: counts the steps that were served.
            results: gets the results of the reductions.
        """
        plane = source.config.dataplane
        parts = resources.parts
        self._comm = resources.comm
        self._plane = plane
        self._ledger = ledger
        self._results = results
        self._first_step = ledger.next_step
        self.max_unfinished = (plane.feedback_lag - 1) * plane.chunk_steps
        """Batches that a trainer may hold: with more, the losses that the next plan needs could not arrive."""
        self._reducer = StepReducer(
            resources.comm,
            source.num_domains,
            source.batch_size_of,
            resources.batch_slice,
            parts,
            resources.recorder.loss_log,
            plane.scalars,
        )
        num_parts = 1 if parts is None else parts.num_parts
        self._open = OpenSteps(source.num_domains, self.max_unfinished, num_parts, plane.scalars)
        self.flags = FlagExchange(resources.comm, resources.control, self._first_step + self._open.max_undecided + 1)
        """Requests that this rank has seen."""
        self.is_read_by_loader = False
        """True if a loader may ask for batches ahead of the trainer."""

    @property
    def has_unfinished(self) -> bool:
        """True if the trainer holds batches that are not finished."""
        return len(self._open) > 0

    def add(self, batch: Batch, times: Mapping[str, float]) -> None:
        """Record that `batch` was handed to the trainer, and the seconds that each stage of it took."""
        self._open.add(batch, times)

    def record(self, batch: Batch | Mapping[str, Any], loss: Any, part: RecordedPart) -> None:
        """Add losses of an open step; see `DataPlane.record`."""
        step = self._open.named(step_of(batch), "record")
        rows = step.losses.rows_at(positions_of(batch), part.rows)
        # All or nothing: the caller may correct a refused call and repeat it.
        scalars = step.scalars.copies_of(part.scalars or {}, rows, step.number)
        step.losses.add(loss, rows, part.tokens, part.num_tokens)
        step.scalars.add(scalars, rows)
        self._reducer.advance()

    def finish(self, batch: Batch | Mapping[str, Any]) -> None:
        """Finish the step of a batch and those before it; see `DataPlane.finish`."""
        self._open.named(step_of(batch), "finish").was_finished_by_name = True

    def poll(self) -> None:
        """Pass on the results that have become complete; does not block."""
        self._results.add(self._reducer.poll())

    def reduce_at_request(self) -> None:
        """Reduce the steps that are finished when the trainer asks for another batch. **Collective.**

        Raises:
            ValueError: the trainer holds more than `max_unfinished` batches.
        """
        # Requests are looked for once per step, whether or not the trainer asks about them.
        self.flags.poll(self._ledger.current_step)
        self._start_reductions(self._open.end_at_request(self._ledger.next_step))
        self._open.note_request(self._plane, self.max_unfinished)
        # Every rank has at most so many unfinished batches here, and has started the reductions before them.
        self._wait_for(self._ledger.current_step - self.max_unfinished - 1)

    def reduce_finished(self, *, is_end: bool) -> int:
        """Agree on the last finished step, wait for its reduction, and return one past it. **Collective.**

        Ranks that call neither `record` nor `finish` have no say. If no rank calls them, every batch is finished.

        Raises:
            ConfigError: a loader reads the batches, and no rank has said which steps are finished. Not at the end.
        """
        handed_out = self._ledger.next_step
        own = self._open.finished_end(handed_out) if self._open.names_steps else NAMES_NO_STEPS
        agreed = int(self._comm.Allreduce(np.array([own], np.int64), "min")[0])
        if agreed == NAMES_NO_STEPS:
            if self.is_read_by_loader and not is_end and handed_out > self._first_step:
                raise unknown_progress_error()
            agreed = handed_out
        self.flags.poll(self._ledger.current_step)
        self._start_reductions(max(agreed, own) if self._open.names_steps else agreed)
        self._wait_for(agreed - 1)
        return agreed

    def complete(self) -> int:
        """Reduce everything that was handed out; return one past the last finished step. **Collective.**"""
        next_step = self.reduce_finished(is_end=True)
        # All ranks were handed the same batches. Their reductions must end, although nobody uses the results.
        self._start_reductions(self._ledger.next_step, unfinished_from=next_step)
        self._results.add(self._reducer.drain(), log_before=next_step)
        return next_step

    def stop_requested(self) -> bool:
        """Return whether a stop was requested, the same answer on all ranks. **Collective.**"""
        return self._results.requests.stop_by(self._agreed_step())

    def save_requested(self) -> bool:
        """Return whether a save was requested and not answered, the same answer on all ranks. **Collective.**"""
        is_due = self._results.requests.take_save_by(self._agreed_step())
        if is_due:
            self.flags.note_saved()
        return is_due

    def interrupt(self, requests: OpenRequests) -> None:
        """Take requests that have ended the wait of all ranks; those to save are answered now."""
        self._results.requests.interrupt(self._first_step, stop=requests.stop, save=requests.save)
        self.flags.answer_saves()

    def _agreed_step(self) -> int:
        """Return a step up to which all ranks know all requests; leave the current step open. **Collective.**

        Raises:
            ValueError: the trainer held more batches than before its first question about requests.
        """
        requests = self._results.requests
        if self.flags.are_early(self._ledger.current_step):
            self.flags.exchange_early(requests, self._first_step)
            return self._first_step
        look_ahead = self.flags.agreed_look_ahead(self._open.look_ahead, requests, self._first_step)
        if self._open.look_ahead > look_ahead:
            raise ValueError(
                f"The trainer held {self._open.look_ahead} unfinished batches when it asked for another one, but "
                f"at most {look_ahead} before its first stop_requested() or save_requested().\n"
                "  Finish the batches of a step before you ask about requests."
            )
        newest = self._ledger.last_common_step - look_ahead
        self._wait_for(newest)
        return max(newest, self._first_step)

    def _start_reductions(self, end: int, unfinished_from: int | None = None) -> None:
        """Start the reductions of the open steps before `end`; from `unfinished_from` on without their losses."""
        for step in self._open.take_before(end):
            stop, save = self.flags.take(step.number)
            is_counted = unfinished_from is None or step.number < unfinished_from
            flags = step.flags(stop, save)
            self._reducer.post_losses(step.number, step.losses, flags, is_counted=is_counted, scalars=step.scalars)

    def _wait_for(self, step: int) -> None:
        """Wait for the reductions up to that of `step`, and pass their results on. **Collective.**"""
        self._results.add(self._reducer.wait_for(step))
