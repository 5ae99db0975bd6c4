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

from mixtera_hpc.core.mixing.laws.law_objective import LawBounds, LossPoints, Prediction, huber_objective, predict

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
    """The present laws of the domains that still move."""

    theta: Floats
    """Shape (num_domains, 3)."""
    value: Floats
    """The objective at `theta`; shape (num_domains,)."""
    damping: Floats
    """Shape (num_domains,)."""
    present: Prediction
    """Prediction of `theta`, stored so that a step evaluates the laws only once."""

    def take(self, rows: NDArray[np.intp]) -> "_DescentState":
        """Return the state of some domains."""
        return _DescentState(self.theta[rows], self.value[rows], self.damping[rows], self.present.take(rows))

    def accept(self, better: NDArray[np.bool_], theta: Floats, value: Floats, present: Prediction) -> None:
        """Move the domains where `better` is set."""
        if better.all():
            self.theta = theta
            self.value = value
            self.present = present
            return
        self.theta[better] = theta[better]
        self.value[better] = value[better]
        self.present.replace_rows(better, present)


def refine_laws(theta: Floats, points: LossPoints, bounds: LawBounds) -> Floats:
    """Return laws at least as good as `theta`, shape (num_domains, 3), and within `bounds` if `theta` is."""
    refined = theta.copy()
    present = predict(theta, points)
    value = huber_objective(present.residual, points.weight, bounds.huber_delta)
    moving = np.arange(len(theta))
    descent = _DescentState(refined[moving], value, np.full(len(theta), FIRST_DAMPING), present)
    for _ in range(MAX_STEPS):
        goes_on = _try_step(descent, points, bounds)
        if not goes_on.all():
            # Domains that have arrived leave the arrays, which the price of a step depends on.
            refined[moving] = descent.theta
            rows = np.flatnonzero(goes_on)
            moving = moving[rows]
            descent = descent.take(rows)
            points = points.take(rows)
        if not len(moving):
            break
    refined[moving] = descent.theta
    return refined


def _try_step(descent: _DescentState, points: LossPoints, bounds: LawBounds) -> NDArray[np.bool_]:
    """Try one step for every domain; return True where another step may help."""
    theta = descent.theta
    damping = descent.damping
    gradient, curvature = _derivatives(descent, points, bounds.huber_delta)
    candidate = _step_within_box(theta, _newton_step(theta, gradient, curvature, bounds), bounds)
    promise = np.abs(np.einsum("ki,ki->k", gradient, candidate - theta))

    # Accept only improvements. Trust the curvature more after one, less after a failure.
    predicted = predict(candidate, points)
    value = huber_objective(predicted.residual, points.weight, bounds.huber_delta)
    better = value < descent.value
    descent.accept(better, candidate, value, predicted)
    descent.damping = np.maximum(np.where(better, damping / 8, damping * 4), MIN_DAMPING)
    goes_on: NDArray[np.bool_] = (descent.damping <= MAX_DAMPING) & (promise > TOLERANCE)
    return goes_on


def _derivatives(descent: _DescentState, points: LossPoints, delta: float) -> tuple[Floats, Floats]:
    """Return gradient (num_domains, 3) and damped curvature (num_domains, 3, 3) of the objective."""
    present = descent.present
    size = np.abs(present.residual)

    # First and second derivative of the Huber loss in log L: its own curvature near 0, plus `damping` times that of the
    # quadratic that bounds it from above. `- pull` stems from the curvature of the logarithm.
    pull = points.weight * np.clip(present.residual / delta, -1, 1)
    bounding = np.minimum(1.0, delta / np.maximum(size, delta))
    stiffness = points.weight / delta * ((size <= delta) + descent.damping[:, None] * bounding) - pull

    # Derivatives of log L with respect to log beta, alpha and epsilon.
    share = present.reducible / present.loss
    slopes = (share, -points.log_n * share, 1.0 / present.loss)
    gradient = np.stack([np.einsum("km,km->k", pull, slope) for slope in slopes], axis=1)

    curvature = np.empty((len(gradient), 3, 3))
    for i, slope in enumerate(slopes):
        stiff = stiffness * slope
        for j in range(i + 1):
            curvature[:, i, j] = curvature[:, j, i] = np.einsum("km,km->k", stiff, slopes[j])

    # Second derivatives of the law itself: only beta · n^-alpha bends, in log beta and alpha. Two of the three sums are
    # those of the gradient.
    curvature[:, 0, :2] += gradient[:, :2]
    curvature[:, 1, 0] += gradient[:, 1]
    curvature[:, 1, 1] += np.einsum("km,m->k", pull * share, points.log_n**2)
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
