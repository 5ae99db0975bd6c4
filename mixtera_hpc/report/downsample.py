"""Long series as few points, for drawing."""

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.report.run_metrics import Floats, Ints

__all__ = ["even_indices", "percentile_ranges", "weighted_means"]


def weighted_means(x: Ints, values: Floats, weights: Floats, at_most: int = 300) -> tuple[Floats, Floats]:
    """x and value as weighted means of neighbours; points of no weight or NaN are left out."""
    known = np.isfinite(values) & (weights > 0)
    x, values, weights = x[known], values[known], weights[known]
    if len(x) == 0:
        return np.zeros(0), np.zeros(0)
    place = np.arange(len(x)) * min(len(x), at_most) // len(x)
    total = np.bincount(place, weights)
    return np.bincount(place, x * weights) / total, np.bincount(place, values * weights) / total


def percentile_ranges(x: Ints, values: Floats, at_most: int = 120) -> tuple[Floats, Floats, Floats, Floats]:
    """x, 5th percentile, median and 95th percentile of groups of neighbours."""
    groups = np.array_split(np.arange(len(x)), min(len(x), at_most))
    low, middle, high = np.array([np.percentile(values[g], [5, 50, 95]) for g in groups]).T
    return np.array([x[g].mean() for g in groups]), low, middle, high


def even_indices(count: int, at_most: int = 400) -> NDArray[np.int64]:
    """Positions of evenly spaced items, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(np.int64))
