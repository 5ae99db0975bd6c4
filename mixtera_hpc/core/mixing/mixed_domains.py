"""The domains that an algorithm mixes: those with a weight above 0 in the initial mixture. The others stay at 0."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.statistics import DomainStatistics

__all__ = ["STATISTICS_ARRAYS", "MixedDomains"]

STATISTICS_ARRAYS = {
    "loss_sum": np.float64,
    "num_tokens": np.int64,
    "num_sequences": np.int64,
    "num_nonfinite": np.int64,
}
"""Arrays of `DomainStatistics`, and their types."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixedDomains:
    """The domain_ids that an algorithm mixes, among all domains."""

    ids: NDArray[np.intp]
    num_domains: int

    @classmethod
    def of(cls, prior: NDArray[np.float64]) -> "MixedDomains":
        """Return the domains with a weight above 0 in the initial mixture."""
        return cls(ids=np.flatnonzero(prior > 0), num_domains=len(prior))

    def restrict(self, statistics: DomainStatistics) -> DomainStatistics:
        """Return the statistics of the mixed domains."""
        if len(self.ids) == self.num_domains:
            return statistics
        ids = self.ids
        arrays = {name: getattr(statistics, name)[ids] for name in STATISTICS_ARRAYS}
        weights = None if statistics.weights is None else statistics.weights[ids]
        scalars = {
            name: replace(s, total=s.total[ids], count=s.count[ids], num_out_of_range=s.num_out_of_range[ids])
            for name, s in statistics.scalars.items()
        }
        return replace(statistics, **arrays, weights=weights, scalars=scalars)

    def scatter(self, values: NDArray[np.float64], fill: float) -> NDArray[np.float64]:
        """Return values of the mixed domains as values of all domains."""
        if len(self.ids) == self.num_domains:
            return values
        scattered = np.full(self.num_domains, fill)
        scattered[self.ids] = values
        return scattered
