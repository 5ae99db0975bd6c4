"""Segments of a chunk: consecutive slots with constant weights, cut where a domain runs out of data.

With `redistribute`, the weight and the lag of an exhausted domain go to the others, and the next segment starts.
Otherwise the data ends there. All values are integers, so every rank finds the same segments.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.apportion import MAX_SLOTS, UNIT, advance, quantise_weights, slots_until_exhausted

__all__ = ["Segment", "SegmentStart", "cut_segments"]

Ints = NDArray[np.int64]


class SegmentStart(NamedTuple):
    """The domains at the first slot of a segment; shape (K,) each."""

    lags: Ints
    """In units of 2^-40 sequence."""
    weights: Ints
    """In units of 2^-40; sums to 2^40."""
    remaining: Ints
    """Sequences that each domain can still serve."""

    def redistribute(self, exhausted: NDArray[np.bool_]) -> "SegmentStart":
        """Give the weights and lags of exhausted domains to the others, in proportion to their weights."""
        # float64 is exact here: weights are at most 2^40.
        weights = quantise_weights(np.where(exhausted, 0, self.weights).astype(np.float64))
        return self._replace(weights=weights).move_lags(exhausted)

    def move_lags(self, chosen: NDArray[np.bool_]) -> "SegmentStart":
        """Give the lags of the `chosen` domains to the others, in proportion to their weights."""
        # Floor every part of the lag and give the remainder to the largest weight, so that the lags still sum to 0.
        freed_lag = int(self.lags[chosen].sum())
        extra_lag = np.floor(self.weights * (freed_lag / UNIT)).astype(np.int64)
        extra_lag[np.argmax(self.weights)] += freed_lag - int(extra_lag.sum())
        return self._replace(lags=np.where(chosen, 0, self.lags) + extra_lag)


class Segment(NamedTuple):
    """Consecutive slots with constant weights; shape (K,) each.

    A segment starts at the first slot of a chunk or where a domain is exhausted.
    """

    lags: Ints
    """At the first slot, in units of 2^-40 sequence."""
    weights: Ints
    """In units of 2^-40."""
    counts: Ints
    """Sequences of each domain in the segment."""
    lags_after: Ints
    """After the last slot, in units of 2^-40 sequence."""


def cut_segments(start: SegmentStart, num_slots: int, *, redistribute: bool) -> list[Segment]:
    """Cut `num_slots` slots where domains are exhausted; the segments cover fewer slots if the data ends.

    Args:
        start: the domains at the first slot.
        num_slots: slots of the chunk.
        redistribute: True if the other domains take the weight of an exhausted one; False if the data ends there.
    """
    segments: list[Segment] = []
    while num_slots > 0:
        # A segment ends at the first exhaustion, at the end of the chunk, or after MAX_SLOTS slots.
        exhausted, length = _next_exhaustion(start, min(num_slots, MAX_SLOTS))
        counts, lags_after = advance(start.lags, start.weights, length, start.remaining)
        segments.append(Segment(start.lags, start.weights, counts, lags_after))
        num_slots -= length
        if num_slots == 0:
            break

        start = SegmentStart(lags_after, start.weights, start.remaining - counts)
        if exhausted is not None:
            # The data ends here unless other domains can take the weight.
            if not redistribute or not (start.weights[~exhausted] > 0).any():
                break
            start = start.redistribute(exhausted)
    return segments


def _next_exhaustion(start: SegmentStart, num_slots: int) -> tuple[NDArray[np.bool_] | None, int]:
    """Return the domains that are exhausted first, and the slots until then.

    Without an exhaustion within `num_slots` slots, return None and `num_slots`.
    """
    # A domain gets at most one sequence per slot, and its lag is below 1.
    if start.remaining.min() > num_slots + 1:
        return None, num_slots
    until_exhausted = slots_until_exhausted(start.lags, start.weights, start.remaining, num_slots)
    length = min(num_slots, int(until_exhausted.min()))
    exhausted = until_exhausted <= length
    return (exhausted if exhausted.any() else None), length
