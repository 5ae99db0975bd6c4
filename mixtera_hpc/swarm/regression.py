"""Regressions of losses on mixtures, fitted in closed form.

Three laws of a loss y in the shares w of K domains:

- `log-linear`: log y = a + t·w (Olmix, arXiv 2602.12237, without its offset)
- `exponential`: y = c + exp(a + t·w) (Data Mixing Laws, arXiv 2403.16952, equation 1; Olmix, with its offset)
- `power`: y = c + exp(a + t·log(w + 0.01)), a power law in the tokens of every domain (BiMix, arXiv 2405.14908, which
  has the domain's own share only)

For a given offset c, each law is linear in its other parameters, so it is a ridge regression of log(y - c). c is taken
from a grid of fractions of the smallest loss, by the squared error of the losses. The ridge pulls t towards a loss that
depends on no share. Price of a fit: one singular value decomposition of (N, K), and a product with (N, offsets × M).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import DataError

__all__ = ["LAWS", "Law", "LossFit", "MetricFits", "fit_losses", "fit_metrics"]

Array = NDArray[np.float64]

SMALLEST_SHARE = 0.01
"""Added to shares before their logarithm: a domain without data has a finite loss."""

OFFSET_FRACTIONS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.84, 0.88, 0.91, 0.94, 0.96, 0.975, 0.985, 0.993)
"""Irreducible losses that are tried, as fractions of the smallest observed loss."""

MIN_ROWS = 4
"""Fewer runs determine no law."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """The form of a regression."""

    name: str
    has_offset: bool
    in_logarithms: bool
    """True if the loss depends on the logarithms of the shares, False if on the shares."""

    def features(self, mixtures: Array) -> Array:
        """Return what the logarithm of the reducible loss is linear in; the shape of `mixtures`."""
        return np.log(mixtures + SMALLEST_SHARE) if self.in_logarithms else mixtures

    def slopes(self, mixture: Array) -> Array:
        """Return the derivative of each feature by its share; shape (K,)."""
        return 1 / (mixture + SMALLEST_SHARE) if self.in_logarithms else np.ones_like(mixture)


LAWS: Mapping[str, Law] = {
    law.name: law
    for law in (
        Law(name="log-linear", has_offset=False, in_logarithms=False),
        Law(name="exponential", has_offset=True, in_logarithms=False),
        Law(name="power", has_offset=True, in_logarithms=True),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LossFit:
    """A law fitted to M metrics."""

    law: Law
    offset: Array
    """Irreducible losses; shape (M,)."""
    intercept: Array
    """Shape (M,)."""
    coefficients: Array
    """Shape (K, M)."""

    def predict(self, mixtures: Array) -> Array:
        """Return the losses of mixtures of shape (…, K); shape (…, M)."""
        exponent = self.intercept + self.law.features(mixtures) @ self.coefficients
        losses: Array = self.offset + np.exp(exponent)
        return losses

    def gradient(self, mixture: Array) -> Array:
        """Return the derivative of every loss by every share; shape (K, M)."""
        reducible = self.predict(mixture) - self.offset
        return self.law.slopes(mixture)[:, None] * self.coefficients * reducible


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricFits:
    """Fits of M metrics, where each metric has a law of its own."""

    num_metrics: int
    parts: tuple[tuple[NDArray[np.int64], LossFit], ...]
    """Metrics, and the fit of their law; every metric is in one part."""

    def predict(self, mixtures: Array) -> Array:
        """Return the losses of mixtures of shape (…, K); shape (…, M)."""
        losses = np.empty((*mixtures.shape[:-1], self.num_metrics))
        for metrics, fit in self.parts:
            losses[..., metrics] = fit.predict(mixtures)
        return losses

    def gradient(self, mixture: Array) -> Array:
        """Return the derivative of every loss by every share; shape (K, M)."""
        slopes = np.empty((len(mixture), self.num_metrics))
        for metrics, fit in self.parts:
            slopes[:, metrics] = fit.gradient(mixture)
        return slopes


def fit_metrics(laws: Sequence[Law], mixtures: Array, losses: Array, ridge: Array) -> MetricFits:
    """Fit every metric with its own law.

    Args:
        laws: of every metric.
        mixtures: shares of every run; shape (N, K).
        losses: see `fit_losses`; shape (N, M).
        ridge: see `fit_losses`; shape (M,).

    Raises:
        DataError: a metric has too few values.
    """
    parts = []
    for law in dict.fromkeys(laws):
        metrics = np.array([metric for metric, own in enumerate(laws) if own == law], np.int64)
        parts.append((metrics, fit_losses(law, mixtures, losses[:, metrics], ridge[metrics])))
    return MetricFits(num_metrics=losses.shape[1], parts=tuple(parts))


def fit_losses(law: Law, mixtures: Array, losses: Array, ridge: float | Array) -> LossFit:
    """Fit one law to every metric.

    Args:
        law: the form of the regression.
        mixtures: shares of every run; shape (N, K).
        losses: above 0, or NaN where a run lacks a metric; shape (N, M).
        ridge: strength of the ridge, as a fraction of the largest squared singular value of the features; one number,
            or one for every metric, shape (M,).

    Raises:
        DataError: a metric has too few values.
    """
    num_metrics = losses.shape[1]
    ridges = np.broadcast_to(np.asarray(ridge, np.float64), num_metrics)
    offset = np.zeros(num_metrics)
    intercept = np.zeros(num_metrics)
    coefficients = np.zeros((mixtures.shape[1], num_metrics))
    features = law.features(mixtures)

    # Metrics that the same runs have share one decomposition.
    patterns, group_of_metric = np.unique(np.isfinite(losses), axis=1, return_inverse=True)
    for group in range(patterns.shape[1]):
        rows = patterns[:, group]
        metrics = np.flatnonzero(group_of_metric.reshape(-1) == group)
        if rows.sum() < MIN_ROWS:
            raise DataError(
                f"A metric has values of {int(rows.sum())} runs, expected at least {MIN_ROWS} for a regression.\n"
                "  Train more proxies, or remove the metric from the table or from swarm.objective."
            )
        fitted = _fit_complete(law, features[rows], losses[np.ix_(rows, metrics)], ridges[metrics])
        offset[metrics], intercept[metrics], coefficients[:, metrics] = fitted
    return LossFit(law=law, offset=offset, intercept=intercept, coefficients=coefficients)


def _fit_complete(law: Law, features: Array, losses: Array, ridge: Array) -> tuple[Array, Array, Array]:
    """Return offset (M,), intercept (M,) and coefficients (K, M) of losses without gaps."""
    center = features.mean(axis=0)
    left, singular, right = np.linalg.svd(features - center, full_matrices=False)
    strength = ridge * max(float(singular[0]) ** 2, 1e-300)
    # One column of factors for every metric.
    shrunk = singular[:, None] / (singular[:, None] ** 2 + strength)

    fractions = np.array(OFFSET_FRACTIONS if law.has_offset else (0.0,))
    offsets = fractions[:, None] * losses.min(axis=0)
    # All offsets and metrics are columns of one problem: shape (N, offsets × M).
    targets = np.log(losses[:, None, :] - offsets)
    means = targets.mean(axis=0)
    columns = (targets - means).reshape(len(losses), -1)
    solved = right.T @ (np.tile(shrunk, len(offsets)) * (left.T @ columns))
    deviations = ((features - center) @ solved).reshape(targets.shape)
    errors = ((offsets + np.exp(means + deviations) - losses[:, None, :]) ** 2).sum(axis=0)

    best = errors.argmin(axis=0)
    every = np.arange(losses.shape[1])
    coefficients = solved.reshape(features.shape[1], *offsets.shape)[:, best, every]
    return offsets[best, every], means[best, every] - center @ coefficients, coefficients
