"""Fit one power law per domain, L(n) = epsilon + beta · n^-alpha, to the losses of all domains at once.

The objective is that of ADO: a Huber loss on log L, quadratic below a small residual and linear above, within
bounds. For a given alpha the law is linear in (epsilon, beta). So a grid over alpha turns each pass of reweighted least
squares into three matrix products, which find the best alpha of every domain globally. `law_refinement` then descends
to the minimum of the objective itself. Price: about 15 passes over a (num_domains, num_points) array, then about twenty
more over the domains that still move. The products are einsums and not BLAS calls, so their bits do not depend on the
number of threads of the process.

The three parameters are not identifiable from noisy losses, but the slope at the present n is. Compare speeds, not
parameters. Source: arXiv 2410.11820, equation (1).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.laws.law_grid import AlphaGrid, grid_sums, solve_in_box
from mixtera_hpc.core.mixing.laws.law_objective import LawBounds, LossPoints, huber_objective, predict
from mixtera_hpc.core.mixing.laws.law_refinement import refine_laws

__all__ = ["MIN_POINTS", "ScalingLaws", "fit_laws"]

Floats = NDArray[np.float64]

MIN_POINTS = 3
"""A law has three parameters; fewer distinct points do not determine it."""

PASSES = (3e-2, 1e-2, 3e-3, 0.0, 0.0, 0.0)
"""Residuals above which losses count linearly, but at least `LawBounds.huber_delta`, one per reweighted pass; the pass
before them is unweighted."""

GROUP_DOMAINS = 256
"""Domains that are fitted together: their arrays of 256 points, 0.5 MB each, stay in a core's cache."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScalingLaws:
    """L(n) = epsilon + beta · n^-alpha for every domain, n in sequences; rows of NaN where no law is known."""

    theta: Floats
    """Columns log beta, alpha, epsilon (nats), with n counted in `unit`; shape (num_domains, 3)."""
    unit: float = 1.0
    """Sequences. With it, the bound on log beta does not depend on what counts as a sequence."""

    @classmethod
    def unknown(cls, num_domains: int) -> "ScalingLaws":
        """Return laws of which none is known."""
        return cls(theta=np.full((num_domains, 3), np.nan))

    @property
    def known(self) -> NDArray[np.bool_]:
        """Domains with a law; shape (num_domains,)."""
        is_finite: NDArray[np.bool_] = np.isfinite(self.theta.sum(axis=1))
        return is_finite

    @property
    def beta(self) -> Floats:
        """Reducible loss at n = 1 sequence, nats; shape (num_domains,)."""
        beta: Floats = np.exp(self.theta[:, 0] + self.alpha * np.log(self.unit))
        return beta

    @property
    def alpha(self) -> Floats:
        """Exponents; shape (num_domains,)."""
        return self.theta[:, 1]

    @property
    def epsilon(self) -> Floats:
        """Irreducible loss, nats; shape (num_domains,)."""
        return self.theta[:, 2]

    def speed(self, n: float, min_alpha: float = 0.0) -> Floats:
        """Return -dL/dn at `n`, in nats per sequence of any domain; shape (num_domains,).

        Args:
            min_alpha: lower bound for the factor alpha; the exponent keeps its value.
        """
        reducible = np.exp(self.theta[:, 0] - self.alpha * np.log(n / self.unit))
        speed: Floats = np.maximum(self.alpha, min_alpha) * reducible / n
        return speed


def fit_laws(points: LossPoints, bounds: LawBounds, start: ScalingLaws) -> ScalingLaws:
    """Return the laws that fit `points` best; unknown for domains with fewer than `MIN_POINTS` points. Never raises.

    Args:
        start: laws of an earlier fit. If one fits better than the best law of the grid, the descent begins there.
    """
    theta = np.full((len(points.log_loss), 3), np.nan)
    rows = np.flatnonzero((points.weight > 0).sum(axis=1) >= MIN_POINTS)
    # Domains are independent of each other, so the size of a group changes no bit of a law.
    for first in range(0, len(rows), GROUP_DOMAINS):
        group = rows[first : first + GROUP_DOMAINS]
        chosen = points.take(group)
        initial = _better_laws(_search_grid(chosen, bounds), start.theta[group], chosen, bounds)
        theta[group] = refine_laws(initial, chosen, bounds)
    return ScalingLaws(theta=theta)


def _better_laws(theta: Floats, old: Floats, points: LossPoints, bounds: LawBounds) -> Floats:
    """Return, for each domain, the law that fits better; an unknown old law never does."""
    old = np.clip(old, bounds.low, bounds.high)
    score = huber_objective(predict(theta, points).residual, points.weight, bounds.huber_delta)
    old_score = huber_objective(predict(old, points).residual, points.weight, bounds.huber_delta)
    return np.where((old_score < score)[:, None], old, theta)


def _search_grid(points: LossPoints, bounds: LawBounds) -> Floats:
    """Return the best laws on a grid of alphas; shape (num_domains, 3)."""
    grid = AlphaGrid.of(points, bounds)
    loss = np.exp(points.log_loss)
    theta = _least_squares(loss, points.weight / loss**2, grid)
    for delta in (max(least, bounds.huber_delta) for least in PASSES):
        # Iteratively reweighted least squares: points with residuals above delta get weight delta / |residual|. The
        # residual of log L becomes one of L by linearising around the present law.
        present = predict(theta, points)
        robust = np.minimum(1.0, delta / np.maximum(np.abs(present.residual), delta))
        linearised = present.loss * (1.0 - present.residual)
        theta = _least_squares(linearised, points.weight * robust / present.loss**2, grid)
    return theta


def _least_squares(loss: Floats, weight: Floats, grid: AlphaGrid) -> Floats:
    """Minimise sum weight · (law - loss)² over the laws of the grid, exactly for every alpha; (num_domains, 3)."""
    sums = grid_sums(loss, weight, grid)
    epsilon, last = solve_in_box(sums, grid.bounds.min_epsilon, grid.max_last)
    best = sums.value(epsilon, last).argmin(axis=1)

    # Back from (alpha, last) to (log beta, alpha), with `last` large enough for the lower bound on beta.
    rows = np.arange(len(best))
    alpha = grid.alphas[best]
    min_last = np.exp(grid.bounds.min_log_beta - alpha * grid.log_n_last)
    log_beta = np.log(np.maximum(last[rows, best], min_last)) + alpha * grid.log_n_last
    return np.stack([log_beta, alpha, epsilon[rows, best]], axis=1)
