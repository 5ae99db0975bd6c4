"""Losses of sequences that several ranks of a group share: each rank records a part of every sequence.

The parts are added before a sequence's loss is rounded, and a sequence with a part that is not finite counts as not
finite as a whole. So the parts of each sequence must meet inside the group before the reduction over all ranks. Losses
are exact multiples of 2^-38 nats (`step_losses`): their sum does not depend on how a sequence is cut.

Price: one more non-blocking reduction per step inside each group, of 32 bytes per sequence and part.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import CollectiveRequest, Communicator
from mixtera_hpc.core.statistics import NUM_BUFFER_ROWS
from mixtera_hpc.dataplane.steps.loss_sums import MAX_QUANTA
from mixtera_hpc.dataplane.steps.step_losses import StepLosses, means_of

__all__ = ["LossParts", "MergedLosses", "PartLayout", "PendingParts"]

Ints = NDArray[np.int64]

NUM_PART_FIELDS = 2
"""Integers of each part before those of the sequences: the number of ranks that recorded it, and its coverage."""

FIELDS_PER_SEQUENCE = 4
"""High and low half of the loss, counted tokens, and whether the loss is not finite."""

LOW_BITS = 31
"""Bits of the low half of a loss: sums of halves over all ranks of a group fit into an int64, losses may not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartLayout:
    """The part of every sequence that a rank records."""

    part: int
    """Position of this rank along the dimensions of `loss_parts`, in [0, num_parts)."""
    num_parts: int
    group: Communicator
    """The ranks that get the same batches as this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedLosses:
    """The losses of a step inside one group; the same on all of its ranks."""

    rows: Ints
    """Sums of the domains, shape (NUM_BUFFER_ROWS, K); zeros if no rank recorded, or not every part."""
    is_partial: bool
    """True if some tokens were recorded twice, or not at all, while others were recorded."""
    num_padding: int = 0
    """Rows of padding in the batch, if it was recorded."""
    means: NDArray[np.float32] | None = None
    """Mean loss of every sequence, if they were recorded; see `means_of`."""


class PendingParts:
    """The parts of one step on their way to the ranks of the group."""

    def __init__(self, losses: StepLosses, buffer: Ints, result: Ints, request: CollectiveRequest) -> None:
        """Use `LossParts.start`."""
        self._losses = losses
        # MPI owns both arrays until the request is complete.
        self._buffer = buffer
        self._result = result
        self.request = request

    @property
    def positions(self) -> Ints:
        """Positions of the sequences in the global batch; shape (B,)."""
        return self._losses.positions

    def merge(self) -> MergedLosses:
        """Add the parts; the request is complete."""
        return _merge(self._losses, self._result)


class LossParts:
    """Adds up what the ranks of one group recorded of each sequence."""

    def __init__(self, layout: PartLayout) -> None:
        """Reduce over a duplicate of the group. **Collective.**"""
        self._part = layout.part
        self._num_parts = layout.num_parts
        self._group = layout.group.Dup()

    def start(self, losses: StepLosses, is_counted: bool) -> PendingParts:
        """Start the reduction of one step; all ranks of the group start those of all steps, in order.

        Args:
            losses: what this rank recorded.
            is_counted: False for a step that was not finished: its losses are left out.
        """
        has_part = is_counted and losses.has_losses
        buffer = self._buffer_of(losses if has_part else None, len(losses.num_counted))
        result = np.empty_like(buffer)
        return PendingParts(losses, buffer, result, self._group.Iallreduce(buffer, result))

    def merge(self, losses: StepLosses | None, num_sequences: int) -> MergedLosses:
        """Add up the parts of one batch; without `losses`, only pass on those of the others. **Collective.**

        Args:
            losses: what this rank recorded; None if it was handed no batch.
            num_sequences: B.
        """
        buffer = self._buffer_of(losses if losses is not None and losses.has_losses else None, num_sequences)
        result = self._group.Allreduce(buffer)
        if losses is None:
            return MergedLosses(rows=np.zeros((NUM_BUFFER_ROWS, 1), np.int64), is_partial=False)
        return _merge(losses, result)

    def _buffer_of(self, losses: StepLosses | None, num_sequences: int) -> Ints:
        buffer = np.zeros((self._num_parts, NUM_PART_FIELDS + FIELDS_PER_SEQUENCE * num_sequences), np.int64)
        if losses is not None:
            buffer[self._part] = _fields_of(losses)
        return buffer


def _fields_of(losses: StepLosses) -> Ints:
    """Return what one rank contributes in the row of its part."""
    sums, num_tokens = losses.sequence_sums()
    quanta = np.where(sums.is_finite, sums.quanta, 0)
    high = quanta >> LOW_BITS
    low = quanta - (high << LOW_BITS)
    return np.concatenate([[1, losses.coverage], high, low, num_tokens, ~sums.is_finite]).astype(np.int64)


def _merge(losses: StepLosses, result: Ints) -> MergedLosses:
    """Add the parts of every sequence; `result` has one row per part, summed over the ranks of the group."""
    nothing = np.zeros((NUM_BUFFER_ROWS, losses.num_domains), np.int64)
    num_copies = result[:, 0]
    if not num_copies.any():
        return MergedLosses(rows=nothing, is_partial=False)
    if not num_copies.all():
        return MergedLosses(rows=nothing, is_partial=True)

    # Ranks that record the same part record equal numbers: one copy is the quotient. Shape (parts, 4, sequences).
    coverage = int((result[:, 1] // num_copies).sum())
    by_part = (result[:, NUM_PART_FIELDS:] // num_copies[:, None]).reshape(len(num_copies), FIELDS_PER_SEQUENCE, -1)
    high, low, num_tokens, num_nonfinite = by_part.sum(axis=0)
    if coverage != losses.full_coverage or (num_tokens != losses.num_counted).any():
        return MergedLosses(rows=nothing, is_partial=True)
    # Parts below the limit may add up to more, but not to more than 2^63.
    is_finite = (num_nonfinite == 0) & (np.abs(high) < MAX_QUANTA >> LOW_BITS)
    quanta = np.where(is_finite, (high << LOW_BITS) + low, 0)
    is_finite &= np.abs(quanta) < MAX_QUANTA
    rows = losses.rows_of(quanta, is_finite, num_tokens)
    means = means_of(quanta, is_finite, num_tokens)
    return MergedLosses(rows=rows, is_partial=False, num_padding=losses.num_padding, means=means)
