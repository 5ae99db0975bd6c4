"""Least squares over the laws of a grid of exponents: for a given alpha, a law is linear in epsilon and beta.

Price: three einsums over (num_domains, num_alphas, num_points) per pass.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.laws.law_objective import LawBounds, LossPoints

__all__ = ["AlphaGrid", "NormalSums", "grid_sums", "solve_in_box"]

Floats = NDArray[np.float64]

NUM_ALPHAS = 40
"""Exponents tried in the global search."""

MIN_DETERMINANT = 1e-14
"""Smallest determinant of the normal equations, relative to the product of their diagonal."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AlphaGrid:
    """Laws epsilon + last · power(alpha), where `last` is the reducible loss at the last point."""

    alphas: Floats
    """Shape (num_alphas,)."""
    powers: Floats
    """(n_last / n)^alpha; shape (num_alphas, num_points)."""
    upper_squares: Floats
    """The squares of the upper half of `powers`; those of the lower half are powers of the grid."""
    log_n_last: float
    bounds: LawBounds

    @classmethod
    def of(cls, points: LossPoints, bounds: LawBounds) -> "AlphaGrid":
        """Return equally spaced exponents up to the largest one allowed, with their powers at `points`."""
        alphas = bounds.max_alpha * np.arange(1, NUM_ALPHAS + 1) / NUM_ALPHAS
        powers = np.exp(np.outer(alphas, points.log_n[-1] - points.log_n))
        return cls(
            alphas=alphas,
            powers=powers,
            upper_squares=powers[NUM_ALPHAS // 2 :] ** 2,
            log_n_last=float(points.log_n[-1]),
            bounds=bounds,
        )

    @property
    def max_last(self) -> Floats:
        """The bound on beta, as a bound on `last`; shape (num_alphas,)."""
        return np.exp(self.bounds.max_log_beta - self.alphas * self.log_n_last)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NormalSums:
    """Weighted sums of the normal equations; shape (num_domains, num_alphas), or (num_domains, 1) without x."""

    one: Floats
    x: Floats
    xx: Floats
    y: Floats
    xy: Floats

    def value(self, epsilon: Floats, last: Floats) -> Floats:
        """Return the squared error of the laws epsilon + last · x, up to a constant; (num_domains, num_alphas)."""
        return epsilon * (epsilon * self.one - 2 * self.y) + last * (
            2 * epsilon * self.x + last * self.xx - 2 * self.xy
        )


def grid_sums(loss: Floats, weight: Floats, grid: AlphaGrid) -> NormalSums:
    """Return the sums of the normal equations for every domain and alpha, with x = power(alpha) and y = loss."""
    weighted_loss = weight * loss
    x = np.einsum("km,am->ka", weight, grid.powers)
    # Alphas are equally spaced from 0 on, so that the square of power k is power 2k.
    xx = np.concatenate([x[:, 1::2], np.einsum("km,am->ka", weight, grid.upper_squares)], axis=1)
    return NormalSums(
        one=weight.sum(axis=1)[:, None],
        x=x,
        xx=xx,
        y=weighted_loss.sum(axis=1)[:, None],
        xy=np.einsum("km,am->ka", weighted_loss, grid.powers),
    )


def solve_in_box(sums: NormalSums, low: float, high: Floats) -> tuple[Floats, Floats]:
    """Solve least squares over epsilon >= low and 0 <= last <= high; (num_domains, num_alphas) each.

    The problem is convex: if the unconstrained solution lies outside the box, the minimum lies on an edge of it.

    Args:
        sums: the sums of the normal equations.
        low: lower bound of epsilon, nats.
        high: upper bound of `last`; shape (num_alphas,), or (num_domains, 1).
    """
    # The unconstrained solution. The determinant vanishes if all powers are equal.
    determinant = np.maximum(sums.one * sums.xx - sums.x**2, MIN_DETERMINANT * sums.one * sums.xx)
    last = (sums.one * sums.xy - sums.x * sums.y) / determinant
    epsilon = (sums.y - last * sums.x) / sums.one
    inside = (epsilon >= low) & (last >= 0) & (last <= high)

    # The best point of each of the three edges: epsilon at its bound, last at 0, last at its bound.
    edge_points = [(np.full_like(last, low), np.clip((sums.xy - low * sums.x) / sums.xx, 0, high))]
    for fixed in (0 * high, high):
        free = np.maximum((sums.y - fixed * sums.x) / sums.one, low)
        edge_points.append((free, np.broadcast_to(fixed, last.shape)))
    best = np.argmin([sums.value(e, b) for e, b in edge_points], axis=0)
    edge_epsilon = np.choose(best, [e for e, _ in edge_points])
    edge_last = np.choose(best, [b for _, b in edge_points])
    return np.where(inside, epsilon, edge_epsilon), np.where(inside, last, edge_last)
