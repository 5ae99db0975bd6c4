"""Propose the mixture with the smallest predicted loss, within bounds and within the range that proxies measured.

Mirror descent on the simplex: multiply the shares by exp(-rate × gradient), then project to the bounds in relative
entropy, which is exact (`core.mixing.bounds`). It starts from several mixtures, because the fitted laws need not be
convex. Uncertainty comes from fits to resampled runs (bootstrap).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.bounds import project_to_bounds
from mixtera_hpc.errors import DataError
from mixtera_hpc.swarm.cross_validation import Validated, mean_loss
from mixtera_hpc.swarm.mixture_space import TOLERANCE, MixtureSpace
from mixtera_hpc.swarm.regression import LossFit, fit_losses

__all__ = ["Uncertainty", "estimate_uncertainty", "mixture_within", "propose_mixture", "uniform_mixture"]

Array = NDArray[np.float64]

MAX_ITERATIONS = 500
MIN_RATE = 1e-9
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


def propose_mixture(space: MixtureSpace, fit: LossFit, mixtures: Array, objective: Array, penalty: float) -> Array:
    """Return the proposed mixture; shape (K,), sum 1.

    Args:
        space: domains, bounds and groups.
        fit: the fitted law.
        mixtures: the measured mixtures; shape (N, K). The proposal stays between the smallest and the largest share
            of every domain in them, since the law is not known outside.
        objective: weights of the metrics; shape (M,).
        penalty: nats of loss for one nat of relative entropy from the prior.
    """
    low, high = _measured_bounds(space, mixtures)
    prior = project_to_bounds(space.group_shares(space.prior), low, high)

    def value(groups: Array) -> float:
        divergence = float(np.sum(groups * np.log(np.maximum(groups, 1e-300) / np.maximum(prior, 1e-300))))
        return float(mean_loss(fit.predict(groups @ space.basis), objective)) + penalty * divergence

    def gradient(groups: Array) -> Array:
        slopes = fit.gradient(groups @ space.basis) @ (objective / objective.sum())
        divergence = np.log(np.maximum(groups, 1e-300) / np.maximum(prior, 1e-300))
        slope: Array = space.basis @ slopes + penalty * divergence
        return slope

    measured = space.group_shares(mixtures)
    predicted = mean_loss(fit.predict(mixtures), objective)
    starts = [prior, *measured[np.argsort(predicted, kind="stable")[:NUM_STARTS]]]
    allowed = (high > 0) / max(int(np.count_nonzero(high > 0)), 1)
    minima = []
    for start in starts:
        mixed = (1 - UNIFORM_PART) * start + UNIFORM_PART * allowed
        minima.append(_descend(project_to_bounds(mixed, low, high), low, high, value, gradient))
    best: Array = min(minima, key=value) @ space.basis
    return best


def estimate_uncertainty(
    chosen: Validated, mixtures: Array, losses: Array, objective: Array, candidates: Array
) -> Uncertainty:
    """Return the variation of the predictions for `candidates`, shape (C, K), over resampled runs.

    Args:
        chosen: the regression.
        mixtures: the measured mixtures; shape (N, K).
        losses: shape (N, M), NaN where a run lacks a metric.
        objective: weights of the metrics; shape (M,).
        candidates: the first one is compared with the others.
    """
    generator = np.random.Generator(np.random.PCG64(RESAMPLE_SEED))
    predictions = []
    for _ in range(NUM_RESAMPLES):
        rows = generator.integers(len(mixtures), size=len(mixtures))
        try:
            fit = fit_losses(chosen.law, mixtures[rows], losses[rows], chosen.ridge)
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
    feasible = low.sum() <= 1 + TOLERANCE and high.sum() >= 1 - TOLERANCE and (low <= high + TOLERANCE).all()
    return (low, np.maximum(low, high)) if feasible else allowed


def _descend(
    start: Array, low: Array, high: Array, value: Callable[[Array], float], gradient: Callable[[Array], Array]
) -> Array:
    """Return a local minimum within the bounds, from `start`."""
    current = start
    best = value(current)
    slopes = gradient(current)
    rate = 1.0 / max(float(np.abs(slopes - slopes @ current).max()), 1e-12)
    for _ in range(MAX_ITERATIONS):
        slopes = gradient(current)
        # Only differences between the domains matter; without their mean the exponents stay small.
        step = np.clip(-rate * (slopes - slopes @ current), -30.0, 30.0)
        moved = project_to_bounds(current * np.exp(step), low, high)
        reached = value(moved)
        if reached < best:
            current = moved
            best = reached
            rate *= 1.5
        else:
            rate *= 0.4
            if rate < MIN_RATE:
                break
    return current


def uniform_mixture(space: MixtureSpace) -> Array:
    """Return equal shares of all domains that may have one, within the bounds; shape (K,)."""
    return mixture_within(space, (space.prior > 0).astype(np.float64))


def mixture_within(space: MixtureSpace, mixture: Array) -> Array:
    """Return the nearest mixture within the bounds of the domains; shape (K,). Groups are not kept."""
    return project_to_bounds(mixture, space.low, np.where(space.prior > 0, space.high, 0.0))
