"""The history of all losses so far: sums in at most 256 bins along log n.

A power law is straight in log n, so equally wide bins on that axis hold as much evidence as the whole series. The mean
of a bin over all its tokens needs no smoothing filter, no filled gaps, and no guess for a domain that has not been seen
yet. When the bins run out, neighbours merge and all bins become twice as wide. Price: 16 bytes per domain and bin, so 4
MB at 1,000 domains, no matter how long the run is; a step costs one addition of two arrays.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.laws.law_objective import LossPoints
from mixtera_hpc.core.statistics import DomainStatistics

__all__ = ["MAX_BINS", "LossBin", "LossHistory"]

MAX_BINS = 256
FIRST_BINS_PER_OCTAVE = 32
"""256 bins last for a factor of 2^8 in n. Each further doubling of the run then costs half of the resolution."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossBin:
    """The steps whose n falls into one interval of log2 n."""

    key: int
    """The interval: floor(log2(n) · bins per octave)."""
    num_steps: int
    log_n_sum: float
    loss_sum: NDArray[np.float64]
    """Nats; shape (num_domains,)."""
    num_tokens: NDArray[np.int64]
    """Shape (num_domains,)."""

    def __add__(self, other: "LossBin") -> "LossBin":
        return LossBin(
            key=self.key,
            num_steps=self.num_steps + other.num_steps,
            log_n_sum=self.log_n_sum + other.log_n_sum,
            loss_sum=self.loss_sum + other.loss_sum,
            num_tokens=self.num_tokens + other.num_tokens,
        )

    def widened(self) -> "LossBin":
        """Return the same steps in an interval twice as wide."""
        return LossBin(
            key=self.key // 2,
            num_steps=self.num_steps,
            log_n_sum=self.log_n_sum,
            loss_sum=self.loss_sum,
            num_tokens=self.num_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossHistory:
    """Binned losses. Immutable: `observe` returns a new history that shares all closed bins with the old one."""

    num_domains: int
    bins: tuple[LossBin, ...] = ()
    """In ascending order of n; the last one may still grow."""
    bins_per_octave: int = FIRST_BINS_PER_OCTAVE

    def observe(self, num_seen: float, statistics: DomainStatistics) -> "LossHistory":
        """Return the history with one more step.

        Args:
            num_seen: sequences of all domains up to and including this step, in any unit, at least 1 in it; must not
                decrease from call to call.
            statistics: losses of the step.
        """
        observed = statistics.observed
        # Start a new bin for the step. It merges with the last bin if both have the same interval.
        step = LossBin(
            key=int(np.floor(np.log2(num_seen) * self.bins_per_octave)),
            num_steps=1,
            log_n_sum=float(np.log(num_seen)),
            loss_sum=np.where(observed, statistics.loss_sum, 0.0),
            num_tokens=np.where(observed, statistics.num_tokens, 0),
        )
        return LossHistory(
            num_domains=self.num_domains,
            bins=_merge_equal_keys((*self.bins[-1:], step), before=self.bins[:-1]),
            bins_per_octave=self.bins_per_octave,
        )._within_limit()

    def points(self) -> LossPoints:
        """Return the mean losses of all bins, weighted by their tokens."""
        if not self.bins:
            empty = np.zeros((self.num_domains, 0))
            return LossPoints.of(np.zeros(0), empty, empty)

        # A bin without tokens of a domain has loss 0 and weight 0.
        tokens = np.stack([b.num_tokens for b in self.bins], axis=1)
        loss = np.stack([b.loss_sum for b in self.bins], axis=1) / np.maximum(tokens, 1)
        log_n = np.array([b.log_n_sum / b.num_steps for b in self.bins])
        return LossPoints.of(log_n, loss, tokens.astype(np.float64))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the history as flat arrays, for an npz file."""
        # A history without bins has arrays of shape (0, num_domains).
        shape = (len(self.bins), self.num_domains)
        return {
            "history_bins_per_octave": np.array(self.bins_per_octave),
            "history_key": np.array([b.key for b in self.bins], np.int64),
            "history_num_steps": np.array([b.num_steps for b in self.bins], np.int64),
            "history_log_n_sum": np.array([b.log_n_sum for b in self.bins], np.float64),
            "history_loss_sum": np.array([b.loss_sum for b in self.bins], np.float64).reshape(shape),
            "history_num_tokens": np.array([b.num_tokens for b in self.bins], np.int64).reshape(shape),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "LossHistory":
        """Restore what `arrays` returned."""
        columns = [arrays[f"history_{name}"] for name in ("key", "num_steps", "log_n_sum", "loss_sum", "num_tokens")]
        bins = tuple(
            LossBin(
                key=int(key), num_steps=int(num_steps), log_n_sum=float(log_n_sum), loss_sum=loss, num_tokens=tokens
            )
            for key, num_steps, log_n_sum, loss, tokens in zip(*columns, strict=True)
        )
        num_domains = arrays["history_loss_sum"].shape[1]
        return cls(num_domains=num_domains, bins=bins, bins_per_octave=int(arrays["history_bins_per_octave"]))

    def _within_limit(self) -> "LossHistory":
        """Return the history with at most `MAX_BINS` bins; double the width of all bins until they fit."""
        if len(self.bins) <= MAX_BINS:
            return self
        # floor(2x) // 2 == floor(x), so halving all keys gives the bins that wider intervals would have given.
        return LossHistory(
            num_domains=self.num_domains,
            bins=_merge_equal_keys(tuple(b.widened() for b in self.bins)),
            bins_per_octave=self.bins_per_octave // 2,
        )._within_limit()


def _merge_equal_keys(bins: tuple[LossBin, ...], before: tuple[LossBin, ...] = ()) -> tuple[LossBin, ...]:
    """Return `before` followed by `bins`, in which neighbours of equal key are added up."""
    groups = itertools.groupby(bins, key=lambda b: b.key)
    return before + tuple(reduce(LossBin.__add__, group) for _, group in groups)
