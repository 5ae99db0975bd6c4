"""The loss series as the ADO paper prepares it; only used to reproduce published trajectories.

For each domain, from its first observation on: gaps filled with the last value, a Savitzky-Golay filter (window 101,
cubic), the first steps dropped, every tenth step kept. Price: memory and fitting time grow with steps × domains, which
`loss_history` avoids. Source: arXiv 2410.11820, section 3, and the settings its authors published.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.laws.law_objective import LossPoints
from mixtera_hpc.core.statistics import DomainStatistics

__all__ = ["LossSeries", "smooth"]

WINDOW = 101
"""Steps of the filter."""
DEGREE = 3
"""Degree of the polynomial of the filter."""
KEEP_EVERY = 10
"""One of this number of steps is fitted."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossSeries:
    """The mean losses of every step. Immutable: `observe` returns a longer series that shares the old rows."""

    num_domains: int
    first_fitted: int
    """Steps before this one are smoothed with the others but not fitted."""
    num_seen: tuple[int, ...] = ()
    """Sequences of all domains seen by the end of each step."""
    losses: tuple[NDArray[np.float64], ...] = ()
    """For each step, nats; NaN where a domain had no observation. Shape (num_domains,) each."""

    def observe(self, num_seen: float, statistics: DomainStatistics) -> "LossSeries":
        """Add one step, after which `num_seen` sequences of all domains had been seen."""
        return LossSeries(
            num_domains=self.num_domains,
            first_fitted=self.first_fitted,
            num_seen=(*self.num_seen, int(num_seen)),
            losses=(*self.losses, statistics.loss_mean),
        )

    def points(self) -> LossPoints:
        """Return the smoothed and thinned series; all points of a domain have the same weight."""
        losses = np.array(self.losses).reshape(len(self.losses), self.num_domains)
        observed = ~np.isnan(losses)
        first = np.where(observed.any(axis=0), observed.argmax(axis=0), len(losses))

        # Smooth the domains together that have their first observation at the same step.
        series = _fill_gaps(losses, observed)
        for start in np.unique(first[first < len(losses)]):
            domains = np.flatnonzero(first == start)
            series[start:, domains] = smooth(series[start:, domains])

        fitted = slice(self.first_fitted, None, KEEP_EVERY)
        log_n = np.log(np.array(self.num_seen, np.float64))[fitted]
        loss = series[fitted].T
        return LossPoints.of(log_n, loss, np.isfinite(loss).astype(np.float64))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the series as flat arrays, for an npz file."""
        return {
            "series_first_fitted": np.array(self.first_fitted),
            "series_num_seen": np.array(self.num_seen, np.int64),
            "series_losses": np.array(self.losses).reshape(len(self.losses), self.num_domains),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "LossSeries":
        """Restore what `arrays` returned."""
        losses = arrays["series_losses"]
        return cls(
            num_domains=losses.shape[1],
            first_fitted=int(arrays["series_first_fitted"]),
            num_seen=tuple(arrays["series_num_seen"].tolist()),
            losses=tuple(losses),
        )


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Apply a Savitzky-Golay filter along axis 0, shape (num_steps, num_domains).

    The ends follow the cubic of the first and of the last window. With fewer steps than the window, the largest odd
    window that fits is used. Four steps or fewer stay unchanged: a cubic passes through all of them.
    """
    window = min(WINDOW, len(values) - (len(values) + 1) % 2)
    if window <= DEGREE + 1:
        return values
    half = window // 2
    # The matrix that projects a window onto polynomials; its middle row gives the filtered value of the middle step.
    basis = np.vander(np.linspace(-1, 1, window), DEGREE + 1)
    projection = basis @ np.linalg.pinv(basis)
    middle = np.lib.stride_tricks.sliding_window_view(values, window, axis=0) @ projection[half]
    return np.concatenate([projection[:half] @ values[:window], middle, projection[half + 1 :] @ values[-window:]])


def _fill_gaps(losses: NDArray[np.float64], observed: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return `losses` with the last observed value in gaps, and NaN before the first."""
    last = np.maximum.accumulate(np.where(observed, np.arange(len(losses))[:, None], 0), axis=0)
    return np.take_along_axis(losses, last, axis=0)
