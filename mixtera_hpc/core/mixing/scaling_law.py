"""One power law per domain, L(n) = epsilon + beta · n^-alpha, fitted to the losses of all domains at once.

The objective is ADO's: a Huber loss on log L, quadratic below a residual of 0.001 and linear beyond, within bounds. Given
alpha the law is linear in (epsilon, beta), so a grid over alpha turns each reweighted least-squares pass into three matrix
products, and the best alpha of every domain is found globally; `refinement` then descends to the minimum of the objective
itself. Price: about 15 passes over a (num_domains, num_points) array, then some twenty more over the rows still moving.
The products are einsums, not BLAS calls: their bits do not depend on how many threads a node gives the process.

The three numbers are not identifiable from noisy losses; the slope at the current n is. Compare speeds, not parameters.
Source: arXiv 2410.11820, equation (1).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.law_objective import HUBER_DELTA, LawBounds, LossPoints, huber_objective, predict
from mixtera_hpc.core.mixing.law_refinement import refine_laws

__all__ = ["MIN_POINTS", "ScalingLaws", "fit_laws"]

MIN_POINTS = 3
"""A law has three numbers; with fewer distinct points there is no fit."""

NUM_ALPHAS = 40
"""Exponents tried in the global search."""

PASSES = (3e-2, 1e-2, 3e-3, HUBER_DELTA, HUBER_DELTA, HUBER_DELTA)
"""Residuals beyond which losses count linearly, one per reweighting after the first, unweighted pass."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScalingLaws:
    """L(n) = epsilon + beta · n^-alpha for every domain, n in sequences; rows of NaN where no law is known."""

    theta: NDArray[np.float64]
    """Columns log beta, alpha, epsilon (nats); shape (num_domains, 3)."""

    @classmethod
    def unknown(cls, num_domains: int) -> "ScalingLaws":
        return cls(theta=np.full((num_domains, 3), np.nan))

    @property
    def known(self) -> NDArray[np.bool_]:
        return np.isfinite(self.theta.sum(axis=1))

    @property
    def beta(self) -> NDArray[np.float64]:
        """Reducible loss at n = 1, nats; shape (num_domains,)."""
        return np.exp(self.theta[:, 0])

    @property
    def alpha(self) -> NDArray[np.float64]:
        return self.theta[:, 1]

    @property
    def epsilon(self) -> NDArray[np.float64]:
        """Irreducible loss, nats; shape (num_domains,)."""
        return self.theta[:, 2]

    def speed(self, n: float, min_alpha: float = 0.0) -> NDArray[np.float64]:
        """-dL/dn at `n`, in nats per sequence of whatever domain; the leading alpha is raised to `min_alpha`."""
        reducible = np.exp(self.theta[:, 0] - self.alpha * np.log(n))
        return np.maximum(self.alpha, min_alpha) * reducible / n


def fit_laws(points: LossPoints, bounds: LawBounds, start: ScalingLaws) -> ScalingLaws:
    """The laws that fit `points` best, unknown for domains with fewer than `MIN_POINTS` of them. Never raises.

    Args:
        start: laws known from before; where one fits better than the grid's best, the descent begins there.
    """
    theta = np.full((len(points.log_loss), 3), np.nan)
    rows = np.flatnonzero((points.weight > 0).sum(axis=1) >= MIN_POINTS)
    if len(rows):
        chosen = points.take(rows)
        found = _better(_search(chosen, bounds), start.theta[rows], chosen, bounds)
        theta[rows] = refine_laws(found, chosen, bounds)
    return ScalingLaws(theta=theta)


def _better(
    theta: NDArray[np.float64], old: NDArray[np.float64], points: LossPoints, bounds: LawBounds
) -> NDArray[np.float64]:
    """Per domain, whichever of two laws fits better; unknown ones never do."""
    old = np.clip(old, bounds.low, bounds.high)
    scores = [huber_objective(predict(t, points).residual, points.weight) for t in (theta, old)]
    return np.where((scores[1] < scores[0])[:, None], old, theta)


def _search(points: LossPoints, bounds: LawBounds) -> NDArray[np.float64]:
    """The best law on a grid of alphas, by least squares reweighted towards the Huber loss; shape (num_domains, 3)."""
    grid, loss = _Grid.of(points, bounds), np.exp(points.log_loss)
    theta = _least_squares(loss, points.weight / loss**2, grid)
    for delta in PASSES:
        now = predict(theta, points)
        robust = np.minimum(1.0, delta / np.maximum(np.abs(now.residual), delta))
        linearised = now.loss * (1.0 - now.residual)
        theta = _least_squares(linearised, points.weight * robust / now.loss**2, grid)
    return theta


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Grid:
    """Laws epsilon + last · power(alpha), where `last` is the reducible loss at the last point."""

    alphas: NDArray[np.float64]
    powers: NDArray[np.float64]
    """(n_last / n)^alpha; shape (num_alphas, num_points)."""
    log_n_last: float
    bounds: LawBounds

    @classmethod
    def of(cls, points: LossPoints, bounds: LawBounds) -> "_Grid":
        alphas = bounds.max_alpha * np.arange(1, NUM_ALPHAS + 1) / NUM_ALPHAS
        powers = np.exp(np.outer(alphas, points.log_n[-1] - points.log_n))
        return cls(alphas=alphas, powers=powers, log_n_last=float(points.log_n[-1]), bounds=bounds)

    @property
    def max_last(self) -> NDArray[np.float64]:
        return np.exp(self.bounds.max_log_beta - self.alphas * self.log_n_last)


def _least_squares(loss: NDArray[np.float64], weight: NDArray[np.float64], grid: _Grid) -> NDArray[np.float64]:
    """Minimise sum weight · (law - loss)² over the grid's laws, exactly for every alpha; shape (num_domains, 3)."""
    weighted = weight * loss
    pairs = ((weight, grid.powers), (weight, grid.powers**2), (weighted, grid.powers))
    x, xx, xy = (np.einsum("km,am->ka", values, powers) for values, powers in pairs)
    one, y = weight.sum(axis=1)[:, None], weighted.sum(axis=1)[:, None]
    epsilon, last = _boxed(_Normal(one, x, xx, y, xy), grid)
    value = epsilon * (epsilon * one - 2 * y) + last * (2 * epsilon * x + last * xx - 2 * xy)
    best = value.argmin(axis=1)
    rows, alpha = np.arange(len(best)), grid.alphas[best]
    last_best = np.maximum(last[rows, best], np.exp(grid.bounds.min_log_beta - alpha * grid.log_n_last))
    log_beta = np.log(last_best) + alpha * grid.log_n_last
    return np.stack([log_beta, alpha, epsilon[rows, best]], axis=1)


@dataclass(frozen=True, slots=True, eq=False)
class _Normal:
    """Weighted sums of the normal equations; shape (num_domains, num_alphas) or (num_domains, 1)."""

    one: NDArray[np.float64]
    x: NDArray[np.float64]
    xx: NDArray[np.float64]
    y: NDArray[np.float64]
    xy: NDArray[np.float64]


def _boxed(sums: _Normal, grid: _Grid) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least squares over epsilon >= min_epsilon and 0 <= last <= max_last: the inside if it is there, else the best edge."""
    low, high = grid.bounds.min_epsilon, grid.max_last[None, :]
    determinant = np.maximum(sums.one * sums.xx - sums.x**2, 1e-14 * sums.one * sums.xx)
    last = (sums.one * sums.xy - sums.x * sums.y) / determinant
    epsilon = (sums.y - last * sums.x) / sums.one
    inside = (epsilon >= low) & (last >= 0) & (last <= high)
    edge_last = np.clip((sums.xy - low * sums.x) / sums.xx, 0, high)
    edges = [(np.full_like(last, low), edge_last)]
    edges += [
        (np.maximum((sums.y - at * sums.x) / sums.one, low), np.broadcast_to(at, last.shape)) for at in (0 * high, high)
    ]
    values = [e * (e * sums.one - 2 * sums.y) + b * (2 * e * sums.x + b * sums.xx - 2 * sums.xy) for e, b in edges]
    best = np.argmin(values, axis=0)
    epsilon = np.where(inside, epsilon, np.choose(best, [e for e, _ in edges]))
    return epsilon, np.where(inside, last, np.choose(best, [b for _, b in edges]))
