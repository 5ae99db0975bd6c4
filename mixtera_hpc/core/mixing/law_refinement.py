"""Descend from a good law to the minimum of the objective, for all domains at once.

Damped Newton steps in (log beta, alpha, epsilon) within a box. The Huber loss has curvature only where residuals are small;
elsewhere the curvature of the reweighted quadratic that bounds it from above stands in, mixed in by a damping factor per
domain. Newton steps ignore how the three numbers are scaled and correlated, and so does this damping. Price: a step costs
ten sums over the (num_domains, num_points) array of the domains that still move.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.law_objective import HUBER_DELTA, LawBounds, LossPoints, huber_objective, predict

__all__ = ["refine_laws"]

MAX_STEPS = 30
TOLERANCE = 1e-12
"""Stop once a step promises to change the objective by less than this."""
DAMPING = (1e-6, 1.0, 1e8)
"""Smallest, first and largest share of the bounding curvature; beyond the largest a domain has come to rest."""


@dataclass(slots=True, eq=False)
class _Walk:
    """Where every domain stands."""

    theta: NDArray[np.float64]
    value: NDArray[np.float64]
    damping: NDArray[np.float64]


def refine_laws(theta: NDArray[np.float64], points: LossPoints, bounds: LawBounds) -> NDArray[np.float64]:
    """Laws at least as good as `theta`, shape (num_domains, 3), and within `bounds` as `theta` is."""
    value = huber_objective(predict(theta, points).residual, points.weight)
    walk = _Walk(theta.copy(), value, np.full(len(theta), DAMPING[1]))
    moving = np.arange(len(theta))
    for _ in range(MAX_STEPS):
        moving = moving[_step(walk, moving, points.take(moving), bounds)]
        if not len(moving):
            break
    return walk.theta


def _step(walk: _Walk, rows: NDArray[np.intp], points: LossPoints, bounds: LawBounds) -> NDArray[np.bool_]:
    """Try one step for `rows`, which `points` belong to; True where another may help."""
    theta, damping = walk.theta[rows], walk.damping[rows]
    gradient, curvature = _derivatives(theta, damping, points)
    tried = _within(theta, _newton(theta, gradient, curvature, bounds), bounds)
    promise = np.abs(np.einsum("ki,ki->k", gradient, tried - theta))
    value = huber_objective(predict(tried, points).residual, points.weight)
    better = value < walk.value[rows]
    walk.theta[rows[better]] = tried[better]
    walk.value[rows[better]] = value[better]
    walk.damping[rows] = np.maximum(np.where(better, damping / 8, damping * 4), DAMPING[0])
    return (walk.damping[rows] <= DAMPING[2]) & (promise > TOLERANCE)


def _derivatives(
    theta: NDArray[np.float64], damping: NDArray[np.float64], points: LossPoints
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gradient (num_domains, 3) and damped curvature (num_domains, 3, 3) of the objective."""
    now = predict(theta, points)
    size = np.abs(now.residual)
    pull = points.weight * np.clip(now.residual / HUBER_DELTA, -1, 1)
    bounding = np.minimum(1.0, HUBER_DELTA / np.maximum(size, HUBER_DELTA))
    stiffness = points.weight / HUBER_DELTA * ((size <= HUBER_DELTA) + damping[:, None] * bounding) - pull
    share = now.reducible / now.loss
    slopes = (share, -points.log_n * share, 1.0 / now.loss)
    gradient = np.stack([np.einsum("km,km->k", pull, slope) for slope in slopes], axis=1)
    curvature = np.empty((len(theta), 3, 3))
    for i, slope in enumerate(slopes):
        stiff = stiffness * slope
        for j in range(i + 1):
            curvature[:, i, j] = curvature[:, j, i] = np.einsum("km,km->k", stiff, slopes[j])
    powers = np.stack([np.ones_like(points.log_n), -points.log_n, points.log_n**2])
    bend = np.einsum("km,im->ki", pull * share, powers)
    curvature[:, :2, :2] += bend[:, [[0, 1], [1, 2]]]
    return gradient, curvature


def _newton(
    theta: NDArray[np.float64], gradient: NDArray[np.float64], curvature: NDArray[np.float64], bounds: LawBounds
) -> NDArray[np.float64]:
    """The step to where the quadratic is flat, with numbers held that stand at a bound and would leave the box."""
    at_low, at_high = theta <= bounds.low, theta >= bounds.high
    held = (at_low & (gradient > 0)) | (at_high & (gradient < 0))
    step = np.zeros_like(theta)
    for _ in range(3):
        step = np.where(held, 0.0, _solve(curvature, gradient, held))
        leaves = (at_low & (step < 0)) | (at_high & (step > 0))
        if not leaves.any():
            return step
        held |= leaves
    return np.where(held, 0.0, step)


def _solve(
    curvature: NDArray[np.float64], gradient: NDArray[np.float64], held: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """-curvature⁻¹ · gradient over the numbers not `held`; no step at all where that has no answer."""
    scale = np.sqrt(np.abs(np.einsum("kii->ki", curvature))) + 1e-12
    unit = np.where(held[:, :, None] | held[:, None, :], 0.0, curvature / scale[:, :, None] / scale[:, None, :])
    unit += np.where(held, 1.0, 1e-12)[:, :, None] * np.eye(3)
    try:
        step = -np.linalg.solve(unit, (gradient / scale)[:, :, None])[:, :, 0] / scale
    except np.linalg.LinAlgError:
        return np.zeros_like(gradient)
    return np.where(np.isfinite(step), step, 0.0)


def _within(theta: NDArray[np.float64], step: NDArray[np.float64], bounds: LawBounds) -> NDArray[np.float64]:
    """`theta` moved by the longest part of `step`, at most all of it, that stays in the box."""
    wall = np.where(step > 0, bounds.high, bounds.low)
    room = np.divide(wall - theta, step, out=np.full_like(step, np.inf), where=step != 0)
    reach = np.minimum(1.0, room.min(axis=1, keepdims=True))
    return np.clip(np.where(room <= reach, wall, theta + reach * step), bounds.low, bounds.high)
