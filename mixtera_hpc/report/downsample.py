"""Reduces long series to few points, for plots."""

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.report.run_metrics import Floats, Ints

__all__ = ["even_indices", "percentile_ranges", "weighted_means"]


def weighted_means(x: Ints, values: Floats, weights: Floats, max_points: int = 300) -> tuple[Floats, Floats]:
    """Return weighted means of `x` and `values` over groups of neighbouring points.

    Points that are NaN or have no weight are left out.
    """
    is_known = np.isfinite(values) & (weights > 0)
    x = x[is_known]
    values = values[is_known]
    weights = weights[is_known]
    if len(x) == 0:
        return np.zeros(0), np.zeros(0)

    # Assign each point to one of at most max_points groups of nearly equal size.
    group = np.arange(len(x)) * min(len(x), max_points) // len(x)
    total = np.bincount(group, weights)
    return np.bincount(group, x * weights) / total, np.bincount(group, values * weights) / total


def percentile_ranges(x: Ints, values: Floats, max_points: int = 120) -> tuple[Floats, Floats, Floats, Floats]:
    """Return the mean of `x` and the 5th, 50th and 95th percentile of `values` for groups of neighbouring points."""
    groups = np.array_split(np.arange(len(x)), min(len(x), max_points))
    low, median, high = np.array([np.percentile(values[group], [5, 50, 95]) for group in groups]).T
    return np.array([x[group].mean() for group in groups]), low, median, high


def even_indices(count: int, max_points: int = 400) -> NDArray[np.int64]:
    """Return evenly spaced indices into `count` items, including the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, max_points)).round().astype(np.int64))
