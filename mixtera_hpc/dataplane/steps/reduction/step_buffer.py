"""The buffer of integers that the reduction of a step sums over all ranks: its layout, and what a rank adds to it.

One buffer carries times, losses, scalars and flags, so that a step needs a single collective. Layout, for K domains:
the stage times of each rank; NUM_BUFFER_ROWS × K sums of losses; ROWS_PER_SCALAR × K sums of each scalar; the checks of
the scalars, if the run has any; `BufferFlags`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.measures.scalars import ROWS_PER_SCALAR
from mixtera_hpc.core.statistics import NUM_BUFFER_ROWS
from mixtera_hpc.dataplane.steps.step_scalars import NUM_SCALAR_CHECKS, values_per_domain

__all__ = ["BufferFlags", "BufferLayout", "StepContribution"]

Ints = NDArray[np.int64]


class BufferFlags(NamedTuple):
    """The last integers of the buffer: those of one rank, or their sums over all ranks."""

    stop: int
    """1 if the rank was asked to stop."""
    save: int
    """1 if the rank was asked to save."""
    is_partial: int
    """1 if the parts that the ranks of a group recorded do not fit together."""
    content: int
    """Digest of what the rank was handed, with weights that add up to 0 in a group of equal peers."""
    num_padding: int
    """Rows of padding that were recorded besides the sequences."""
    vote: int
    """Hash of the rank's group if the rank recorded losses; 0 otherwise."""
    digest: int
    """Digest of the plan that the step was served from."""

    @classmethod
    def of(cls, buffer: Ints) -> "BufferFlags":
        """Return the flags at the end of `buffer`."""
        return cls(*buffer[-len(cls._fields) :].tolist())


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContribution:
    """Everything that one rank has recorded of a step. The defaults describe a rank that has recorded nothing."""

    rows: Ints | None = None
    """Sums of the domains, shape (NUM_BUFFER_ROWS, K), and rows of scalars if the run has any; see
    `core.statistics.accumulate_losses` and `core.measures.scalars`. None if all are 0."""
    num_padding: int = 0
    """Rows of padding that were recorded besides the sequences in `rows`."""
    is_partial: bool = False
    """True if the parts that the ranks of this group recorded do not fit together."""
    num_recorded: int = 0
    """Tokens that this rank recorded, if `is_partial`."""
    checks: Ints | None = None
    """Numbers that show which sequences have scalars (`checks_of`), shape (NUM_SCALAR_CHECKS,). None if this rank
    recorded no losses, or the run has no scalars."""

    @property
    def has_sequences(self) -> bool:
        """True if losses of a sequence, or of padding, were recorded."""
        return self.num_padding > 0 or (self.rows is not None and bool(self.rows[2].any()))

    @property
    def num_scalar_values(self) -> int:
        """Values of scalars that were recorded."""
        return 0 if self.rows is None else int(values_per_domain(self.rows[NUM_BUFFER_ROWS:]).sum())


class BufferLayout:
    """Places in the buffer of a step."""

    def __init__(self, num_ranks: int, num_domains: int, num_scalars: int) -> None:
        """Compute the places; every rank has the same."""
        self._num_ranks = num_ranks
        self._shape = (NUM_BUFFER_ROWS + ROWS_PER_SCALAR * num_scalars, num_domains)
        self._end_of_rows = num_ranks + self._shape[0] * num_domains
        num_checks = NUM_SCALAR_CHECKS if num_scalars else 0
        self._end_of_checks = self._end_of_rows + num_checks

    def fill(self, rank: int, packed_times: int, contribution: StepContribution, flags: BufferFlags) -> Ints:
        """Return the buffer of one rank; `packed_times` is from `stage_times.pack_times`."""
        buffer = np.zeros(self._end_of_checks + len(flags), np.int64)
        buffer[rank] = packed_times
        if contribution.rows is not None:
            buffer[self._num_ranks : self._end_of_rows] = contribution.rows.reshape(-1)
        if contribution.checks is not None:
            buffer[self._end_of_rows : self._end_of_checks] = contribution.checks
        buffer[self._end_of_checks :] = flags
        return buffer

    def packed_times(self, buffer: Ints) -> Ints:
        """Return the stage times of every rank; shape (num_ranks,)."""
        return buffer[: self._num_ranks]

    def rows(self, buffer: Ints) -> Ints:
        """Return the sums of losses and scalars; shape (NUM_BUFFER_ROWS + ROWS_PER_SCALAR × num_scalars, K)."""
        return buffer[self._num_ranks : self._end_of_rows].reshape(self._shape)

    def checks(self, buffer: Ints) -> Ints:
        """Return the checks of the scalars; shape (NUM_SCALAR_CHECKS,), or (0,) without scalars."""
        return buffer[self._end_of_rows : self._end_of_checks]
