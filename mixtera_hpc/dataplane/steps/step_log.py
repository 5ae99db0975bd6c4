"""Build the events of `steps.jsonl` from step timings and reduced loss statistics.

Timings are known at the end of a step. Losses arrive with the data plane's asynchronous reduction, one or two steps
later. The log keeps timings until their losses arrive, so the trainer neither waits for losses nor reduces them a
second time.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.statistics import STAGES, DomainStatistics, StageMaxima
from mixtera_hpc.track.event_types import StepEvent
from mixtera_hpc.track.tracker import Tracker

__all__ = ["StepLog", "StepTiming"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTiming:
    """Times that rank 0 measured for one step."""

    step: int
    step_s: float
    """Wall time of the step, including `data_wait_s`."""
    data_wait_s: float
    """Time spent waiting for the batch."""
    learning_rate: float | None = None
    """None if it is not known."""


class StepLog:
    """The pairs of timings and statistics that are not logged yet; logs one event per `log_every` steps."""

    def __init__(self, tracker: Tracker, *, num_ranks: int, log_every: int) -> None:
        self._tracker = tracker
        self._num_ranks = num_ranks
        self._log_every = log_every
        self._timings: dict[int, StepTiming] = {}
        """Timings of steps whose losses have not arrived, by step."""
        self._pending: list[tuple[StepTiming, DomainStatistics]] = []
        """Complete steps that are not logged yet."""

    def add_timing(self, timing: StepTiming) -> None:
        """Add the timing of a step that has just ended."""
        self._timings[timing.step] = timing

    def add_statistics(self, statistics: Iterable[DomainStatistics]) -> None:
        """Add the reduced losses of steps whose timing was added before, in step order."""
        for step_statistics in statistics:
            step = step_statistics.step
            self._pending.append((self._timings.pop(step), step_statistics))
            if (step + 1) % self._log_every == 0:
                self.flush()

    def flush(self) -> None:
        """Log all complete steps, even if their number is not a multiple of `log_every`."""
        if self._pending:
            self._tracker.log("steps", _step_event(self._pending, self._num_ranks))
            self._pending.clear()


def _step_event(steps: list[tuple[StepTiming, DomainStatistics]], num_ranks: int) -> StepEvent:
    """Combine consecutive steps into one event: losses weighted by tokens, timings averaged."""
    timings = [timing for timing, _ in steps]
    statistics = [step_statistics for _, step_statistics in steps]

    # Sums over the steps, per domain: shape (num_domains,).
    loss_sum = _sum(s.loss_sum for s in statistics)
    num_tokens = _sum(s.num_tokens for s in statistics)
    num_sequences = _sum(s.num_sequences for s in statistics)

    total_tokens = int(num_tokens.sum())
    mean_loss = float(loss_sum.sum()) / total_tokens if total_tokens else None
    duration_s = sum(timing.step_s for timing in timings)
    tokens_per_s = total_tokens / duration_s if duration_s else 0.0
    event: StepEvent = {
        "step": timings[-1].step,
        "num_steps": len(steps),
        "loss": mean_loss,
        "tokens": total_tokens,
        "tokens_per_s": tokens_per_s,
        "step_s": duration_s / len(steps),
        "data_wait_s": sum(timing.data_wait_s for timing in timings) / len(steps),
        "num_ranks": num_ranks,
        "num_nonfinite": int(_sum(s.num_nonfinite for s in statistics).sum()),
        "domain_loss": _mean_loss(loss_sum, num_tokens),
        "domain_tokens": num_tokens.tolist(),
        "domain_sequences": num_sequences.tolist(),
    }
    event |= _scalar_fields(statistics)
    if timings[-1].learning_rate is not None:
        event["learning_rate"] = timings[-1].learning_rate
    maxima = [s.stages for s in statistics if s.stages is not None]
    if maxima:
        event.update(_stage_fields(maxima))
    return event


def _stage_fields(maxima: list[StageMaxima]) -> StepEvent:
    """Combine the slowest rank of every stage in consecutive steps: mean, maximum, and the rank of that."""
    fields: StepEvent = {"stage_s": {}, "stage_max_s": {}, "stage_rank": {}}
    for stage in STAGES:
        in_steps = [of_step for of_step in maxima if stage in of_step.seconds]
        if not in_steps:
            continue
        slowest = max(in_steps, key=lambda of_step: of_step.seconds[stage])
        fields["stage_s"][stage] = _rounded(sum(of_step.seconds[stage] for of_step in in_steps) / len(maxima))
        fields["stage_max_s"][stage] = _rounded(slowest.seconds[stage])
        fields["stage_rank"][stage] = slowest.ranks[stage]
    return fields


def _rounded(seconds: float) -> float:
    """Return three digits: more are not known."""
    return float(f"{seconds:.3g}")


def _scalar_fields(statistics: list[DomainStatistics]) -> StepEvent:
    """Return the user's scalars: the mean of every domain, and how many values were out of range."""
    fields: dict[str, Any] = {}
    for name in statistics[0].scalars:
        scalars = [s.scalars[name] for s in statistics]
        total = _sum(s.total for s in scalars)
        count = _sum(s.count for s in scalars)
        fields[f"scalar_{name}"] = _mean_loss(total, count)
        fields[f"scalar_{name}_out_of_range"] = int(_sum(s.num_out_of_range for s in scalars).sum())
    return cast(StepEvent, fields)


def _sum(arrays: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """Return the sum of arrays of one shape; usually there is one, because every step is logged."""
    return functools.reduce(np.add, arrays)


def _mean_loss(loss_sum: NDArray[np.float64], num_tokens: NDArray[np.int64]) -> list[float | None]:
    """Return the mean loss of every domain; None for a domain without tokens."""
    pairs = zip(loss_sum.tolist(), num_tokens.tolist(), strict=True)
    return [loss / tokens if tokens else None for loss, tokens in pairs]
