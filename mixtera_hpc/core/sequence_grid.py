"""Streams and sequences: where in a domain's endless stream a sequence lies.

A domain's stream is its epochs one after the other, counted in items: tokens (every document followed by its special tokens)
or samples. Sequence k covers the items [k * stride, k * stride + length), across borders of documents, windows and epochs;
nothing is padded and nothing is left over.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.planner import Planner

__all__ = ["SequenceGrid"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceGrid:
    """How a stream is cut into sequences."""

    length: int
    """Items of a sequence: `seq_len + 1` tokens, or one sample."""
    stride: int
    """Items between the beginnings of neighbours: `length`, or one less when they overlap."""

    @classmethod
    def of_unit(cls, in_tokens: bool, seq_len: int, overlap: bool) -> "SequenceGrid":
        return cls.of_tokens(seq_len, overlap) if in_tokens else cls.of_samples()

    @classmethod
    def of_tokens(cls, seq_len: int, overlap: bool) -> "SequenceGrid":
        return cls(length=seq_len + 1, stride=seq_len if overlap else seq_len + 1)

    @classmethod
    def of_samples(cls) -> "SequenceGrid":
        return cls(length=1, stride=1)

    def capacity(self, epoch_items: Ints, max_epochs: NDArray[np.float64], origins: Ints | int = 0) -> Ints:
        """Sequences that fit in `max_epochs` passes over domains of `epoch_items` items; shape (K,) each, `inf` for endless.

        Args:
            origins: item at which sequence 0 of each domain begins.
        """
        endless = np.isinf(max_epochs)
        items = np.floor(epoch_items * np.where(endless, 0.0, max_epochs)).astype(np.int64) - origins
        limited = np.where(items >= self.length, (items - self.length) // self.stride + 1, 0)
        return np.where(epoch_items > 0, np.where(endless, Planner.UNLIMITED, limited), 0)

    def span(self, first: int, count: int) -> tuple[int, int]:
        """Items [start, stop) of `count` consecutive sequences from sequence `first` on."""
        return first * self.stride, (first + count - 1) * self.stride + self.length
