"""The grid that cuts a domain's stream into sequences.

The stream of a domain is its epochs, one after the other. It is counted in items: tokens (each document followed by its
special tokens) or samples. Sequence k covers the items [k * stride, k * stride + length), across the borders of
documents, windows and epochs. Nothing is padded, and no item is skipped.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.planner import Planner

__all__ = ["SequenceGrid"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceGrid:
    """The length of a sequence, and the distance between the starts of neighbouring sequences."""

    length: int
    """Items in a sequence: `seq_len + 1` tokens, or one sample."""
    stride: int
    """Items between the starts of neighbouring sequences: `length`, or `length - 1` if they overlap by one token."""

    @classmethod
    def of_unit(cls, in_tokens: bool, seq_len: int, overlap: bool) -> "SequenceGrid":
        """Return the grid of `of_tokens` if `in_tokens`, else that of `of_samples`."""
        return cls.of_tokens(seq_len, overlap) if in_tokens else cls.of_samples()

    @classmethod
    def of_tokens(cls, seq_len: int, overlap: bool) -> "SequenceGrid":
        """Return a grid of `seq_len` inputs and one more token, which is the last target.

        Args:
            seq_len: tokens that a model sees of one sequence.
            overlap: the last token of a sequence is also the first of the next one.
        """
        return cls(length=seq_len + 1, stride=seq_len if overlap else seq_len + 1)

    @classmethod
    def of_samples(cls) -> "SequenceGrid":
        """Return a grid of one sample per sequence."""
        return cls(length=1, stride=1)

    def capacity(self, epoch_items: Ints, max_epochs: NDArray[np.float64], origins: Ints | int = 0) -> Ints:
        """Return the number of whole sequences that each domain can serve; shape (K,).

        Args:
            epoch_items: items in one epoch of each domain; shape (K,).
            max_epochs: epochs of each domain, possibly fractional; `inf` for no limit. Shape (K,).
            origins: item at which sequence 0 of each domain starts; shape (K,) or one number.

        Returns:
            `Planner.UNLIMITED` for domains without a limit, 0 for empty domains.
        """
        # An infinite number of epochs cannot be converted to an integer, so it is replaced before and handled after.
        endless = np.isinf(max_epochs)
        all_items = np.floor(epoch_items * np.where(endless, 0.0, max_epochs))
        # More than any run serves, and few enough for an integer of 64 bits.
        items = np.minimum(all_items, Planner.UNLIMITED).astype(np.int64) - origins
        # The first sequence needs `length` items, each further one `stride` more.
        limited = np.where(items >= self.length, (items - self.length) // self.stride + 1, 0)

        # A domain without items has no sequences, even if its epochs do not end.
        capacity = np.where(endless, Planner.UNLIMITED, limited)
        return np.where(epoch_items > 0, capacity, 0)

    def span(self, first: int, count: int) -> tuple[int, int]:
        """Return the items [start, stop) that `count` consecutive sequences cover, starting at sequence `first`."""
        return first * self.stride, (first + count - 1) * self.stride + self.length
