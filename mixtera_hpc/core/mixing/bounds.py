"""The mixture closest to a wish that keeps every domain between a floor and a cap, exactly.

Raising what is below the floor and dividing by the new sum, as both public ADO codes do, pushes the raised ones below the
floor again. Here all domains between their bounds are scaled by one common factor, and that factor is solved for: the
projection in relative entropy, under which free domains keep their ratios. Price: one sort of 2K numbers and about log2(2K)
sums of K.
"""

from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import MixtureError

__all__ = ["project_to_bounds", "weight_floor"]


def weight_floor(num_domains: int, *, delta_min: float, floor_share: float) -> float:
    """The smallest weight a domain may have: `delta_min`, but all floors together take at most `floor_share`.

    A fixed floor of 0.01 leaves nothing to decide from 100 domains on.
    """
    return min(delta_min, floor_share / num_domains)


def project_to_bounds(
    weights: NDArray[np.float64],
    floor: float | NDArray[np.float64],
    cap: float | NDArray[np.float64] = 1.0,
) -> NDArray[np.float64]:
    """The vector of sum 1 within [floor, cap] that is closest to `weights` in relative entropy; shape (num_domains,).

    Args:
        weights: non-negative and finite, of any positive scale; where all are zero they count as equal.
        floor: one lower bound, or one per domain.
        cap: one upper bound, or one per domain; what an exhausted domain may still be served, for instance.

    Raises:
        MixtureError: the floors sum to more than 1, or the caps to less.
    """
    low = np.broadcast_to(np.asarray(floor, np.float64), weights.shape)
    high = np.maximum(np.broadcast_to(np.asarray(cap, np.float64), weights.shape), low)
    if low.sum() > 1 + 1e-12 or high.sum() < 1 - 1e-12:
        raise MixtureError(
            f"No mixture of {len(weights)} domains lies between floors that sum to {low.sum():.6g} and caps that sum to "
            f"{high.sum():.6g}. Lower the floor or raise the caps."
        )
    wish = weights if weights.sum() > 0 else np.ones_like(weights)
    zero = wish == 0
    if zero.any() and np.where(zero, low, high).sum() < 1:  # The wished ones are full; the others share what remains.
        low, wish = np.where(zero, low, high), zero.astype(np.float64)
    return np.clip(_scale(wish, low, high) * wish, low, high)


def _scale(wish: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]) -> float:
    """The factor s for which clip(s · wish, low, high) sums to 1."""
    wished = wish > 0
    fixed, wish, low, high = low[~wished].sum(), wish[wished], low[wished], high[wished]
    leaves_low, meets_high = low / wish, high / wish
    breakpoints = np.sort(np.concatenate([leaves_low, meets_high]))
    first = bisect_right(breakpoints, 1.0 - fixed, key=lambda s: np.clip(s * wish, low, high).sum())
    at = breakpoints[max(first - 1, 0)]
    free = (leaves_low <= at) & (at < meets_high)
    if not free.any():
        return float(at)
    bound = low[leaves_low > at].sum() + high[meets_high <= at].sum()
    return float((1.0 - fixed - bound) / wish[free].sum())
