"""Lanes: the order in which the sequences of an epoch are served.

The windows of an epoch follow each other in the *base order* (`core/order.py`). An epoch is cut into a fixed number of
equal lanes, each a range of neighbouring sequences of the base order, and sequences are taken from the lanes in turn.
The lane after lane i is i + g (mod L), with g / L close to the golden section: so any number of consecutive sequences
of a domain is spread evenly over the lanes, also fewer than there are lanes.
At any time only a few windows of every lane are in use. Inside a step the sequences are sorted by lane, so each rank
needs few lanes, and each node reads and decodes its own part of the data. Price: a closed form per sequence, no memory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.sequence_grid import SequenceGrid
from mixtera_hpc.core.slots.lane_positions import LaneRanges, positions_of_steps
from mixtera_hpc.core.slots.segment_order import Slots
from mixtera_hpc.core.slots.step_slots import StepSlots

__all__ = ["LaneOrder", "ServedPart", "cut_spans"]

MAX_STEP_RANGES = 1 << 20
"""Steps times ranges that are computed at once. A chunk may have thousands of epochs of a domain, each a range."""

Ints = NDArray[np.int64]
AnyInts = NDArray[np.integer[Any]]


class _EpochLanes(NamedTuple):
    """The lanes of an epoch, or of its part since samples were dropped; one entry per sequence that is looked up."""

    first: Ints
    """Number of the first whole sequence of the epoch, with which lane 0 begins."""
    lane_length: Ints
    """Sequences per lane, Q; the sequences that remain after the last lane are served at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedPart:
    """The items of an epoch that were served before samples were dropped.

    From the drop on, the stream of this epoch begins with these items and continues with all others, in base order.
    """

    epoch: int
    ranges: tuple[tuple[int, int], ...]
    """First item and one past the last item of each range, counted from the start of the epoch; ascending."""

    def pieces(self, epoch_items: int) -> Ints:
        """Return the ranges of base items in stream order: those served, then the others; shape (n, 2)."""
        served = np.array(self.ranges, np.int64).reshape(-1, 2)
        others = np.stack([np.append(0, served[:, 1]), np.append(served[:, 0], epoch_items)], axis=1)
        pieces = np.concatenate([served, others])
        return pieces[pieces[:, 0] < pieces[:, 1]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LaneOrder:
    """Mapping between served sequences and sequences of the streams."""

    lanes: int
    """Number of lanes; 1 serves the base order."""
    grid: SequenceGrid
    epoch_items: Ints
    """Items of one epoch of every domain; shape (K,)."""
    origins: Ints
    """Item at which sequence 0 of every domain begins; shape (K,)."""
    begins: Ints
    """Item from which on every domain is served since samples were dropped, 0 without drops; shape (K,)."""

    def sequence(self, domain: AnyInts | int, ordinal: Ints) -> Ints:
        """Return the number in the stream of the sequences that are served as number `ordinal` of their domains."""
        epoch = self._epoch_lanes(domain, ordinal)
        number = ordinal - epoch.first
        length = epoch.lane_length
        in_lanes = number < self.lanes * length
        dealt = epoch.first + number * self._step % self.lanes * length + number // self.lanes
        sequence: Ints = np.where(in_lanes, dealt, ordinal)
        return sequence

    def sequences(self, slots: Slots) -> Ints:
        """Return the numbers in the streams of some sequences."""
        return self.sequence(slots.domain, slots.ordinal) if slots.sequence is None else slots.sequence

    def ordinal(self, domain: int, sequence: int) -> int:
        """Return the number under which a sequence of the stream is served; the inverse of `sequence`."""
        first, length = self._lanes_of_one(domain, sequence)
        number = sequence - first
        if not 0 <= number < self.lanes * length:
            return sequence
        return first + number % length * self.lanes + self._turn(number // length)

    def positions(self, first: Ints, stop: Ints, positions: Sequence[slice]) -> StepSlots:
        """Return the sequences of several steps at some positions of their batches, in their order.

        Args:
            first: first served number of every domain in every step, which ascend; shape (num_steps, K).
            stop: one past the last served number; shape (num_steps, K).
            positions: of each batch, with both ends; see `positions_of_steps`.
        """
        # The plan after the last step of the data has no steps.
        if not positions:
            return StepSlots.of_steps([])
        ranges = self._ranges(first[0], stop[-1])
        if len(positions) > 1 and len(positions) * len(ranges.domain) > MAX_STEP_RANGES:
            middle = len(positions) // 2
            halves = (slice(middle), slice(middle, None))
            parts = [self.positions(first[half], stop[half], positions[half]) for half in halves]
            return StepSlots.of_steps([slots for part in parts for slots in part.steps()])
        return positions_of_steps(ranges, _turns(self.lanes), first, stop, positions)

    def served_ranges(self, domain: int, ordinal: int) -> list[tuple[int, int]]:
        """Return the items of the stream that the epoch of `ordinal` serves before it, as ascending ranges."""
        low, _ = self._bounds(domain, np.array([ordinal]))
        first, length = self._lanes_of_one(domain, ordinal)
        stop = self._item(domain, ordinal)
        number = ordinal - first
        if not 0 < number < self.lanes * length:
            return [(int(low[0]), stop)]
        # Every lane has served number / lanes sequences; those whose turn came first one more.
        counts = [(number + self.lanes - 1 - self._turn(lane)) // self.lanes for lane in range(self.lanes)]
        begins = [self._item(domain, first + lane * length) for lane in range(self.lanes)]
        ranges = [(begin, begin + count * self.grid.stride) for begin, count in zip(begins, counts, strict=True)]
        return [(int(low[0]), begins[0]), *ranges]

    @property
    def _step(self) -> int:
        return _golden_step(self.lanes)

    def _turn(self, lane: int) -> int:
        """Return when it is the turn of a lane, in [0, lanes)."""
        return int(_turns(self.lanes)[lane])

    def _ranges(self, first: Ints, stop: Ints) -> LaneRanges:
        """Return the served numbers from `first` to `stop` of every domain as ranges of one epoch each."""
        domain = np.flatnonzero(first < stop)
        first = first.take(domain)
        stop = stop.take(domain)
        epoch = self._epoch_lanes(domain, first)
        is_inside = stop <= epoch.first + self.lanes * epoch.lane_length
        ranges = LaneRanges(domain, first, stop, epoch.first, epoch.lane_length, is_inside)
        # Nearly always all numbers of a domain lie in the lanes of one epoch.
        if is_inside.all():
            return ranges
        is_cut = ~is_inside
        return ranges.select(is_inside).merged(self._cut_ranges(domain[is_cut], first[is_cut], stop[is_cut]))

    def _cut_ranges(self, domain: AnyInts, first: Ints, stop: Ints) -> LaneRanges:
        """Cut ranges of served numbers where epochs begin and where the lanes of an epoch end."""
        items = self.epoch_items[domain]
        starts = self.origins[domain] + np.stack([first, stop - 1]) * self.grid.stride
        first_epoch, last_epoch = starts // items
        # An epoch with fewer sequences than lanes has none in lanes: there may be thousands of them in a step.
        num_epochs = np.where(items // self.grid.stride + 1 < self.lanes, 1, last_epoch - first_epoch + 1)
        part = np.repeat(np.arange(len(domain)), num_epochs)
        number = np.arange(len(part)) - np.repeat(np.cumsum(num_epochs) - num_epochs, num_epochs)
        # Every part begins with the first number, or where the next epoch begins.
        epoch_starts = (first_epoch[part] + number) * items[part]
        begins = -((self.origins[domain[part]] - epoch_starts) // self.grid.stride)
        begins = np.where(number == 0, first[part], begins)
        ends = np.where(number == num_epochs[part] - 1, stop[part], np.append(begins[1:], 0))

        epoch = self._epoch_lanes(domain[part], begins)
        borders = np.clip(epoch.first + self.lanes * epoch.lane_length, begins, ends)
        # Each part is a range in lanes, and one behind them; nearly always one of the two is empty.
        range_first = np.stack([begins, borders], axis=1).ravel()
        range_stop = np.stack([borders, ends], axis=1).ravel()
        filled = np.flatnonzero(range_first < range_stop)
        of_part = filled // 2
        return LaneRanges(
            domain=domain[part][of_part],
            first=range_first[filled],
            stop=range_stop[filled],
            origin=epoch.first[of_part],
            lane_length=epoch.lane_length[of_part],
            is_dealt=filled % 2 == 0,
        )

    def whole_sequences(self, domain: AnyInts | int, number: Ints) -> tuple[Ints, Ints]:
        """Return the first sequence and the number of sequences that lie in the epoch in which each one begins.

        After samples were dropped, those that begin behind the place of the drop count.
        """
        low, high = self._bounds(domain, number)
        origin = self.origins[domain]
        stride = self.grid.stride
        first = -((origin - low) // stride)  # Division that rounds up.
        # A sequence that ends in the next epoch is not among them.
        count = (high - origin - self.grid.length) // stride + 1 - first
        return first, np.maximum(count, 0)

    def _epoch_lanes(self, domain: AnyInts | int, ordinal: Ints) -> _EpochLanes:
        """Return the lanes of the epoch in which each sequence begins."""
        first, count = self.whole_sequences(domain, ordinal)
        return _EpochLanes(first, count // self.lanes)

    def _lanes_of_one(self, domain: int, ordinal: int) -> tuple[int, int]:
        """Return the first whole sequence of the epoch in which one sequence begins, and the sequences per lane."""
        epoch = self._epoch_lanes(domain, np.array([ordinal]))
        return int(epoch.first[0]), int(epoch.lane_length[0])

    def _bounds(self, domain: AnyInts | int, ordinal: Ints) -> tuple[Ints, Ints]:
        """Return the first item of each sequence's epoch, or of its part since a drop, and one past the last."""
        items = self.epoch_items[domain]
        start = self.origins[domain] + ordinal * self.grid.stride
        epoch_start = start // items * items
        low: Ints = np.maximum(epoch_start, self.begins[domain])
        return low, epoch_start + items

    def _item(self, domain: int, sequence: int) -> int:
        return int(self.origins[domain]) + sequence * self.grid.stride


@cache
def _golden_step(lanes: int) -> int:
    """Return the distance from one lane to the next one in turn; it has no common divisor with the number of lanes."""
    golden = round(lanes * (math.sqrt(5) - 1) / 2)
    # Of two neighbours at the same distance, the smaller one.
    candidates = sorted(range(1, lanes + 1), key=lambda step: (abs(step - golden), step))
    return next(step for step in candidates if math.gcd(step, lanes) == 1)


@cache
def _turns(lanes: int) -> Ints:
    """Return the turn of every lane, in [0, lanes); shape (lanes,)."""
    return np.arange(lanes) * pow(_golden_step(lanes), -1, lanes) % lanes


def cut_spans(starts: Ints, stops: Ints, borders: Ints) -> tuple[Ints, Ints, Ints]:
    """Cut spans at borders; return the start, the stop and the cell of every part, in the order of the spans.

    Args:
        starts: first item of every span.
        stops: one past the last item, beyond the first.
        borders: ascending; cell i lies between border i and border i + 1. The cells cover all spans.
    """
    first = np.searchsorted(borders, starts, side="right") - 1
    count = np.searchsorted(borders, stops, side="left") - first
    span = np.repeat(np.arange(len(starts)), count)
    cell = first[span] + np.arange(len(span)) - (np.cumsum(count) - count)[span]
    begin = np.maximum(starts[span], borders[cell])
    end = np.minimum(stops[span], borders[cell + 1])
    # A span may cross a cell without items.
    filled = np.flatnonzero(begin < end)
    return begin[filled], end[filled], cell[filled]
