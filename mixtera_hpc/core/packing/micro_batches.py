"""Micro-batches of samples that are filled up to a budget, the same number on every data-parallel rank.

A rank fills its micro-batches with neighbouring rows, in order. The ranks that need fewer than others get empty ones at
the end, so that all ranks run the same number of forward and backward passes. Every rank computes this for itself from
the costs of the whole global batch; where it knows only the costs of its own samples, ranks agree on the number.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["cut_by_budget", "fill_micro_batches", "with_empty"]


def fill_micro_batches(costs: NDArray[np.float64], size: int, first: int, budget: float) -> tuple[slice, ...]:
    """Return the rows of every micro-batch of a rank; empty slices at the end are padding.

    Args:
        costs: cost of the sample at every position of the global batch; 0 for padding. Shape (global_batch_size,).
        size: positions of each rank.
        first: first position of this rank.
        budget: largest sum of costs of a micro-batch; no sample costs more.
    """
    own: tuple[slice, ...] = ()
    most = 0
    for start in range(0, len(costs), size):
        filled = cut_by_budget(costs[start : start + size], budget)
        most = max(most, len(filled))
        if start == first:
            own = filled
    return with_empty(own, most, size)


def with_empty(micro_batches: tuple[slice, ...], count: int, size: int) -> tuple[slice, ...]:
    """Return `count` micro-batches: those of a rank with `size` rows, and empty ones at the end."""
    return micro_batches + (slice(size, size),) * (count - len(micro_batches))


def cut_by_budget(costs: NDArray[np.float64], budget: float) -> tuple[slice, ...]:
    """Cut rows into the fewest neighbouring parts whose costs do not exceed `budget`."""
    sums = np.cumsum(costs)
    borders = [0]
    while borders[-1] < len(costs):
        before = sums[borders[-1] - 1] if borders[-1] else 0.0
        stop = int(np.searchsorted(sums, before + budget, side="right"))
        # Rounded sums must not stop the loop.
        borders.append(max(stop, borders[-1] + 1))
    return tuple(slice(a, b) for a, b in pairwise(borders))
