"""Descend from good laws to the minimum of the objective, for all domains at once.

The method is damped Newton steps in (log beta, alpha, epsilon) within a box. The Huber loss has curvature only where
residuals are small. Elsewhere the curvature of the reweighted quadratic that bounds it from above is used, mixed in
with a damping factor per domain. Newton steps do not depend on how the three parameters are scaled and correlated, and
neither does this damping. Price: a step costs ten sums over the (num_domains, num_points) array of the domains that
still move.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.laws.law_objective import LawBounds, LossPoints, huber_objective, predict

__all__ = ["refine_laws"]

Floats = NDArray[np.float64]

MAX_STEPS = 30
TOLERANCE = 1e-12
"""Stop when a step promises to change the objective by less than this."""
MIN_DAMPING = 1e-6
FIRST_DAMPING = 1.0
MAX_DAMPING = 1e8
"""Damping is the share of the bounding curvature that is added. Above the maximum a domain is not refined further."""


@dataclass(slots=True, eq=False)
class _DescentState:
    """The present law of every domain."""

    theta: Floats
    """Shape (num_domains, 3)."""
    value: Floats
    """The objective at `theta`; shape (num_domains,)."""
    damping: Floats
    """Shape (num_domains,)."""


def refine_laws(theta: Floats, points: LossPoints, bounds: LawBounds) -> Floats:
    """Return laws at least as good as `theta`, shape (num_domains, 3), and within `bounds` if `theta` is."""
    value = huber_objective(predict(theta, points).residual, points.weight, bounds.huber_delta)
    descent = _DescentState(theta.copy(), value, np.full(len(theta), FIRST_DAMPING))
    moving = np.arange(len(theta))
    for _ in range(MAX_STEPS):
        moving = moving[_try_step(descent, moving, points.take(moving), bounds)]
        if not len(moving):
            break
    return descent.theta


def _try_step(
    descent: _DescentState, rows: NDArray[np.intp], points: LossPoints, bounds: LawBounds
) -> NDArray[np.bool_]:
    """Try one step for the domains `rows`, which `points` belong to; return True where another step may help."""
    theta = descent.theta[rows]
    damping = descent.damping[rows]
    gradient, curvature = _derivatives(theta, damping, points, bounds.huber_delta)
    candidate = _step_within_box(theta, _newton_step(theta, gradient, curvature, bounds), bounds)
    promise = np.abs(np.einsum("ki,ki->k", gradient, candidate - theta))

    # Accept only improvements. Trust the curvature more after one, less after a failure.
    value = huber_objective(predict(candidate, points).residual, points.weight, bounds.huber_delta)
    better = value < descent.value[rows]
    descent.theta[rows[better]] = candidate[better]
    descent.value[rows[better]] = value[better]
    descent.damping[rows] = np.maximum(np.where(better, damping / 8, damping * 4), MIN_DAMPING)
    goes_on: NDArray[np.bool_] = (descent.damping[rows] <= MAX_DAMPING) & (promise > TOLERANCE)
    return goes_on


def _derivatives(theta: Floats, damping: Floats, points: LossPoints, delta: float) -> tuple[Floats, Floats]:
    """Return gradient (num_domains, 3) and damped curvature (num_domains, 3, 3) of the objective."""
    present = predict(theta, points)
    size = np.abs(present.residual)

    # First and second derivative of the Huber loss in log L: its own curvature near 0, plus `damping` times that of the
    # quadratic that bounds it from above. `- pull` stems from the curvature of the logarithm.
    pull = points.weight * np.clip(present.residual / delta, -1, 1)
    bounding = np.minimum(1.0, delta / np.maximum(size, delta))
    stiffness = points.weight / delta * ((size <= delta) + damping[:, None] * bounding) - pull

    # Derivatives of log L with respect to log beta, alpha and epsilon.
    share = present.reducible / present.loss
    slopes = (share, -points.log_n * share, 1.0 / present.loss)
    gradient = np.stack([np.einsum("km,km->k", pull, slope) for slope in slopes], axis=1)

    curvature = np.empty((len(theta), 3, 3))
    for i, slope in enumerate(slopes):
        stiff = stiffness * slope
        for j in range(i + 1):
            curvature[:, i, j] = curvature[:, j, i] = np.einsum("km,km->k", stiff, slopes[j])

    # Second derivatives of the law itself: only beta · n^-alpha bends, in log beta and alpha.
    powers = np.stack([np.ones_like(points.log_n), -points.log_n, points.log_n**2])
    bend = np.einsum("km,im->ki", pull * share, powers)
    curvature[:, :2, :2] += bend[:, [[0, 1], [1, 2]]]
    return gradient, curvature


def _newton_step(theta: Floats, gradient: Floats, curvature: Floats, bounds: LawBounds) -> Floats:
    """Return the step to the minimum of the quadratic; parameters at a bound that would leave the box stay fixed."""
    at_low = theta <= bounds.low
    at_high = theta >= bounds.high
    fixed = (at_low & (gradient > 0)) | (at_high & (gradient < 0))
    step = np.zeros_like(theta)
    # Fixing one parameter may turn the step of another outwards, so repeat; there are three parameters.
    for _ in range(3):
        step = np.where(fixed, 0.0, _solve_free(curvature, gradient, fixed))
        leaves_box = (at_low & (step < 0)) | (at_high & (step > 0))
        if not leaves_box.any():
            return step
        fixed |= leaves_box
    return np.where(fixed, 0.0, step)


def _solve_free(curvature: Floats, gradient: Floats, fixed: NDArray[np.bool_]) -> Floats:
    """Return -curvature⁻¹ · gradient over the parameters that are not fixed; 0 where that has no solution."""
    # Scale the diagonal to 1, so that the small constants below are relative, and decouple the fixed parameters.
    scale = np.sqrt(np.abs(np.einsum("kii->ki", curvature))) + 1e-12
    unit = np.where(fixed[:, :, None] | fixed[:, None, :], 0.0, curvature / scale[:, :, None] / scale[:, None, :])
    unit += np.where(fixed, 1.0, 1e-12)[:, :, None] * np.eye(3)
    try:
        step = -np.linalg.solve(unit, (gradient / scale)[:, :, None])[:, :, 0] / scale
    except np.linalg.LinAlgError:
        return np.zeros_like(gradient)
    return np.where(np.isfinite(step), step, 0.0)


def _step_within_box(theta: Floats, step: Floats, bounds: LawBounds) -> Floats:
    """Return `theta` moved by the longest part of `step`, at most the whole step, that stays in the box."""
    wall = np.where(step > 0, bounds.high, bounds.low)
    room = np.divide(wall - theta, step, out=np.full_like(step, np.inf), where=step != 0)
    reach = np.minimum(1.0, room.min(axis=1, keepdims=True))
    # Exactly on the wall where it limits the step: theta + reach · step may be off by rounding.
    return np.clip(np.where(room <= reach, wall, theta + reach * step), bounds.low, bounds.high)
