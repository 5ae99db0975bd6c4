"""Where two runs part: the first step and position at which they were served different data, and why.

Chunks whose plans are the same over the same streams are compared by their digests; only where streams differ are the documents
themselves looked up, from the first step on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixtera_hpc.core.planner import ChunkPlan
from mixtera_hpc.dataplane.journal import AttemptRecord, History
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.trace.list import AttemptSources, served_sequences

__all__ = ["RunDifference", "first_difference"]

PLANNING = frozenset(["global_batch_size", "chunk_steps", "feedback_lag", "on_exhausted", "max_epochs"])
"""Fields of an identity that leave the streams as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDifference:
    """What `trace --diff` found."""

    num_same_steps: int
    """Steps from the first on that were served the same."""
    step: int | None
    """The first that was not; None when one run is the beginning of the other, or they are the same."""
    position: int | None
    first: Mapping[str, Any] | None
    """The sequence that the first run has there; None where its global batch has ended."""
    second: Mapping[str, Any] | None
    causes: list[str]
    """Settings, skipped steps or weights that differ."""


@dataclass(frozen=True, slots=True)
class _Side:
    sources: AttemptSources
    history: History

    def at(self, step: int) -> tuple[AttemptRecord, ChunkPlan, Source]:
        attempt = self.history.attempt_of(step)
        return attempt, attempt.plan_of(step), self.sources.of(attempt)


def first_difference(first: tuple[AttemptSources, History], second: tuple[AttemptSources, History]) -> RunDifference:
    """The first difference between two runs."""
    a, b = _Side(*first), _Side(*second)
    step, end = 0, min(a.history.end, b.history.end)
    while step < end:
        (attempt_a, plan_a, source_a), (attempt_b, plan_b, source_b) = a.at(step), b.at(step)
        if _same_streams(attempt_a, attempt_b):
            if plan_a.digest == plan_b.digest and _same_steps(attempt_a, attempt_b):
                step = min(
                    source_a.stream_version.step_at(plan_a.first_step + plan_a.num_steps),
                    _next_attempt(a, b, step, end),
                )
                continue
            if _slots(source_a, plan_a, step) == _slots(source_b, plan_b, step):
                step += 1
                continue
        for position, (one, two) in enumerate(
            _pairs(_records(source_a, attempt_a, step), _records(source_b, attempt_b, step))
        ):
            if one is None or two is None or one["pieces"] != two["pieces"]:
                causes = _causes((attempt_a, plan_a), (attempt_b, plan_b), source_a.names)
                return RunDifference(
                    num_same_steps=step, step=step, position=position, first=one, second=two, causes=causes
                )
        step += 1
    return RunDifference(num_same_steps=end, step=None, position=None, first=None, second=None, causes=[])


def _next_attempt(a: _Side, b: _Side, step: int, end: int) -> int:
    """The next step that another attempt of either run may serve."""
    later = [x.first_step for side in (a, b) for x in side.history.attempts if x.first_step > step]
    return min([*later, end])


def _same_streams(a: AttemptRecord, b: AttemptRecord) -> bool:
    names = (a.identity.keys() | b.identity.keys()) - PLANNING
    return all(a.identity.get(n) == b.identity.get(n) for n in names) and np.array_equal(
        a.stream_version.origins, b.stream_version.origins
    )


def _same_steps(a: AttemptRecord, b: AttemptRecord) -> bool:
    return a.stream_version.skips == b.stream_version.skips and a.global_batch_size == b.global_batch_size


def _slots(source: Source, plan: ChunkPlan, step: int) -> list[tuple[int, int]]:
    slots, size = source.planner.slots(plan), source.planner.global_batch_size
    first = (source.stream_version.data_step(step) - plan.first_step) * size
    mine = slice(first, first + size)
    return list(zip(slots.domain[mine].tolist(), slots.ordinal[mine].tolist(), strict=True))


def _records(source: Source, attempt: AttemptRecord, step: int) -> list[dict[str, Any]]:
    return list(served_sequences(source, attempt, range(step, step + 1)))


def _pairs(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> Iterator[tuple[Any, Any]]:
    for position in range(max(len(a), len(b))):
        yield (a[position] if position < len(a) else None, b[position] if position < len(b) else None)


def _causes(
    first: tuple[AttemptRecord, ChunkPlan], second: tuple[AttemptRecord, ChunkPlan], names: list[str]
) -> list[str]:
    (a, plan_a), (b, plan_b) = first, second
    fields = [n for n in a.identity if a.identity[n] != b.identity.get(n)]
    causes = [f"{name}: {a.identity[name]!r} and {b.identity.get(name)!r}" for name in fields]
    if a.stream_version.skips != b.stream_version.skips:
        causes.append(f"skipped data steps: {list(a.stream_version.skips)} and {list(b.stream_version.skips)}")
    if len(plan_a.weights) == len(plan_b.weights) and not np.array_equal(plan_a.weights, plan_b.weights):
        worst = int(np.argmax(np.abs(plan_a.weights - plan_b.weights)))
        shares = plan_a.weights[worst] / plan_a.weights.sum(), plan_b.weights[worst] / plan_b.weights.sum()
        causes.append(f"weights: most for {names[worst]}, {shares[0]:.6f} and {shares[1]:.6f}")
    if not causes and not np.array_equal(plan_a.cursors, plan_b.cursors):
        causes.append("weights of an earlier chunk")
    return causes
