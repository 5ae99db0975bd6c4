"""The mixtures that a swarm samples from and proposes: domains, bounds, and groups of fixed ratio.

A mixture is `u @ basis`, where u is a point of a simplex over G groups. Usually every group is one domain. If a swarm
reuses an earlier one, the earlier domains are one group, and its row of the basis is their earlier proposal.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import MixtureError, pluralize

__all__ = ["MixtureSpace", "epoch_caps"]

Weights = NDArray[np.float64]

TOLERANCE = 1e-12
"""Sums of bounds may miss 1 by this much: sums of decimal fractions are not exact."""

UNUSED = 1e-12
"""Shares of a group below this put no bound on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureSpace:
    """The mixtures of K domains that are allowed; the arrays are not changed."""

    names: tuple[str, ...]
    """Names of the domains."""
    prior: Weights
    """The mixture that the samples scatter around; shape (K,), sum 1. Domains of weight 0 keep it."""
    low: Weights
    """Smallest share of every domain; shape (K,)."""
    high: Weights
    """Largest share of every domain; shape (K,)."""
    basis: Weights
    """The mixture inside every group; shape (G, K), rows of sum 1, every domain in at most one group."""

    @classmethod
    def of_domains(cls, names: tuple[str, ...], prior: Weights, low: Weights, high: Weights) -> "MixtureSpace":
        """Return the space in which every domain is a group of its own.

        Raises:
            MixtureError: no mixture lies within the bounds.
        """
        space = cls(names=names, prior=prior, low=low, high=high, basis=np.eye(len(names)))
        space.check()
        return space

    @property
    def num_groups(self) -> int:
        """Number of groups, G."""
        return len(self.basis)

    def group_shares(self, mixtures: Weights) -> Weights:
        """Return the shares of the groups in mixtures of shape (…, K); shape (…, G)."""
        shares: Weights = mixtures @ (self.basis > 0).T
        return shares

    def group_bounds(self, low: Weights, high: Weights) -> tuple[Weights, Weights]:
        """Return the bounds of the groups, shape (G,) each, that keep every domain between `low` and `high`."""
        inside = self.basis > UNUSED
        ratio = np.where(inside, self.basis, 1.0)
        least = np.where(inside, low / ratio, 0.0).max(axis=1)
        most = np.where(inside, high / ratio, np.inf).min(axis=1)
        # A domain of weight 0 in the prior stays at 0.
        most = np.where(self.group_shares(self.prior) > 0, np.minimum(most, 1.0), 0.0)
        return least, most

    def check(self) -> None:
        """Raise unless a mixture lies within the bounds.

        Raises:
            MixtureError: the floors are too large, or the caps and epoch limits too small.
        """
        low, high = self.group_bounds(self.low, self.high)
        if low.sum() <= 1 + TOLERANCE and high.sum() >= 1 - TOLERANCE and (low <= high + TOLERANCE).all():
            return
        first = ", ".join(f"{name} ≤ {cap:.3g}" for name, cap in list(zip(self.names, self.high, strict=True))[:5])
        raise MixtureError(
            f"No mixture of {pluralize(len(self.names), 'domain')} lies within the bounds: the floors sum to "
            f"{low.sum():.4g}, and the caps, with the limits of epochs, to {high.sum():.4g} ({first}). The floors must "
            "sum to at most 1, the caps to at least 1.\n  Raise mixture.max_epochs or the caps, lower the floors, or "
            "lower swarm.target_tokens or training.num_steps."
        )


def epoch_caps(sizes: NDArray[np.int64], max_epochs: Weights, budget: float, spare: int = 0) -> Weights:
    """Return the largest share of every domain that its epochs allow; shape (K,), at most 1.

    Args:
        sizes: items of one epoch of each domain; shape (K,).
        max_epochs: passes over each domain, `inf` for any number; shape (K,).
        budget: items of the whole run.
        spare: items of each domain that are not used, because sequences do not divide a domain.
    """
    # 0 × inf: a domain without samples has no share, however often it may be repeated.
    endless = np.isinf(max_epochs) & (sizes > 0)
    available = np.where(np.isinf(max_epochs), 0.0, max_epochs) * sizes
    caps: Weights = np.clip((available - spare) / max(budget, 1.0), 0.0, 1.0)
    return np.where(endless, 1.0, caps)
