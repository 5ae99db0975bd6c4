"""The order of the slots of a chunk whose segments follow each other; `Planner.order` makes it from a plan.

Price: about 80 numpy calls for the counts before some slots, or for some slots. Chunks with the same weights pay it
once for all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.slots.segment_order import SegmentOrder
from mixtera_hpc.core.slots.step_slots import StepSlots, joined_slots

__all__ = ["ChunkOrder", "counts_of_chunks", "slots_of_chunks"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkOrder:
    """The order of the slots of one chunk. Make it with `Planner.order`."""

    cursors: Ints
    """Position in each domain's stream at the first slot; shape (K,)."""
    segments: tuple[SegmentOrder, ...]
    """A segment ends where a domain is exhausted, and at the end of the chunk."""
    starts: Ints
    """First slot of each segment, and the number of slots of the chunk; shape (num_segments + 1,)."""
    counts: Ints
    """Sequences of each domain before each segment, and in the chunk; shape (num_segments + 1, K)."""

    @classmethod
    def of_segments(cls, cursors: Ints, segments: Sequence[SegmentOrder]) -> "ChunkOrder":
        """Return the order of consecutive segments."""
        counts = np.zeros((len(segments) + 1, len(cursors)), np.int64)
        for number, segment in enumerate(segments):
            counts[number + 1] = counts[number] + segment.counts
        return cls(cursors=cursors, segments=tuple(segments), starts=counts.sum(axis=1), counts=counts)

    @property
    def num_slots(self) -> int:
        """Slots of the chunk."""
        return int(self.starts[-1])

    def counts_before(self, slots: Ints) -> Ints:
        """Return how many sequences of each domain the chunk serves before each of `slots`; shape (len(slots), K).

        Slots behind the end of the chunk have the counts of the whole chunk.
        """
        slots = np.minimum(slots, self.num_slots)
        if len(self.segments) == 1:
            return self.segments[0].counts_before(slots)
        number = np.searchsorted(self.starts, slots, side="right") - 1
        counts = self.counts[number]
        for segment in np.unique(number[slots < self.num_slots]).tolist():
            inside = np.flatnonzero(number == segment)
            counts[inside] += self.segments[segment].counts_before(slots[inside] - self.starts[segment])
        return counts

    def slots(self, ranges: Sequence[tuple[int, int]]) -> StepSlots:
        """Return the sequences of the slots [first, stop) of each of `ranges`, such as a rank's positions in steps.

        A range that exceeds the chunk is cut there.

        Args:
            ranges: ascending, not overlapping.
        """
        parts = []
        for number, segment in enumerate(self.segments):
            start = int(self.starts[number])
            stop = int(self.starts[number + 1])
            inside = [(max(first, start) - start, min(last, stop) - start) for first, last in ranges]
            inside = [(first, last) for first, last in inside if first < last]
            if inside:
                parts.append(segment.slots(inside, self.cursors + self.counts[number]))
        sizes = (max(min(last, self.num_slots) - first, 0) for first, last in ranges)
        return StepSlots(joined_slots(parts), list(accumulate(sizes, initial=0)))


def counts_of_chunks(orders: Sequence[ChunkOrder], slots: Sequence[Ints]) -> list[Ints]:
    """Return the served numbers that the domains have reached before some slots of each chunk.

    Args:
        orders: of the chunks.
        slots: of each chunk, counted from its first one.

    Returns:
        For each chunk, an array of shape (its slots, K).
    """
    joined = _joined(orders)
    if joined is None:
        return [order.cursors + order.counts_before(own) for order, own in zip(orders, slots, strict=True)]
    sizes = [len(own) for own in slots]
    segment = np.arange(len(orders)).repeat(sizes)
    ends = np.array([order.num_slots for order in orders]).take(segment)
    counts = joined.counts_before(np.minimum(np.concatenate(slots), ends), segment)
    counts += np.stack([order.cursors for order in orders])[segment]
    return np.split(counts, np.cumsum(sizes)[:-1])


def slots_of_chunks(orders: Sequence[ChunkOrder], ranges: Sequence[Sequence[tuple[int, int]]]) -> StepSlots:
    """Return the sequences of some ranges of slots of each chunk, as `ChunkOrder.slots` does for one."""
    joined = _joined(orders)
    if joined is None:
        return StepSlots.joined([order.slots(own) for order, own in zip(orders, ranges, strict=True)])
    inside: list[tuple[int, int]] = []
    segments: list[int] = []
    sizes: list[int] = []
    for number, (order, own) in enumerate(zip(orders, ranges, strict=True)):
        cut = [(first, min(stop, order.num_slots)) for first, stop in own]
        sizes += [max(stop - first, 0) for first, stop in cut]
        filled = [(first, stop) for first, stop in cut if first < stop]
        inside += filled
        segments += [number] * len(filled)
    cursors = np.stack([order.cursors for order in orders])
    together = joined.slots(inside, cursors, segments) if inside else joined_slots([])
    return StepSlots(together, list(accumulate(sizes, initial=0)))


def _joined(orders: Sequence[ChunkOrder]) -> SegmentOrder | None:
    """Return the order of several chunks of one segment each, if all have the same weights; else None."""
    if len(orders) < 2 or any(len(order.segments) != 1 for order in orders):
        return None
    segments = [order.segments[0] for order in orders]
    if any(not np.array_equal(segment.weight, segments[0].weight) for segment in segments):
        return None
    return SegmentOrder.joined(segments)
