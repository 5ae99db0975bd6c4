"""Find the first step and position at which two runs were served different data, and why.

Chunks with equal plans over equal streams are compared by their digests. Documents are looked up only where streams
differ, from the first such step on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from mixtera_hpc.core.chunk_plan import ChunkPlan
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.step_sequences import slots_of_plan
from mixtera_hpc.dataplane.recording.run_history import AttemptRecord
from mixtera_hpc.trace.list import served_sequences
from mixtera_hpc.trace.served_run import Record, ServedRun

__all__ = ["RunDifference", "first_difference"]

PLANNING_FIELDS = frozenset(
    ["global_batch_size", "batch_schedule", "last_batch", "chunk_steps", "feedback_lag", "on_exhausted", "max_epochs"]
)
"""Fields of an identity that do not change the streams."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDifference:
    """The result of `first_difference`."""

    num_same_steps: int
    """Steps from the first on that both runs were served alike."""
    step: int | None
    """The first step that differs; None if all steps that both runs have are the same."""
    position: int | None
    first: Mapping[str, Any] | None
    """The sequence of the first run at that position; None if its global batch is smaller."""
    second: Mapping[str, Any] | None
    """The sequence of the second run at that position; None if its global batch is smaller."""
    causes: list[str]
    """Settings, skipped steps or weights that differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _StepOrigin:
    """Origin of a step that one run served."""

    attempt: AttemptRecord
    plan: ChunkPlan
    source: Source
    step: int

    @property
    def plan_end(self) -> int:
        """One past the last step served from the plan."""
        return self.source.stream_version.step_at(self.plan.first_step + self.plan.num_steps)

    def slots(self) -> list[tuple[int, int]]:
        """Return (domain, ordinal) of every sequence of the step."""
        slots = slots_of_plan(self.source, self.plan)
        data_step = self.source.stream_version.data_step(self.step)
        schedule = self.source.planner.batch_schedule
        first = schedule.slots(self.plan.first_step, data_step)
        of_step = slice(first, first + schedule.size_at(data_step))
        return list(zip(slots.domain[of_step].tolist(), slots.ordinal[of_step].tolist(), strict=True))

    def records(self) -> list[Record]:
        """Return the sequences of the step."""
        return list(served_sequences(self.source, self.attempt, range(self.step, self.step + 1)))


def first_difference(a: ServedRun, b: ServedRun) -> RunDifference:
    """Return the first difference between two runs."""
    end = min(a.history.end, b.history.end)
    step = 0
    while step < end:
        origin_a = _origin_of(a, step)
        origin_b = _origin_of(b, step)
        if _is_same_chunk(origin_a, origin_b):
            # Everything up to the end of the chunk is the same, unless another attempt continues inside it.
            step = min(origin_a.plan_end, _next_attempt(a, step, end), _next_attempt(b, step, end))
            continue
        # Equal slots over equal streams are equal documents, so most steps need no look-up.
        if not (_has_same_streams(origin_a, origin_b) and origin_a.slots() == origin_b.slots()):
            difference = _difference_in_step(origin_a, origin_b)
            if difference is not None:
                return difference
        step += 1
    return RunDifference(num_same_steps=end, step=None, position=None, first=None, second=None, causes=[])


def _origin_of(run: ServedRun, step: int) -> _StepOrigin:
    attempt = run.history.attempt_of(step)
    return _StepOrigin(attempt=attempt, plan=attempt.plan_of(step), source=run.source_of(attempt), step=step)


def _next_attempt(run: ServedRun, step: int, end: int) -> int:
    """Return the next step after `step` that another attempt may have served, or `end`."""
    return min([attempt.first_step for attempt in run.history.attempts if attempt.first_step > step] + [end])


def _is_same_chunk(a: _StepOrigin, b: _StepOrigin) -> bool:
    """Return True if the rest of both chunks is served alike."""
    return (
        _has_same_streams(a, b)
        and a.plan.digest == b.plan.digest
        and a.attempt.stream_version.skips == b.attempt.stream_version.skips
        and a.attempt.batch_schedule == b.attempt.batch_schedule
    )


def _has_same_streams(a: _StepOrigin, b: _StepOrigin) -> bool:
    """Return True if equal slots mean equal documents."""
    before = a.attempt.identity
    after = b.attempt.identity
    names = (before.keys() | after.keys()) - PLANNING_FIELDS
    if any(before.get(name) != after.get(name) for name in names):
        return False
    return a.attempt.stream_version.has_streams_of(b.attempt.stream_version)


def _difference_in_step(a: _StepOrigin, b: _StepOrigin) -> RunDifference | None:
    """Compare the documents of one step; return the first difference, None if there is none."""
    # With another batch size one side has more positions; the other has None there.
    for position, (one, other) in enumerate(zip_longest(a.records(), b.records())):
        if one is None or other is None or one["segments"] != other["segments"]:
            return RunDifference(
                num_same_steps=a.step, step=a.step, position=position, first=one, second=other, causes=_causes(a, b)
            )
    return None


def _causes(a: _StepOrigin, b: _StepOrigin) -> list[str]:
    """Return the settings, skipped steps and weights that differ."""
    before = a.attempt.identity
    after = b.attempt.identity
    causes = [
        f"{name}: {value!r} and {after.get(name)!r}" for name, value in before.items() if value != after.get(name)
    ]
    skips_a = a.attempt.stream_version.skips
    skips_b = b.attempt.stream_version.skips
    if skips_a != skips_b:
        causes.append(f"skipped data steps: {list(skips_a)} and {list(skips_b)}")

    weights_a = a.plan.weights
    weights_b = b.plan.weights
    if len(weights_a) == len(weights_b) and not np.array_equal(weights_a, weights_b):
        most = int(np.argmax(np.abs(weights_a - weights_b)))
        share_a = weights_a[most] / weights_a.sum()
        share_b = weights_b[most] / weights_b.sum()
        causes.append(f"weights: most for {a.source.names[most]}, {share_a:.6f} and {share_b:.6f}")
    # Same settings and weights, but other positions: the weights differed before.
    if not causes and not np.array_equal(a.plan.cursors, b.plan.cursors):
        causes.append("weights of an earlier chunk")
    return causes
