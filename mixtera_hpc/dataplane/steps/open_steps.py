"""The steps whose batches were handed to the trainer and are not finished.

A trainer may hold several batches. A step is finished when all its sequences were recorded, or when `finish` names it.
Steps finish in order: a finished step also finishes the unrecorded steps before it. A loop that never calls `record` or
`finish` finishes a batch by asking for the next one. Which kind of loop it is shows in its first steps, so this rank
decides after `MAX_UNDECIDED` batches. Price: the loss mask and the domain ids of every open batch.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mixtera_hpc.config.schema import DataPlaneConfig
from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.dataplane.steps.reduction.step_reducer import RankFlags
from mixtera_hpc.dataplane.steps.step_losses import StepLosses
from mixtera_hpc.dataplane.steps.step_scalars import StepScalars
from mixtera_hpc.errors import ConfigError

__all__ = ["OpenStep", "OpenSteps", "RecordedPart", "unknown_progress_error"]

MAX_UNDECIDED = 16
"""A trainer that holds more batches before its first `record` or `finish` is taken for one that calls neither."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedPart:
    """The arguments of a call of `DataPlane.record` besides the losses; see there."""

    rows: slice
    tokens: slice | None
    num_tokens: Any
    scalars: Mapping[str, Any] | None


class OpenStep:
    """One step that is not finished on this rank, or finished and not reduced yet."""

    def __init__(
        self, batch: Batch, num_domains: int, num_parts: int, scales: Mapping[str, float], times: Mapping[str, float]
    ) -> None:
        """Begin without losses."""
        self.number = batch.step
        self.plan_digest = batch.plan_digest
        self.contents = tuple(batch.digests or ())
        self.times = times
        """Seconds of each stage on this rank."""
        self.losses = StepLosses(batch, num_domains, num_parts)
        self.scalars = StepScalars(scales, batch.domain_ids)
        self.was_finished_by_name = False

    @property
    def is_finished(self) -> bool:
        """True if all sequences were recorded, or the trainer called `finish`."""
        return self.was_finished_by_name or self.losses.are_complete

    def flags(self, stop: bool, save: bool) -> RankFlags:
        """Return what this rank reports about the step besides its losses."""
        return RankFlags(stop=stop, save=save, digest=self.plan_digest, contents=self.contents, times=self.times)


class OpenSteps:
    """The open steps of one rank, in order."""

    def __init__(
        self, num_domains: int, max_unfinished: int, num_parts: int = 1, scales: Mapping[str, float] | None = None
    ) -> None:
        """Begin without open steps.

        Args:
            num_domains: K.
            max_unfinished: number of batches that a trainer may hold.
            num_parts: into how many parts the ranks of a group cut the losses of every sequence.
            scales: of the scalars that may be recorded besides losses; see `core.measures.scalars`.
        """
        self._num_domains = num_domains
        self._num_parts = num_parts
        self._scales = scales or {}
        self._steps: deque[OpenStep] = deque()
        self.max_undecided = min(max_unfinished, MAX_UNDECIDED)
        """Batches handed out before this rank decides whether its trainer says when a step is finished."""
        self.names_steps = False
        """True if this rank's trainer calls `record` or `finish`."""
        self._finishes_by_request = False
        self.look_ahead = 0
        """Most batches that were unfinished when this rank asked for another one."""

    def __len__(self) -> int:
        """Return the number of open steps."""
        return len(self._steps)

    def add(self, batch: Batch, times: Mapping[str, float]) -> None:
        """Record that `batch` was handed to the trainer, and the seconds that each stage of it took."""
        self._steps.append(OpenStep(batch, self._num_domains, self._num_parts, self._scales, times))

    def named(self, step: int, caller: str) -> OpenStep:
        """Return an open step that the trainer names.

        Raises:
            ValueError: the step is finished, or its batch was not handed out.
        """
        for candidate in self._steps:
            if candidate.number == step:
                self.names_steps = True
                return candidate
        numbers = [candidate.number for candidate in self._steps]
        raise ValueError(
            f"{caller}() was given step {step}, which is finished or was not handed out; open steps: {numbers}.\n"
            "  A step finishes when all its sequences were recorded, when a later step finishes, or with finish(). A "
            f"trainer that holds more than {self.max_undecided} batches must call finish() or record() before that."
        )

    def finished_end(self, next_step: int) -> int:
        """Return one past the last finished step; `next_step` is that of the next batch."""
        for candidate in reversed(self._steps):
            if candidate.is_finished:
                return candidate.number + 1
        return self._steps[0].number if self._steps else next_step

    def end_at_request(self, next_step: int) -> int:
        """Return one past the last step that is finished when the trainer asks for the batch of `next_step`."""
        if self.names_steps:
            return self.finished_end(next_step)
        # So many batches without a word: this trainer will not say when a step is finished.
        if len(self._steps) > self.max_undecided:
            self._finishes_by_request = True
            self.look_ahead = 0
        return next_step if self._finishes_by_request else self.finished_end(next_step)

    def take_before(self, end: int) -> Iterator[OpenStep]:
        """Remove and yield the open steps before `end`, in order."""
        while self._steps and self._steps[0].number < end:
            yield self._steps.popleft()

    def note_request(self, plane: DataPlaneConfig, limit: int) -> None:
        """Record how many batches are unfinished while another one is asked for.

        Raises:
            ValueError: they are more than `limit`.
        """
        if len(self._steps) > limit:
            raise _too_many_unfinished_error(plane, len(self._steps), limit)
        self.look_ahead = max(self.look_ahead, len(self._steps))


def unknown_progress_error() -> ConfigError:
    """Return the error of a state that is asked for while nobody has said which steps are finished."""
    return ConfigError(
        "The state was asked for, but the data plane does not know which batches the trainer has finished: a loader "
        "may have fetched some ahead.\n  Call plane.record(batch, loss) or plane.finish(batch) after every step."
    )


def _too_many_unfinished_error(plane: DataPlaneConfig, num_unfinished: int, limit: int) -> ValueError:
    return ValueError(
        f"The trainer asked for another batch while {num_unfinished} batches are not finished. "
        f"dataplane.feedback_lag={plane.feedback_lag} and dataplane.chunk_steps={plane.chunk_steps} allow {limit}: "
        "(feedback_lag - 1) × chunk_steps.\n"
        "  Call record() or finish() for every batch. If the trainer prefetches that many batches, lower its "
        "prefetch setting, or raise one of the two keys."
    )
