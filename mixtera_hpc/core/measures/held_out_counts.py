"""The held-out sequences of each domain in a validation: natural proportions, with a quota of every domain."""

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.bounds import project_to_bounds

__all__ = ["held_out_counts"]


def held_out_counts(
    shares: NDArray[np.float64], capacity: NDArray[np.int64], *, batch_size: int, num_batches: int, quota: int
) -> NDArray[np.int64] | None:
    """Return the sequences of each domain in a validation, shape (K,); None if natural proportions fill the quota.

    The sum is a multiple of `batch_size`. There are more batches than `num_batches` if the quota needs them, as far as
    there are held-out sequences.

    Args:
        shares: natural proportions, sum 1; 0 for domains without a held-out sequence. Shape (K,).
        capacity: held-out sequences of each domain; shape (K,).
        batch_size: sequences of a global batch.
        num_batches: batches of a validation, at most as many as there are held-out sequences for.
        quota: smallest number of sequences of every domain that has as many.
    """
    least = np.minimum(capacity, quota)
    # Proportional counts may fall short of the ideal number by one.
    if (np.floor(shares * num_batches * batch_size - 1e-6) >= least).all():
        return None
    most_batches = int(capacity.sum()) // batch_size
    needed = -(-int(least.sum()) // batch_size)
    total = min(max(num_batches, needed), most_batches) * batch_size
    # Without enough sequences for a last batch, domains at the end of the list lose a part of their quota.
    least = np.diff(np.minimum(np.cumsum(least), total), prepend=0)
    ideal = total * project_to_bounds(shares, least / total, capacity / total)

    # Largest remainders, within the capacity.
    counts = np.minimum(np.maximum(np.floor(ideal + 1e-9).astype(np.int64), least), capacity)
    while (missing := total - int(counts.sum())) > 0:
        room = counts < capacity
        order = np.argsort(np.where(room, counts - ideal, np.inf), kind="stable")
        counts[order[: min(missing, int(room.sum()))]] += 1
    return counts
