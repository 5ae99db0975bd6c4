"""Numbers of the user's per domain of one step, summed over ranks exactly: gradient norms, rewards, accuracies.

Each number has a declared scale, its largest absolute value. A value is rounded once to a multiple of scale · 2^-32 and
added as int64, so sums do not depend on ranks or order (see `core.statistics`). A value beyond the scale, or one that
is not finite, is counted and left out; it never wraps around. Price: 24 bytes per scalar, domain and step in the
reduction.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["ROWS_PER_SCALAR", "ScalarStatistics", "accumulate_scalar", "scalars_from_rows"]

QUANTA_PER_SCALE = float(2**32)
"""Units of a rounded value in its scale; sums of 2^31 sequences fit into an int64."""

ROWS_PER_SCALAR = 3
"""Rows of the reduction buffer: sum in units, sequences, sequences out of range."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScalarStatistics:
    """One scalar of every domain in one step, summed over the global batch; shape (num_domains,) each."""

    total: NDArray[np.float64]
    """Over the sequences in `count`."""
    count: NDArray[np.int64]
    """Sequences with a value."""
    num_out_of_range: NDArray[np.int64]
    """Sequences whose value was beyond the scale, or not finite; excluded from the others."""

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean over sequences; NaN for domains without a value."""
        mean = np.full(len(self.total), np.nan)
        np.divide(self.total, self.count, out=mean, where=self.count > 0)
        return mean


def accumulate_scalar(
    domain_ids: NDArray[np.integer], values: NDArray[np.float64], scale: float, num_domains: int
) -> NDArray[np.int64]:
    """Return one rank's rows of a scalar; shape (ROWS_PER_SCALAR, num_domains).

    Args:
        domain_ids: domain of every sequence with a value; shape (B,).
        values: shape (B,).
        scale: largest absolute value that counts.
        num_domains: K.
    """
    # NaN compares false.
    in_range = np.abs(values) <= scale
    rows = np.zeros((ROWS_PER_SCALAR, num_domains), np.int64)
    quanta = np.rint(values[in_range] / scale * QUANTA_PER_SCALE).astype(np.int64)
    np.add.at(rows[0], domain_ids[in_range], quanta)
    np.add.at(rows[1], domain_ids[in_range], 1)
    np.add.at(rows[2], domain_ids[~in_range], 1)
    return rows


def scalars_from_rows(rows: NDArray[np.int64], scales: Mapping[str, float]) -> dict[str, ScalarStatistics]:
    """Convert rows of `accumulate_scalar`, summed over ranks, one scalar after the other."""
    if not scales:
        return {}
    by_scalar = rows.reshape(len(scales), ROWS_PER_SCALAR, rows.shape[1])
    return {
        name: ScalarStatistics(total=quanta / QUANTA_PER_SCALE * scale, count=count, num_out_of_range=outside)
        for (name, scale), (quanta, count, outside) in zip(scales.items(), by_scalar, strict=True)
    }
