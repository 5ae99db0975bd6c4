"""The journal of a run, read back: the attempts, and the plan that each step was served from in the end."""

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixtera_hpc.core.chunk_plan import ChunkPlan
from mixtera_hpc.core.slots.batch_schedule import BatchSchedule
from mixtera_hpc.dataplane.recording.journal import FORK_KIND, read_lines
from mixtera_hpc.dataplane.resume.stream_version import StreamVersion
from mixtera_hpc.errors import DataError

__all__ = ["AttemptRecord", "History"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """Plans of one attempt, as the journal has them."""

    number: int
    first_step: int
    num_ranks: int
    model_parallel_size: int
    data_parallel_ranks: Sequence[int] | None
    """See `AttemptSetup`."""
    identity: Mapping[str, Any]
    """Identity of the source that it served from."""
    stream_version: StreamVersion
    plans: list[ChunkPlan]
    """In order of chunks."""
    next_step: int | None
    """One past the last step that it consumed; None when it did not end in order."""

    @property
    def batch_schedule(self) -> BatchSchedule:
        """Sequences of every data step."""
        return BatchSchedule.ramp(self.identity["global_batch_size"], self.identity["batch_schedule"])

    def batch_size_of(self, step: int) -> int:
        """Return the sequences of training step `step`."""
        return self.batch_schedule.size_at(self.stream_version.data_step(step))

    @property
    def end(self) -> int:
        """One past the last training step that it planned."""
        ends = (plan.first_step + plan.num_steps for plan in self.plans)
        return max((self.stream_version.step_at(end) for end in ends), default=self.first_step)

    @property
    def served_end(self) -> int:
        """One past the last training step that it served; of an attempt without a `close` line, that it planned."""
        return self.end if self.next_step is None else self.next_step

    def rank_of(self, step: int, position: int) -> int:
        """Return the rank (the leader of its model-parallel group) that was given `position` of `step`."""
        num_groups = self.num_ranks // self.model_parallel_size
        # Groups take consecutive parts of the global batch, see `BatchSlice`.
        group = position // (self.batch_size_of(step) // num_groups)
        if self.data_parallel_ranks is not None:
            return self.data_parallel_ranks.index(group)
        return group * self.model_parallel_size

    def leader_of(self, rank: int) -> int:
        """Return the first rank that was given the same batches as `rank`."""
        if self.data_parallel_ranks is not None:
            return self.data_parallel_ranks.index(self.data_parallel_ranks[rank])
        return rank // self.model_parallel_size * self.model_parallel_size

    def plan_of(self, step: int) -> ChunkPlan:
        """Return the plan that training step `step` was served from.

        Raises:
            DataError: the step has not been planned.
        """
        plan = self._find_plan(step)
        if plan is None:
            raise DataError(
                f"The journal has no plan of step {step}; its last plan ends before step {self.end}.\n"
                "  If the step was served, the journal has lost lines: restore the file."
            )
        return plan

    def has_plan_of(self, step: int) -> bool:
        """Return whether the journal has the plan of training step `step`."""
        return self._find_plan(step) is not None

    def _find_plan(self, step: int) -> ChunkPlan | None:
        data_step = self.stream_version.data_step(step)
        # Plans are in order of steps: the candidate is the last one that begins at or before the step.
        position = bisect.bisect_right(self.plans, data_step, key=lambda plan: plan.first_step) - 1
        if position < 0:
            return None
        plan = self.plans[position]
        return plan if data_step < plan.first_step + plan.num_steps else None


class History:
    """The journal of a run, read back: which plan each step was served from in the end."""

    def __init__(self, path: Path) -> None:
        """Read the journal at `path`.

        Raises:
            DataError: the journal does not exist, or the line that begins an attempt is lost.
        """
        if not path.is_file():
            raise DataError(f"{path} does not exist: this run has planned nothing yet.")
        self.attempts: list[AttemptRecord] = []
        self.damaged_lines: list[int] = []
        """Numbers of lines that cannot be read. What they planned is unknown; everything else is not affected."""
        self._path = path
        # A run of a million chunks has a million lines; they are parsed once.
        for record in read_lines(path, self.damaged_lines):
            try:
                self._add(record)
            except (KeyError, TypeError, ValueError, IndexError):
                raise DataError(f"{path} has a line that is no record: {record!r:.80}.\n  Restore the file.") from None

    def attempt_of(self, step: int) -> AttemptRecord:
        """Return the last attempt that began at or before `step`: what it served counts.

        Raises:
            DataError: no attempt began there.
        """
        # Attempts are in order of time: a later one replaces what earlier ones served from its first step on.
        covering = [attempt for attempt in self.attempts if attempt.first_step <= step]
        if not covering:
            raise DataError(f"Step {step} was planned by no attempt.")
        return covering[-1]

    def plan_of(self, step: int) -> ChunkPlan:
        """Return the plan that training step `step` was served from.

        Raises:
            DataError: the step has not been planned.
        """
        return self.attempt_of(step).plan_of(step)

    @property
    def end(self) -> int:
        """One past the last step of the run: served, or, if the last attempt was killed or is running, planned."""
        return self.attempts[-1].served_end if self.attempts else 0

    def extents(self) -> list[tuple[AttemptRecord, range]]:
        """Return every attempt with the steps of it that count, in order, without attempts of which none count."""
        extents = []
        stop = self.end
        for attempt in reversed(self.attempts):
            # An attempt replaces everything that earlier ones served from its first step on.
            steps = range(attempt.first_step, min(attempt.served_end, stop))
            stop = min(stop, attempt.first_step)
            if len(steps):
                extents.append((attempt, steps))
        return extents[::-1]

    def _add(self, record: dict[str, Any]) -> None:
        if record["kind"] == "open":
            self.attempts.append(_parse_attempt(record))
            return
        if record["kind"] == FORK_KIND:
            self._cut(record["step"])
            return
        number = record.get("attempt")
        if number is not None and (not self.attempts or self.attempts[-1].number != number):
            lost = f"line {self.damaged_lines[-1]}" if self.damaged_lines else "the line"
            raise DataError(
                f"{self._path} has lost {lost}, which began attempt {number}: nothing is known of its steps.\n"
                "  Restore the file."
            )
        if record["kind"] == "chunk":
            self.attempts[-1].plans.append(_parse_plan(record))
        elif record["kind"] == "close":
            # Records are frozen, and an attempt is complete only with its last line.
            self.attempts[-1] = dataclasses.replace(self.attempts[-1], next_step=record["next_step"])

    def _cut(self, step: int) -> None:
        """Forget what the parent of a forked run served from `step` on."""
        self.attempts = [attempt for attempt in self.attempts if attempt.first_step < step]
        if self.attempts:
            last = self.attempts[-1]
            self.attempts[-1] = dataclasses.replace(last, next_step=min(last.served_end, step))


def _parse_attempt(record: dict[str, Any]) -> AttemptRecord:
    return AttemptRecord(
        number=record["attempt"],
        first_step=record["first_step"],
        num_ranks=record["num_ranks"],
        model_parallel_size=record["model_parallel_size"],
        data_parallel_ranks=record["data_parallel_ranks"],
        identity=record["identity"],
        stream_version=StreamVersion.from_dict(record["stream_version"]),
        plans=[],
        next_step=None,
    )


def _parse_plan(record: dict[str, Any]) -> ChunkPlan:
    plan = ChunkPlan(
        chunk=record["chunk"],
        first_step=record["first_step"],
        num_steps=record["num_steps"],
        last=record["last"],
        cursors=np.array(record["cursors"], np.int64),
        lags=np.array(record["lags"], np.int64),
        weights=np.array(record["weights"], np.int64),
    )
    # The digest covers every number of the plan, so that an edited or damaged line is noticed.
    if plan.digest != record["digest"]:
        raise DataError(f"The journal's chunk {plan.chunk} is damaged: its digest does not match.")
    return plan
