"""Move the exponent of the best law half of the way to the mean of all exponents that the losses allow.

Losses of a run determine the exponent of a law badly: many exponents fit nearly as well as the best one, with different
slopes at the present n. The best of them follows the noise. The mean, in which each exponent counts with its
likelihood, scatters less, but is biased towards the middle of the box. With 84 domains of known laws, alpha from 0.15
to 0.4, where the mean loss of a sequence scatters by 0.35 nats, the error of speeds at the second refit (root mean
square) is 0.18 for the best exponent, 0.15 half of the way and 0.14 for the mean; the bias of speeds is 0.00, -0.04 and
-0.06. Price: one more pass over the grid.
"""

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.laws.law_grid import AlphaGrid, NormalSums, grid_sums, solve_in_box
from mixtera_hpc.core.mixing.laws.law_objective import LawBounds, LossPoints, predict

__all__ = ["average_exponents"]

Floats = NDArray[np.float64]

NUM_PARAMETERS = 3
SHIFT_SHARE = 0.5
"""Fraction of the way to the mean by which an exponent moves."""
SAME = 1e-9
"""A smaller change of an exponent leaves a law as it is."""
GROUP_DOMAINS = 256
"""Domains that are averaged together, so that their arrays stay in a core's cache."""


def average_exponents(theta: Floats, points: LossPoints, bounds: LawBounds) -> Floats:
    """Return laws with averaged exponents, and epsilon and beta that fit best with them; shape (num_domains, 3).

    Args:
        theta: the laws that fit best. Rows of NaN, unknown laws, stay as they are.
        points: the losses that they were fitted to.
        bounds: the box of all laws; every exponent in it counts as equally probable before the losses are seen.
    """
    averaged = theta.copy()
    rows = np.flatnonzero(np.isfinite(theta).all(axis=1))
    # Domains are independent of each other, so the size of a group changes no bit of a law.
    for first in range(0, len(rows), GROUP_DOMAINS):
        group = rows[first : first + GROUP_DOMAINS]
        averaged[group] = _average_group(theta[group], points.take(group), bounds)
    return averaged


def _average_group(theta: Floats, points: LossPoints, bounds: LawBounds) -> Floats:
    """Return the averaged laws of some domains; shape (num_domains, 3)."""
    # As in the last pass of the fit: residuals of log L near the best law, large ones with less weight.
    present = predict(theta, points)
    size = np.abs(present.residual)
    robust = points.weight * np.minimum(1.0, bounds.huber_delta / np.maximum(size, bounds.huber_delta))
    loss = present.loss * (1.0 - present.residual)
    weight = robust / present.loss**2

    grid = AlphaGrid.of(points, bounds)
    sums = grid_sums(loss, weight, grid)
    squares = sums.value(*solve_in_box(sums, bounds.min_epsilon, grid.max_last))
    squares += np.einsum("km,km->k", weight, loss**2)[:, None]
    best_square = np.minimum(squares.min(axis=1), np.einsum("km,km->k", robust, size**2))
    num_free = np.maximum((points.weight > 0).sum(axis=1) - NUM_PARAMETERS, 0)
    likelihood = _likelihood(squares, best_square, num_free)

    # The best exponent lies between those of the grid, so its shift is averaged, not the exponent itself.
    shift = SHIFT_SHARE * (likelihood @ grid.alphas - grid.alphas[squares.argmin(axis=1)])
    alpha = np.clip(theta[:, 1] + shift, 0.0, bounds.max_alpha)
    refitted = _fit_with_exponents(alpha, loss, weight, points, bounds)
    return np.where(np.abs(shift)[:, None] < SAME, theta, refitted)


def _likelihood(squares: Floats, best_square: Floats, num_free: NDArray[np.int64]) -> Floats:
    """Return the likelihood of every exponent of the grid, sum 1; shape (num_domains, num_alphas).

    The variance of a loss is estimated from the residuals of the best law, with `num_free` degrees of freedom.
    """
    # `tiny` avoids a division by 0 where a law fits exactly. Rounding may make a square negative there.
    tiny = np.finfo(np.float64).tiny
    excess = np.maximum(squares - best_square[:, None], 0.0) / np.maximum(best_square, tiny)[:, None]
    exponent = -0.5 * excess * num_free[:, None]
    likelihood: Floats = np.exp(exponent - exponent.max(axis=1, keepdims=True))
    likelihood /= likelihood.sum(axis=1, keepdims=True)
    return likelihood


def _fit_with_exponents(alpha: Floats, loss: Floats, weight: Floats, points: LossPoints, bounds: LawBounds) -> Floats:
    """Return the laws that fit best with one given exponent per domain; shape (num_domains, 3)."""
    log_n_last = float(points.log_n[-1])
    power = np.exp(alpha[:, None] * (log_n_last - points.log_n))
    weighted_power = weight * power
    sums = NormalSums(
        one=weight.sum(axis=1)[:, None],
        x=weighted_power.sum(axis=1)[:, None],
        xx=(weighted_power * power).sum(axis=1)[:, None],
        y=(weight * loss).sum(axis=1)[:, None],
        xy=(weighted_power * loss).sum(axis=1)[:, None],
    )
    # The bounds on beta, as bounds on the reducible loss at the last point.
    low = np.exp(bounds.min_log_beta - alpha * log_n_last)
    high = np.exp(bounds.max_log_beta - alpha * log_n_last)
    epsilon, last = solve_in_box(sums, bounds.min_epsilon, high[:, None])
    log_beta = np.log(np.maximum(last[:, 0], low)) + alpha * log_n_last
    return np.stack([log_beta, alpha, epsilon[:, 0]], axis=1)
