"""The objective of a fitted scaling law: observed losses, bounds on the law, and a Huber loss on log L.

A law is a row theta = (log beta, alpha, epsilon) of L(n) = epsilon + beta · n^-alpha.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BOUND_NAMES",
    "HUBER_DELTA",
    "LawBounds",
    "LossPoints",
    "Prediction",
    "bounds_reached",
    "huber_objective",
    "predict",
    "rms_residual",
]

HUBER_DELTA = 1e-3
"""Residuals of log L above this count linearly, unless `LawBounds.huber_delta` says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossPoints:
    """Observed mean losses of all domains at the same values of n."""

    log_n: NDArray[np.float64]
    """Log of the sequences seen so far, all domains together; ascending, shape (num_points,)."""
    log_loss: NDArray[np.float64]
    """Log of the mean token loss in nats, 0 where `weight` is 0; shape (num_domains, num_points)."""
    weight: NDArray[np.float64]
    """Weight of each point. Rows sum to 1; 0 where a domain has no observation. Shape (num_domains, num_points)."""

    @classmethod
    def of(cls, log_n: NDArray[np.float64], loss: NDArray[np.float64], weight: NDArray[np.float64]) -> "LossPoints":
        """Return points of mean losses in nats; losses that are not finite and positive get weight 0."""
        # The logarithm exists only for positive losses; one wild value must not end a fit.
        usable = np.isfinite(loss) & (loss > 0) & (weight > 0)
        weight = np.where(usable, weight, 0.0)
        total = weight.sum(axis=1, keepdims=True)
        log_loss = np.log(loss, out=np.zeros_like(loss), where=usable)
        return cls(log_n=log_n, log_loss=log_loss, weight=weight / np.where(total > 0, total, 1.0))

    def take(self, rows: NDArray[np.intp]) -> "LossPoints":
        """Return the points of some domains."""
        return LossPoints(log_n=self.log_n, log_loss=self.log_loss[rows], weight=self.weight[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class LawBounds:
    """The box that laws are searched in, and where residuals begin to count linearly."""

    max_alpha: float = 0.8
    max_log_beta: float = 6.5
    """With n in the unit of the laws (`ScalingLaws.unit`)."""
    min_epsilon: float = 0.0
    """Nats."""
    min_log_beta: float = -60.0
    """A law this low is flat."""
    huber_delta: float = HUBER_DELTA
    """Residuals of log L above this count linearly."""

    @property
    def low(self) -> NDArray[np.float64]:
        """Lower bounds of theta; shape (3,)."""
        return np.array([self.min_log_beta, 0.0, self.min_epsilon])

    @property
    def high(self) -> NDArray[np.float64]:
        """Upper bounds of theta; shape (3,)."""
        return np.array([self.max_log_beta, self.max_alpha, np.inf])


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """Losses that laws predict at the points; shape (num_domains, num_points) each."""

    loss: NDArray[np.float64]
    reducible: NDArray[np.float64]
    """beta · n^-alpha, nats."""
    residual: NDArray[np.float64]
    """Log of the predicted loss minus log of the observed loss."""

    def take(self, rows: NDArray[np.intp]) -> "Prediction":
        """Return the prediction for some domains."""
        return Prediction(self.loss[rows], self.reducible[rows], self.residual[rows])

    def replace_rows(self, rows: NDArray[np.bool_], other: "Prediction") -> None:
        """Take the values of `other` for the domains where `rows` is set, in place."""
        self.loss[rows] = other.loss[rows]
        self.reducible[rows] = other.reducible[rows]
        self.residual[rows] = other.residual[rows]


def predict(theta: NDArray[np.float64], points: LossPoints) -> Prediction:
    """Evaluate the laws `theta`, shape (num_domains, 3), at the points."""
    reducible = np.exp(theta[:, :1] - theta[:, 1:2] * points.log_n)
    loss = theta[:, 2:] + reducible
    return Prediction(loss, reducible, np.log(loss) - points.log_loss)


def huber_objective(
    residual: NDArray[np.float64], weight: NDArray[np.float64], delta: float = HUBER_DELTA
) -> NDArray[np.float64]:
    """Return the weighted Huber loss divided by its delta, about the mean absolute residual; shape (num_domains,)."""
    # With size = |r|: r²/2 up to delta, then delta · (size - delta/2); both cases in one expression.
    size = np.abs(residual)
    near = np.minimum(size, delta)
    objective: NDArray[np.float64] = np.einsum("km,km->k", weight, near * (size - 0.5 * near)) / delta
    return objective


BOUND_NAMES = ("beta at its lower bound", "beta at its upper bound", "alpha is 0", "alpha at its upper bound")
"""Bound → what it means; the position is the bit of `bounds_reached`."""


def bounds_reached(theta: NDArray[np.float64], bounds: LawBounds) -> NDArray[np.int8]:
    """Return which bounds of beta and alpha each law lies on, as a sum of powers of 2; shape (num_domains,).

    The losses do not determine such a law, so its speed is not to be trusted. An epsilon at its lower bound is common
    in short runs and does no harm: the slope at the present n is determined.
    """
    at_bound = [
        theta[:, 0] <= bounds.min_log_beta,
        theta[:, 0] >= bounds.max_log_beta,
        theta[:, 1] <= 0.0,
        theta[:, 1] >= bounds.max_alpha,
    ]
    # NaN, an unknown law, compares false.
    reached: NDArray[np.int8] = np.sum([is_at << bit for bit, is_at in enumerate(at_bound)], axis=0).astype(np.int8)
    return reached


def rms_residual(theta: NDArray[np.float64], points: LossPoints) -> NDArray[np.float64]:
    """Return the root mean square of the residuals of log L, weighted like the fit; shape (num_domains,)."""
    residual = predict(theta, points).residual
    # Points without weight may have a residual that is not finite.
    squares = np.where(points.weight > 0, residual, 0.0) ** 2
    rms: NDArray[np.float64] = np.sqrt(np.einsum("km,km->k", points.weight, squares))
    return rms
