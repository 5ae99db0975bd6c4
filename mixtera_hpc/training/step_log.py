"""Turns timings and reduced statistics into the events of `steps.jsonl`.

Timings are known at the end of a step; its losses arrive with the data plane's reduction, a step or two later. Neither waits for
the other, and nothing is reduced twice.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.track.event_types import StepEvent
from mixtera_hpc.track.tracker import Tracker

__all__ = ["StepLog", "StepTiming"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTiming:
    """What rank 0's clock says about a step."""

    step: int
    step_s: float
    data_wait_s: float
    learning_rate: float


class StepLog:
    """Pairs timings with statistics, in step order, and logs one event per `log_every` steps."""

    def __init__(self, tracker: Tracker, *, num_ranks: int, log_every: int) -> None:
        self._tracker = tracker
        self._num_ranks = num_ranks
        self._log_every = log_every
        self._timings: dict[int, StepTiming] = {}
        self._covered: list[tuple[StepTiming, DomainStatistics]] = []

    def timed(self, timing: StepTiming) -> None:
        """A step's work is done."""
        self._timings[timing.step] = timing

    def completed(self, statistics: Iterable[DomainStatistics]) -> None:
        """Statistics of steps that were timed before, in order."""
        for one in statistics:
            self._covered.append((self._timings.pop(one.step), one))
            if (one.step + 1) % self._log_every == 0:
                self.flush()

    def flush(self) -> None:
        """Log what is complete, even between two multiples of `log_every`."""
        if self._covered:
            self._tracker.log("steps", _event(self._covered, self._num_ranks))
            self._covered.clear()


def _event(covered: list[tuple[StepTiming, DomainStatistics]], num_ranks: int) -> StepEvent:
    timings, statistics = [t for t, _ in covered], [s for _, s in covered]
    loss_sum = np.sum([s.loss_sum for s in statistics], axis=0)
    num_tokens = np.sum([s.num_tokens for s in statistics], axis=0)
    total, duration = int(num_tokens.sum()), sum(t.step_s for t in timings)
    return {
        "step": timings[-1].step,
        "num_steps": len(covered),
        "loss": float(loss_sum.sum()) / total if total else None,
        "tokens": total,
        "tokens_per_s": total / duration if duration else 0.0,
        "step_s": duration / len(covered),
        "data_wait_s": sum(t.data_wait_s for t in timings) / len(covered),
        "learning_rate": timings[-1].learning_rate,
        "num_ranks": num_ranks,
        "num_nonfinite": int(np.sum([s.num_nonfinite for s in statistics])),
        "domain_loss": _means(loss_sum, num_tokens),
        "domain_tokens": num_tokens.tolist(),
        "domain_sequences": np.sum([s.num_sequences for s in statistics], axis=0).tolist(),
    }


def _means(loss_sum: NDArray[np.float64], num_tokens: NDArray[np.int64]) -> list[float | None]:
    pairs = zip(loss_sum.tolist(), num_tokens.tolist(), strict=True)
    return [loss / tokens if tokens else None for loss, tokens in pairs]
