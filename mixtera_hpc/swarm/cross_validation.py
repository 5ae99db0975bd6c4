"""Cross-validated errors of the regressions, and the choice among them.

Runs that a regression was not fitted to are predicted: each run alone up to 24 runs, and a tenth of the runs beyond.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.swarm.regression import LAWS, Law, MetricFits, fit_losses, fit_metrics

__all__ = ["Validated", "choose_laws", "constant_rmse", "mean_loss", "validate_regressions"]

Array = NDArray[np.float64]

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Strengths that are tried for every law."""

MAX_SINGLE = 24
"""Up to this many runs, every run is left out alone."""
NUM_FOLDS = 10
FOLD_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Validated:
    """The cross-validated error of one law, or of a law for every metric."""

    laws: tuple[Law, ...]
    """Law of every metric."""
    ridge: Array
    """Best ridge of every metric; shape (M,)."""
    metric_rmse: Array
    """Root mean square of predicted minus measured, of every metric; shape (M,), nats."""
    rmse: float
    """The same over all metrics, by their weights."""
    objective_rmse: float
    """Root mean square error of the weighted mean of the metrics, in nats; NaN if no run has all of them."""
    rank_correlation: float
    """Spearman's correlation of predicted and measured objective; NaN if no run has all metrics."""
    predictions: Array
    """Predictions of every run by a fit without it; shape (N, M)."""

    def fit(self, mixtures: Array, losses: Array) -> MetricFits:
        """Return the fit to all of these runs; see `fit_metrics`."""
        return fit_metrics(self.laws, mixtures, losses, self.ridge)


def mean_loss(losses: Array, objective: Array) -> Array:
    """Return the objective of losses of shape (…, M); shape (…,). NaN if a metric with a weight is missing."""
    used = objective > 0
    mean: Array = losses[..., used] @ (objective[used] / objective.sum())
    return mean


def validate_regressions(
    mixtures: Array, losses: Array, objective: Array, laws: Sequence[str] = tuple(LAWS)
) -> list[Validated]:
    """Return the error of every law, where each metric has the ridge of its smallest error.

    Args:
        mixtures: shape (N, K).
        losses: shape (N, M), NaN where a run lacks a metric.
        objective: weights of the metrics; shape (M,).
        laws: names of the laws.

    Raises:
        DataError: see `fit_losses`.
    """
    validated = []
    for name in laws:
        predictions = [_predict_left_out(LAWS[name], ridge, mixtures, losses) for ridge in RIDGES]
        tried = [((LAWS[name],) * losses.shape[1], np.full(losses.shape[1], ridge)) for ridge in RIDGES]
        validated.append(_best_of_metrics(tried, predictions, losses, objective))
    return validated


def choose_laws(validated: Sequence[Validated], losses: Array, objective: Array) -> Validated:
    """Return the law with the smallest error for every metric.

    Metrics differ in how they depend on the shares. One may fall smoothly, and another only beyond some share.
    """
    tried = [(candidate.laws, candidate.ridge) for candidate in validated]
    return _best_of_metrics(tried, [candidate.predictions for candidate in validated], losses, objective)


def constant_rmse(losses: Array, objective: Array) -> float:
    """Return the error of predicting the mean of the other runs, which a useful regression is far below."""
    predictions = np.full_like(losses, np.nan)
    for left_out in _folds(len(losses)):
        predictions[left_out] = np.nanmean(np.delete(losses, left_out, axis=0), axis=0)
    return _rmse(predictions, losses, objective)


def _predict_left_out(law: Law, ridge: float, mixtures: Array, losses: Array) -> Array:
    """Return the predictions of every run by a fit without it; shape (N, M)."""
    predictions = np.full_like(losses, np.nan)
    for left_out in _folds(len(losses)):
        fit = fit_losses(law, np.delete(mixtures, left_out, axis=0), np.delete(losses, left_out, axis=0), ridge)
        predictions[left_out] = fit.predict(mixtures[left_out])
    return predictions


def _best_of_metrics(
    tried: Sequence[tuple[tuple[Law, ...], Array]], predictions: Sequence[Array], losses: Array, objective: Array
) -> Validated:
    """Combine regressions: every metric takes the one with its smallest error.

    Args:
        tried: laws and ridges of all metrics, of every regression.
        predictions: of every regression; shape (N, M) each.
        losses: shape (N, M), NaN where a run lacks a metric.
        objective: weights of the metrics; shape (M,).
    """
    every = np.arange(losses.shape[1])
    squares = np.nanmean((np.array(predictions) - losses) ** 2, axis=1)
    best = squares.argmin(axis=0)
    combined = np.array(predictions)[best, :, every].T
    predicted = mean_loss(combined, objective)
    measured = mean_loss(losses, objective)
    known = np.isfinite(measured)
    return Validated(
        laws=tuple(tried[choice][0][metric] for metric, choice in enumerate(best.tolist())),
        ridge=np.array([ridge for _, ridge in tried])[best, every],
        metric_rmse=np.sqrt(squares[best, every]),
        rmse=_rmse(combined, losses, objective),
        objective_rmse=float(np.sqrt(np.mean((predicted - measured)[known] ** 2))) if known.any() else np.nan,
        rank_correlation=_rank_correlation(predicted[known], measured[known]),
        predictions=combined,
    )


def _folds(num_runs: int) -> Iterator[NDArray[np.int64]]:
    """Yield the runs that are left out together."""
    order = np.random.Generator(np.random.PCG64(FOLD_SEED)).permutation(num_runs)
    yield from np.array_split(order, num_runs if num_runs <= MAX_SINGLE else NUM_FOLDS)


def _rmse(predictions: Array, losses: Array, objective: Array) -> float:
    """Return the error over all known losses, metrics weighted by the objective."""
    squared = (predictions - losses) ** 2
    weights = np.where(np.isfinite(losses), objective, 0.0)
    return float(np.sqrt(np.nansum(squared * weights) / weights.sum()))


def _rank_correlation(first: Array, second: Array) -> float:
    """Return Spearman's correlation; NaN for fewer than three values, or values that are all equal."""
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    ranks = np.array([np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (first, second)])
    return float(np.corrcoef(ranks)[0, 1])
