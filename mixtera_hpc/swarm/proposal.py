"""Propose the mixture with the smallest predicted loss, within bounds and within the range that proxies measured.

Mirror descent on the simplex: multiply the shares by exp(-rate × gradient), then project to the bounds in relative
entropy, which is exact (`core.mixing.bounds`). It starts from several mixtures, because the fitted laws need not be
convex. Uncertainty comes from fits to resampled runs (bootstrap).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.bounds import project_to_bounds
from mixtera_hpc.errors import DataError
from mixtera_hpc.swarm.cross_validation import Validated, mean_loss
from mixtera_hpc.swarm.mixture_space import TOLERANCE, MixtureSpace
from mixtera_hpc.swarm.regression import LossFit, MetricFits
from mixtera_hpc.swarm.training_phases import by_phase

__all__ = ["Uncertainty", "estimate_uncertainty", "mixture_within", "propose_mixture", "uniform_mixture"]

Array = NDArray[np.float64]

MAX_ITERATIONS = 500
MIN_RATE = 1e-9
NUM_MULTIPLIER_ROUNDS = 12
STRENGTH = 30.0
"""Penalty of a share above its limit, relative to the largest slope of the loss."""
NUM_STARTS = 3
"""Measured mixtures that the search starts from, those with the smallest predicted losses."""
UNIFORM_PART = 0.02
"""Part of the uniform mixture in every start: a share of 0 would stay at 0."""
NUM_RESAMPLES = 200
RESAMPLE_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncertainty:
    """Variation of the predictions over resampled runs."""

    deviation: Array
    """Standard deviation of the predicted objective of each mixture, in nats."""
    gain_probability: Array
    """Share of the resamples in which the first mixture is better than each one; 0.5 for itself."""


def propose_mixture(
    space: MixtureSpace, fit: LossFit | MetricFits, mixtures: Array, objective: Array, penalty: float
) -> Array:
    """Return the proposed mixture; shape (C,), sum 1 in every phase.

    Args:
        space: domains, bounds and groups.
        fit: the fitted laws.
        mixtures: the measured mixtures; shape (N, C). The proposal stays between the smallest and the largest share
            of every domain in them, since the law is not known outside.
        objective: weights of the metrics; shape (M,).
        penalty: nats of loss for one nat of relative entropy from the prior.
    """
    low, high = _measured_bounds(space, mixtures)
    prior = space.project(space.group_shares(space.prior), low, high)
    measured = space.group_shares(mixtures)
    predicted = mean_loss(fit.predict(mixtures), objective)
    starts = [prior, *measured[np.argsort(predicted, kind="stable")[:NUM_STARTS]]]
    allowed = by_phase((high > 0).astype(np.float64), space.num_phases)
    uniform = (allowed / np.maximum(allowed.sum(axis=1, keepdims=True), 1)).reshape(-1)

    search = _MixtureSearch(space=space, low=low, high=high, prior=prior, fit=fit, objective=objective, penalty=penalty)
    minima = [search.minimum((1 - UNIFORM_PART) * start + UNIFORM_PART * uniform) for start in starts]
    return min(minima, key=search.value)


def estimate_uncertainty(
    chosen: Validated, mixtures: Array, losses: Array, objective: Array, candidates: Array
) -> Uncertainty:
    """Return the variation of the predictions for `candidates`, a row of shares each, over resampled runs.

    Args:
        chosen: the regressions.
        mixtures: the measured mixtures; shape (N, C).
        losses: shape (N, M), NaN where a run lacks a metric.
        objective: weights of the metrics; shape (M,).
        candidates: the first one is compared with the others.
    """
    generator = np.random.Generator(np.random.PCG64(RESAMPLE_SEED))
    predictions = []
    for _ in range(NUM_RESAMPLES):
        rows = generator.integers(len(mixtures), size=len(mixtures))
        try:
            fit = chosen.fit(mixtures[rows], losses[rows])
        except DataError:
            continue  # Too few different runs with a metric were drawn.
        predictions.append(mean_loss(fit.predict(candidates), objective))
    values = np.array(predictions).reshape(-1, len(candidates))
    if not len(values):
        unknown = np.full(len(candidates), np.nan)
        return Uncertainty(deviation=unknown, gain_probability=unknown)
    better = (values[:, :1] < values) + 0.5 * (values[:, :1] == values)
    return Uncertainty(deviation=values.std(axis=0), gain_probability=better.mean(axis=0))


def _measured_bounds(space: MixtureSpace, mixtures: Array) -> tuple[Array, Array]:
    """Return the bounds of the groups: those of the space, narrowed to the measured shares where that is possible."""
    allowed = space.group_bounds(space.low, space.high)
    shares = space.group_shares(mixtures)
    low = np.maximum(allowed[0], shares.min(axis=0))
    high = np.minimum(allowed[1], shares.max(axis=0))
    # Runs from elsewhere may lie outside the bounds, so that no mixture is left.
    lowest = by_phase(low, space.num_phases).sum(axis=1).max()
    highest = by_phase(high, space.num_phases).sum(axis=1).min()
    has_mixture = lowest <= 1 + TOLERANCE and highest >= 1 - TOLERANCE and (low <= high + TOLERANCE).all()
    if not has_mixture or not space.is_within_limits(mixtures.mean(axis=0)):
        return allowed
    # Rounding may put a lower bound above its upper one.
    return low, np.maximum(low, high)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _MixtureSearch:
    """The search for a minimum: mirror descent within the bounds, with multipliers for the limits of the whole run."""

    space: MixtureSpace
    low: Array
    """Smallest shares of the groups; shape (G,)."""
    high: Array
    prior: Array
    """The shares at which the relative entropy is 0; shape (G,)."""
    fit: LossFit | MetricFits
    objective: Array
    penalty: float

    def value(self, mixture: Array) -> float:
        """Return predicted loss and penalty of a mixture, shape (C,)."""
        return self._value(self.space.group_shares(mixture), np.zeros(len(self.space.names)), 0.0)

    def minimum(self, start: Array) -> Array:
        """Return a local minimum, from the shares of the groups `start`; shape (C,)."""
        multipliers = np.zeros(len(self.space.names))
        groups = self.space.project(start, self.low, self.high)
        strength = STRENGTH * max(float(np.abs(self._slope(groups, multipliers, 0.0)).max()), 1e-12)
        # Method of multipliers. With one phase the bounds include the limits, and one descent is enough.
        for _ in range(NUM_MULTIPLIER_ROUNDS if self.space.num_phases > 1 else 1):
            groups = self._descend(groups, multipliers, strength)
            multipliers = np.maximum(multipliers + strength * self._excess(groups), 0.0)
        mixture: Array = groups @ self.space.basis
        return self.space.keep_limits(mixture)

    def _descend(self, start: Array, multipliers: Array, strength: float) -> Array:
        """Return a local minimum of the loss and its penalties, by mirror descent."""
        current = start
        best = self._value(current, multipliers, strength)
        rate = 1.0 / max(float(np.abs(self._slope(current, multipliers, strength)).max()), 1e-12)
        for _ in range(MAX_ITERATIONS):
            step = np.clip(-rate * self._slope(current, multipliers, strength), -30.0, 30.0)
            moved = self.space.project(current * np.exp(step), self.low, self.high)
            reached = self._value(moved, multipliers, strength)
            if reached < best:
                current = moved
                best = reached
                rate *= 1.5
            else:
                rate *= 0.4
                if rate < MIN_RATE:
                    break
        return current

    def _value(self, groups: Array, multipliers: Array, strength: float) -> float:
        loss = float(mean_loss(self.fit.predict(groups @ self.space.basis), self.objective))
        entropy = self.penalty * float((self.space.group_phases * groups) @ _log_ratio(groups, self.prior))
        pushed = np.maximum(multipliers + strength * self._excess(groups), 0.0)
        limits = float((pushed**2).sum()) / (2 * strength) if strength else 0.0
        return loss + entropy + limits

    def _slope(self, groups: Array, multipliers: Array, strength: float) -> Array:
        """Return the derivatives by the shares of groups, with a weighted mean of 0 in every phase; shape (G,)."""
        pushed = np.maximum(multipliers + strength * self._excess(groups), 0.0)
        slopes = self.fit.gradient(groups @ self.space.basis) @ (self.objective / self.objective.sum())
        slopes = slopes + (self.space.phases[:, None] * pushed).reshape(-1)
        entropy = self.penalty * self.space.group_phases * _log_ratio(groups, self.prior)
        slope = by_phase(self.space.basis @ slopes + entropy, self.space.num_phases)
        # Only differences between the domains of a phase matter; without their mean the exponents stay small.
        mean = (slope * by_phase(groups, self.space.num_phases)).sum(axis=1, keepdims=True)
        centered: Array = (slope - mean).reshape(-1)
        return centered

    def _excess(self, groups: Array) -> Array:
        """Return the share of every domain in the whole run, above its limit; 0 with one phase. Shape (K,)."""
        if self.space.num_phases == 1:
            return np.zeros(len(self.space.names))
        return self.space.whole_run(groups @ self.space.basis) - self.space.limit


def _log_ratio(shares: Array, prior: Array) -> Array:
    ratio: Array = np.log(np.maximum(shares, 1e-300) / np.maximum(prior, 1e-300))
    return ratio


def uniform_mixture(space: MixtureSpace) -> Array:
    """Return equal shares of all domains that may have one, within the bounds; shape (C,)."""
    return mixture_within(space, (space.prior > 0).astype(np.float64))


def mixture_within(space: MixtureSpace, mixture: Array) -> Array:
    """Return the nearest mixture within the bounds of the domains, the same in all phases; shape (C,).

    The ratios inside groups may change.
    """
    high = np.where(space.prior > 0, space.high, 0.0)
    most = np.minimum(by_phase(high, space.num_phases).min(axis=0), space.limit)
    size = len(space.names)
    return np.tile(project_to_bounds(mixture[:size], space.low[:size], most), space.num_phases)
