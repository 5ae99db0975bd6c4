"""Requests that each rank received, on their way to all ranks: with the reductions of steps, or directly at the start.

The reduction of a step carries the requests that its rank has seen. A rank can wait for a reduction only when all ranks
have started it, which depends on how many batches their trainers hold. This is not known before a trainer has finished
its first steps. Until then, a question about requests costs one small all-reduce; the first question after that agrees
on the look-ahead, and later ones cost nothing.
"""

import numpy as np

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.dataplane.control import RunControl
from mixtera_hpc.dataplane.steps.ready_agreement import OpenRequests
from mixtera_hpc.dataplane.steps.reduction.step_reducer import StepResult

__all__ = ["AgreedRequests", "FlagExchange"]


class AgreedRequests:
    """Requests that any rank received, as all ranks know them from the results of steps.

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

    def interrupt(self, step: int, *, stop: bool, save: bool) -> None:
        """Take requests that end a wait of all ranks, in place of earlier requests to save."""
        self._saves.clear()
        self.add_flags(step, stop=stop, save=save)

    def stop_by(self, step: int) -> bool:
        """Return whether a stop was requested up to training step `step`."""
        return self._first_stop is not None and self._first_stop <= step

    def take_save_by(self, step: int) -> bool:
        """Return whether a save was requested up to `step` and not returned before."""
        due = {requested for requested in self._saves if requested <= step}
        self._saves -= due
        return bool(due)


class FlagExchange:
    """The requests that one rank has seen and not passed on."""

    def __init__(self, comm: Communicator, control: RunControl, early_end: int) -> None:
        """Begin without requests.

        Args:
            comm: all ranks.
            control: what this rank was asked to do.
            early_end: the first step that belongs to the time when the look-ahead is known.
        """
        self._comm = comm
        self._control = control
        self._early_end = early_end
        self._polled_step = -1
        self._by_step: dict[int, tuple[bool, bool]] = {}
        """Step → whether to stop, and whether to save, for its reduction."""
        self._early_stop = False
        self._early_save = False
        self._late_save = False
        """True if a request to save was seen during the wait for the next batch."""
        self._has_open_save = False
        """True if a save was requested on this rank and not answered."""
        self._look_ahead: int | None = None

    def are_early(self, step: int) -> bool:
        """Return whether requests seen during `step` are exchanged directly."""
        return step < self._early_end

    def poll(self, step: int) -> None:
        """Look for requests, once per step: during `step`, the newest one that was handed out."""
        if step <= self._polled_step:
            return
        self._polled_step = step
        stop, save = self._control.poll()
        save |= self._late_save
        self._late_save = False
        self._has_open_save |= save
        if self.are_early(step) and self._look_ahead is None:
            self._early_stop |= stop
            self._early_save |= save
        else:
            self._by_step[step] = (stop, save)

    def poll_waiting(self) -> OpenRequests:
        """Look for requests while the next batch is waited for, and return those that are not answered."""
        stop, save = self._control.poll()
        self._late_save |= save
        self._has_open_save |= save
        return OpenRequests(stop=stop, save=self._has_open_save)

    def note_saved(self) -> None:
        """Record that all ranks save, for requests that were passed on."""
        self._has_open_save = any(save for _, save in self._by_step.values())

    def answer_saves(self) -> None:
        """Record that all ranks save now, also for requests that were not passed on."""
        self._late_save = self._early_save = self._has_open_save = False
        self._by_step = {step: (stop, False) for step, (stop, _) in self._by_step.items()}

    def take(self, step: int) -> tuple[bool, bool]:
        """Return whether to stop, and whether to save, for the reduction of `step`."""
        return self._by_step.pop(step, (False, False))

    def exchange_early(self, requests: AgreedRequests, step: int) -> None:
        """Add to `requests`, as those of `step`, what any rank has seen. **Collective.**"""
        own = np.array([self._early_stop, self._early_save], np.int64)
        stop, save = self._comm.Allreduce(own, "max").tolist()
        self._early_save = False
        requests.add_flags(step, stop=bool(stop), save=bool(save))

    def agreed_look_ahead(self, own: int, requests: AgreedRequests, step: int) -> int:
        """Return the largest look-ahead of any rank at the first call. **Collective.**

        The first call also does what `exchange_early` does.
        """
        if self._look_ahead is None:
            self.exchange_early(requests, step)
            self._look_ahead = int(self._comm.Allreduce(np.array([own], np.int64), "max")[0])
        return self._look_ahead
