"""The sequences of `dataplane.shuffle=sequence` that domains serve next, permuted for several chunks in one call.

A permutation is over 100 numpy calls, which take twice as long for 4,000 numbers as for 500. Price: at most
128 KiB of memory, and a look-up of 5 µs per call.
"""

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.lanes import LaneOrder
from mixtera_hpc.core.packing.sequence_shuffle import SequenceShuffle
from mixtera_hpc.core.slots.segment_order import Slots

__all__ = ["SequencesAhead"]

Ints = NDArray[np.int64]

MAX_NUMBERS = 1 << 13
"""Sequences of common domains that are permuted together; as many again may belong to rare ones."""
CALLS_AHEAD = 8
"""Calls whose sequences are permuted together, if all are as large as the first."""
MIN_OF_DOMAIN = 16
"""Sequences of each domain that are permuted together, at least: a rare domain is not in every call."""
MIN_CALLS = 3
"""Calls that must use what was permuted together. If fewer do, the next `PAUSE` calls permute their own sequences."""
PAUSE = 64


class SequencesAhead:
    """Numbers in the streams of served sequences, in any order of the calls. Not thread-safe."""

    def __init__(self, lanes: LaneOrder) -> None:
        """Compute nothing yet; `lanes` is the order in which sequences are served."""
        self._lanes = lanes
        num_domains = len(lanes.epoch_items)
        # The range of served numbers of each domain that is in memory, and the place of number 0 in `_sequence`.
        self._first = np.zeros(num_domains, np.int64)
        self._stop = np.zeros(num_domains, np.int64)
        self._shift = np.zeros(num_domains, np.int64)
        self._sequence = np.zeros(0, np.int64)
        self._num_calls = MIN_CALLS
        """Calls since sequences were permuted for several calls."""
        self._num_paused = 0
        """Following calls that permute only their own sequences."""

    def sequences(self, slots: Slots) -> Ints:
        """Return the numbers in the streams of some sequences, as `LaneOrder.sequences` does."""
        domain = slots.domain
        ordinal = slots.ordinal
        if slots.sequence is not None or not isinstance(self._lanes, SequenceShuffle) or not len(domain):
            return self._lanes.sequences(slots)
        if len(domain) * MIN_CALLS > MAX_NUMBERS:
            # Permuting the sequences of several such calls together gains nothing.
            return self._lanes.sequences(slots)
        is_known = (ordinal >= self._first.take(domain)) & (ordinal < self._stop.take(domain))
        if not is_known.all() and not self._permute(domain, ordinal):
            return self._lanes.sequences(slots)
        self._num_calls += 1
        return self._sequence.take(self._shift.take(domain) + ordinal)

    def _permute(self, domain: NDArray[np.int32], ordinal: Ints) -> bool:
        """Permute the sequences of several calls from this one on; return False if that does not pay."""
        if self._num_paused:
            self._num_paused -= 1
            return False
        if self._num_calls < MIN_CALLS:
            self._num_paused = PAUSE
            self._num_calls = MIN_CALLS
            return False

        # A call needs a range of each of its domains.
        first = np.full(len(self._first), np.iinfo(np.int64).max)
        np.minimum.at(first, domain, ordinal)
        stop = np.zeros_like(first)
        np.maximum.at(stop, domain, ordinal + 1)
        is_own = stop > 0
        sizes = np.where(is_own, stop - first, 0)
        num_calls = min(CALLS_AHEAD, MAX_NUMBERS // int(sizes.sum()))
        sizes = np.where(is_own, np.maximum(sizes * num_calls, MIN_OF_DOMAIN), 0)
        if num_calls < MIN_CALLS or sizes.sum() > 2 * MAX_NUMBERS:
            return False
        # What is in memory of the other domains is permuted again, if there is room for it.
        others = np.where(is_own, 0, self._stop - self._first)
        if sizes.sum() + others.sum() <= 2 * MAX_NUMBERS:
            sizes += others

        ends = sizes.cumsum()
        self._first = np.where(is_own, first, self._first)
        self._stop = self._first + sizes
        self._shift = ends - sizes - self._first
        numbers = np.arange(ends[-1]) - self._shift.repeat(sizes)
        self._sequence = self._lanes.sequence(np.arange(len(sizes)).repeat(sizes), numbers)
        self._num_calls = 0
        return True
