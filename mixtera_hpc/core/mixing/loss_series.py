"""The loss series as the ADO paper prepares it, kept only to reproduce published trajectories.

Per domain, from its first observation on: gaps filled with the last value, a Savitzky-Golay filter (window 101, cubic), the
first steps dropped, every tenth kept. Price: memory and fitting time grow with steps × domains, which `history` avoids.
Source: arXiv 2410.11820, section 3, and the settings its authors published.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.law_objective import LossPoints
from mixtera_hpc.core.statistics import DomainStatistics

__all__ = ["LossSeries", "smooth"]

WINDOW = 101
DEGREE = 3
KEEP_EVERY = 10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossSeries:
    """Every step's mean losses. Immutable: `observe` returns a longer series that shares the rows of the old one."""

    num_domains: int
    first_fitted: int
    """Steps before this one are smoothed with the others but not fitted."""
    num_seen: tuple[int, ...] = ()
    """Sequences of all domains seen by the end of each step."""
    losses: tuple[NDArray[np.float64], ...] = ()
    """Per step, nats, NaN where a domain had no observation; shape (num_domains,) each."""

    def observe(self, num_seen: int, statistics: DomainStatistics) -> "LossSeries":
        """Add one step, after which `num_seen` sequences of all domains had been seen."""
        return LossSeries(
            num_domains=self.num_domains,
            first_fitted=self.first_fitted,
            num_seen=(*self.num_seen, num_seen),
            losses=(*self.losses, statistics.loss_mean),
        )

    def points(self) -> LossPoints:
        """The smoothed, thinned series; all points of a domain weigh the same."""
        losses = np.array(self.losses).reshape(len(self.losses), self.num_domains)
        observed = ~np.isnan(losses)
        first = np.where(observed.any(axis=0), observed.argmax(axis=0), len(losses))
        filled = _filled(losses, observed)
        for start in np.unique(first[first < len(losses)]):
            domains = np.flatnonzero(first == start)
            filled[start:, domains] = smooth(filled[start:, domains])
        kept = slice(self.first_fitted, None, KEEP_EVERY)
        log_n = np.log(np.array(self.num_seen, np.float64))[kept]
        loss = filled[kept].T
        return LossPoints.of(log_n, loss, np.isfinite(loss).astype(np.float64))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything as flat arrays, for an npz file."""
        return {
            "series_first_fitted": np.array(self.first_fitted),
            "series_num_seen": np.array(self.num_seen, np.int64),
            "series_losses": np.array(self.losses).reshape(len(self.losses), self.num_domains),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "LossSeries":
        losses = arrays["series_losses"]
        return cls(
            num_domains=losses.shape[1],
            first_fitted=int(arrays["series_first_fitted"]),
            num_seen=tuple(arrays["series_num_seen"].tolist()),
            losses=tuple(losses),
        )


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Savitzky-Golay along axis 0, shape (num_steps, num_domains); the ends follow the first and last window's cubic.

    With fewer steps than the window, the largest odd window that fits; unchanged where no cubic has anything to smooth.
    """
    window = min(WINDOW, len(values) - (len(values) + 1) % 2)
    if window <= DEGREE + 1:
        return values
    half = window // 2
    basis = np.vander(np.linspace(-1, 1, window), DEGREE + 1)
    project = basis @ np.linalg.pinv(basis)
    middle = np.lib.stride_tricks.sliding_window_view(values, window, axis=0) @ project[half]
    return np.concatenate([project[:half] @ values[:window], middle, project[half + 1 :] @ values[-window:]])


def _filled(losses: NDArray[np.float64], observed: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Gaps take the last observed value; NaN before the first."""
    last = np.maximum.accumulate(np.where(observed, np.arange(len(losses))[:, None], 0), axis=0)
    return np.take_along_axis(losses, last, axis=0)
