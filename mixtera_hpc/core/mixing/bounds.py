"""Floors and caps of weights: resolve them for every domain, and find the closest mixture within them, exactly.

Raising weights to the floor and dividing by the new sum, as both public ADO codes do, pushes the raised weights below
the floor again. Here all domains between their bounds are scaled by one common factor, and the code solves for that
factor: the projection in relative entropy, under which free domains keep their ratios. Price: one sort of 2K numbers
and about log2(2K) sums of K numbers.
"""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.weights import check_available
from mixtera_hpc.errors import MixtureError

__all__ = ["domain_bounds", "project_to_bounds", "weight_floor"]

Weights = NDArray[np.float64]

SUM_TOLERANCE = 1e-9
"""Floors may exceed 1, and caps fall short of 1, by this much: sums of decimal fractions are not exact."""


def weight_floor(num_domains: int, *, delta_min: float, floor_share: float) -> float:
    """Return the smallest weight of a domain: `delta_min`, but all floors together take at most `floor_share`.

    A fixed floor of 0.01 leaves nothing to decide from 100 domains on.
    """
    return min(delta_min, floor_share / num_domains)


def domain_bounds(
    floors: Sequence[float | None],
    caps: Sequence[float | None],
    *,
    default_floor: float | None,
    default_cap: float | None,
    sizes: NDArray[np.int64],
    names: Sequence[str],
) -> tuple[Weights, Weights] | None:
    """Return floor and cap of every domain, shape (K,) each; None if there is no bound at all.

    Domains without samples get floor 0 and cap 0.

    Args:
        floors: of each domain; None takes `default_floor`.
        caps: of each domain; None takes `default_cap`.
        sizes: items of each domain; shape (K,).
        names: of the domains, for messages.

    Raises:
        MixtureError: no mixture satisfies the bounds, or a domain without samples has its own floor.
    """
    if default_floor is None and default_cap is None and not any(b is not None for b in (*floors, *caps)):
        return None
    check_available(np.array([floor or 0.0 for floor in floors]), sizes, names)

    available = sizes > 0
    lowest = default_floor or 0.0
    highest = 1.0 if default_cap is None else default_cap
    floor = np.array([lowest if own is None else own for own in floors]) * available
    cap = np.array([highest if own is None else own for own in caps]) * available

    if floor.sum() > 1 + SUM_TOLERANCE or cap.sum() < 1 - SUM_TOLERANCE:
        raise MixtureError(
            f"The floors of the {available.sum()} domains with samples sum to {floor.sum():.6g} and their caps to "
            f"{cap.sum():.6g}; the floors must sum to at most 1 and the caps to at least 1.\n"
            "  Lower mixture.floor and the domains' floors, or raise mixture.cap and the domains' caps."
        )
    return floor, cap


def project_to_bounds(weights: Weights, floor: float | Weights, cap: float | Weights = 1.0) -> Weights:
    """Return the vector of sum 1 within [floor, cap] that is closest to `weights` in relative entropy; shape (K,).

    Args:
        weights: non-negative and finite, of any positive scale. All zero counts as equal weights.
        floor: one lower bound, or one per domain.
        cap: one upper bound, or one per domain.

    Raises:
        MixtureError: the floors sum to more than 1, or the caps to less.
    """
    low = np.broadcast_to(np.asarray(floor, np.float64), weights.shape)
    high = np.maximum(np.broadcast_to(np.asarray(cap, np.float64), weights.shape), low)
    if low.sum() > 1 + 1e-12 or high.sum() < 1 - 1e-12:
        raise MixtureError(
            f"No mixture of {len(weights)} domains lies between floors that sum to {low.sum():.6g} and caps that sum "
            f"to {high.sum():.6g}. Lower the floor or raise the caps."
        )

    requested = weights if weights.sum() > 0 else np.ones_like(weights)
    zero = requested == 0
    if zero.any() and np.where(zero, low, high).sum() < 1:
        # All domains with a weight are at their caps, and the sum is still below 1: the domains with weight 0 share
        # the rest equally, and the others stay at their caps.
        low = np.where(zero, low, high)
        requested = zero.astype(np.float64)
    return np.clip(_common_factor(requested, low, high) * requested, low, high)


def _common_factor(requested: Weights, low: Weights, high: Weights) -> float:
    """Return the factor s for which clip(s · requested, low, high) sums to 1."""
    positive = requested > 0
    fixed = low[~positive].sum()
    requested = requested[positive]
    low = low[positive]
    high = high[positive]

    # The sum is piecewise linear and non-decreasing in s. Its slope changes where a domain leaves its floor or meets
    # its cap; bisection finds the last such breakpoint at which the sum is still at most 1.
    leaves_low = low / requested
    meets_high = high / requested
    breakpoints = np.sort(np.concatenate([leaves_low, meets_high]))
    first_above = bisect_right(breakpoints, 1.0 - fixed, key=lambda s: np.clip(s * requested, low, high).sum())
    breakpoint_below = breakpoints[max(first_above - 1, 0)]

    # On the segment after that breakpoint only the free domains grow with s, so the factor follows from one division.
    free = (leaves_low <= breakpoint_below) & (breakpoint_below < meets_high)
    if not free.any():
        return float(breakpoint_below)
    bound = low[leaves_low > breakpoint_below].sum() + high[meets_high <= breakpoint_below].sum()
    factor = (1.0 - fixed - bound) / requested[free].sum()
    # What is left for the free domains may be less than the rounding of the sums; the factor stays on the segment.
    return float(max(factor, breakpoint_below))
