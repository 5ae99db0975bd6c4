"""The mixtures that a swarm samples from and proposes: domains, phases, bounds, and groups of fixed ratio.

A mixture is `u @ basis`, where u has a point of a simplex over groups for every phase. Usually every group is one
domain in one phase. If a swarm reuses an earlier one, the earlier domains are one group, and its row of the basis is
their earlier proposal.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.bounds import project_to_bounds
from mixtera_hpc.errors import MixtureError, pluralize
from mixtera_hpc.swarm.training_phases import by_phase

__all__ = ["MixtureSpace", "epoch_caps"]

Weights = NDArray[np.float64]

TOLERANCE = 1e-12
"""Sums of bounds may miss 1 by this much: sums of decimal fractions are not exact."""

UNUSED = 1e-12
"""Shares of a group below this put no bound on it."""

LIMIT_TOLERANCE = 1e-6
"""Shares in files have six decimals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureSpace:
    """The mixtures of K domains in P phases that are allowed; the arrays are not changed.

    A mixture has C = P × K shares, those of the first phase first. The shares of every phase sum to 1.
    """

    names: tuple[str, ...]
    """Names of the domains."""
    prior: Weights
    """The mixture that the samples scatter around; shape (C,). Domains of weight 0 keep it."""
    low: Weights
    """Smallest share of every domain in every phase; shape (C,)."""
    high: Weights
    """Largest share of every domain in every phase; shape (C,)."""
    basis: Weights
    """The mixture inside every group; shape (G, C), rows of sum 1, every share in at most one group."""
    phases: Weights = field(default_factory=lambda: np.ones(1))
    """Share of the run that every phase has; shape (P,), sum 1."""
    limit: Weights = field(default_factory=lambda: np.ones(1))
    """Largest share of every domain in the whole run; shape (K,), or (1,) for all. With one phase, see `high`."""

    @classmethod
    def of_domains(
        cls,
        names: tuple[str, ...],
        prior: Weights,
        low: Weights,
        high: Weights,
        *,
        limit: Weights | None = None,
        phases: Sequence[float] = (1.0,),
    ) -> "MixtureSpace":
        """Return the space in which every domain of every phase is a group of its own.

        Args:
            names: of the domains.
            prior: the same for every phase; shape (K,).
            low: smallest shares in every phase; shape (K,).
            high: largest shares in every phase; shape (K,).
            limit: largest shares in the whole run, shape (K,); None for no limit.
            phases: shares of the run.

        Raises:
            MixtureError: no mixture lies within the bounds.
        """
        num = len(phases)
        limit = np.ones(len(names)) if limit is None else limit
        # A phase of a tenth of the run may have up to ten times the limit of the whole run.
        highest = np.concatenate([np.minimum(high, limit / share) for share in phases])
        space = cls(
            names=names,
            prior=np.tile(prior, num),
            low=np.tile(low, num),
            high=highest,
            basis=np.eye(num * len(names)),
            phases=np.array(phases),
            limit=limit,
        )
        space.check()
        return space

    @property
    def num_phases(self) -> int:
        """Number of phases, P."""
        return len(self.phases)

    @property
    def num_groups(self) -> int:
        """Number of groups of all phases, G."""
        return len(self.basis)

    @property
    def group_phases(self) -> Weights:
        """Share of the run of the phase that every group belongs to; shape (G,)."""
        return np.repeat(self.phases, self.num_groups // self.num_phases)

    def group_shares(self, mixtures: Weights) -> Weights:
        """Return the shares of the groups in mixtures of shape (…, C); shape (…, G)."""
        shares: Weights = mixtures @ (self.basis > 0).T
        return shares

    def group_bounds(self, low: Weights, high: Weights) -> tuple[Weights, Weights]:
        """Return the bounds of the groups, shape (G,) each, that keep every share between `low` and `high`."""
        inside = self.basis > UNUSED
        ratio = np.where(inside, self.basis, 1.0)
        least = np.where(inside, low / ratio, 0.0).max(axis=1)
        most = np.where(inside, high / ratio, np.inf).min(axis=1)
        # A domain of weight 0 in the prior stays at 0.
        most = np.where(self.group_shares(self.prior) > 0, np.minimum(most, 1.0), 0.0)
        return least, most

    def whole_run(self, mixtures: Weights) -> Weights:
        """Return the share of every domain in the whole run; (…, C) to (…, K)."""
        shares: Weights = np.einsum("p,...pk->...k", self.phases, by_phase(mixtures, self.num_phases))
        return shares

    def project(self, shares: Weights, low: Weights, high: Weights) -> Weights:
        """Return the nearest mixture in relative entropy within bounds, in every phase; limits are not considered.

        Args:
            shares: of the groups, shape (G,), or of the domains of all phases, shape (C,).
            low: smallest shares; the shape of `shares`.
            high: largest shares; the shape of `shares`.
        """
        rows = zip(*(by_phase(values, self.num_phases) for values in (shares, low, high)), strict=True)
        return np.concatenate([project_to_bounds(*row) for row in rows])

    def keep_limits(self, mixture: Weights) -> Weights:
        """Return a mixture in which no domain has more than its limit in the whole run; shape (C,).

        A domain above its limit is scaled down in all phases, and the others of a phase are scaled up. So a mixture
        within the limits stays as it is. With one phase, the bounds include the limits.
        """
        if self.num_phases == 1:
            return mixture
        low = by_phase(self.low, self.num_phases).copy()
        high = by_phase(self.high, self.num_phases).copy()
        shares = by_phase(mixture, self.num_phases)
        # Every round fixes the shares of at least one more domain.
        for _ in self.names:
            run = self.phases @ shares
            above = run > self.limit + TOLERANCE
            if not above.any():
                return shares.reshape(-1)
            scale = np.where(above, self.limit / np.maximum(run, UNUSED), 1.0)
            low = np.where(above, shares * scale, low)
            high = np.where(above, shares * scale, high)
            if (high.sum(axis=1) < 1).any():
                break
            shares = np.stack([project_to_bounds(*row) for row in zip(shares, low, high, strict=True)])
        return self._move_to_constant(mixture)

    def _move_to_constant(self, mixture: Weights) -> Weights:
        """Return the mixture that is nearest to `mixture`, on the line to one that all phases share."""
        num = len(self.names)
        most = np.minimum(by_phase(self.high, self.num_phases).min(axis=0), self.limit)
        constant = project_to_bounds(self.whole_run(mixture), self.low[:num], most)
        run = self.whole_run(mixture)
        above = run > self.limit
        part = np.max((run - self.limit)[above] / (run - constant)[above], initial=0.0)
        moved: Weights = (1 - part) * mixture + part * np.tile(constant, self.num_phases)
        return moved

    def is_within_limits(self, mixture: Weights) -> bool:
        """Return True if no domain has more than its limit in the whole run; shape (C,)."""
        return bool((self.whole_run(mixture) <= self.limit + LIMIT_TOLERANCE).all())

    def check(self) -> None:
        """Raise unless a mixture lies within the bounds.

        Raises:
            MixtureError: the floors are too large, or the caps and epoch limits too small.
        """
        low, high = self.group_bounds(self.low, np.minimum(self.high, np.tile(self.limit, self._limit_repeats)))
        lowest = by_phase(low, self.num_phases).sum(axis=1).max()
        highest = by_phase(high, self.num_phases).sum(axis=1).min()
        if lowest <= 1 + TOLERANCE and highest >= 1 - TOLERANCE and (low <= high + TOLERANCE).all():
            return
        caps = np.minimum(self.high[: len(self.names)], self.limit)
        first = ", ".join(f"{name} ≤ {cap:.3g}" for name, cap in list(zip(self.names, caps, strict=False))[:5])
        raise MixtureError(
            f"No mixture of {pluralize(len(self.names), 'domain')} lies within the bounds: the floors sum to "
            f"{lowest:.4g}, and the caps, with the limits of epochs, to {highest:.4g} ({first}). The floors must "
            "sum to at most 1, the caps to at least 1.\n  Raise mixture.max_epochs or the caps, lower the floors, or "
            "lower swarm.target_tokens or training.num_steps."
        )

    @property
    def _limit_repeats(self) -> int:
        return self.num_phases if len(self.limit) > 1 else 1


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
