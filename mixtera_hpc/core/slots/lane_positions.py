"""The sequences at some positions of a batch whose sequences are sorted by lane.

The sequences of a step are consecutive served numbers of each domain, and consecutive numbers are in the lanes
0, g, 2g, … (mod L). So the sequences per lane follow from the first number and the number of sequences of every domain,
and those of a lane are L numbers apart. What a step has of one domain in one lane is a *cell* here. Price: a few numpy
operations on numbers per cell of the lanes that the positions touch, for several steps at once; nothing depends on the
size of the global batch. Where there are more cells than sequences in the steps, all sequences are expanded and sorted.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.slots.segment_order import Slots
from mixtera_hpc.core.slots.step_slots import StepSlots

__all__ = ["LaneRanges", "positions_of_steps"]

FEW_CELLS = 4096
"""Largest number of cells that are all computed: to find the touched lanes first would cost more."""

Ints = NDArray[np.int64]
AnyInts = NDArray[np.integer[Any]]


class LaneRanges(NamedTuple):
    """Consecutive served numbers of one domain, which lie in the lanes of one epoch or behind them; shape (n,) each.

    They are sorted by domain and number.
    """

    domain: AnyInts
    first: Ints
    stop: Ints
    origin: Ints
    """The first number of the stream in these lanes, which is also the first one that they serve."""
    lane_length: Ints
    """Sequences per lane."""
    is_dealt: NDArray[np.bool_]
    """False for sequences that remain at the end of an epoch. They are not dealt out to lanes, and are in the last."""

    def select(self, chosen: NDArray[np.bool_] | NDArray[np.intp]) -> "LaneRanges":
        """Return some of the ranges."""
        return LaneRanges._make(values[chosen] for values in self)

    def merged(self, other: "LaneRanges") -> "LaneRanges":
        """Return these ranges and those of other domains, in order."""
        every = LaneRanges._make(np.concatenate(pair) for pair in zip(self, other, strict=True))
        return every.select(np.argsort(every.domain, kind="stable"))


class _Cells(NamedTuple):
    """The sequences of steps in each lane of each range, sorted by step, lane and range; shape (n,) each.

    Sequence m of all cells, which belongs to cell c, has the served number `ordinal[c] + stride[c] * m` of its domain
    and the number `sequence[c] + m` in the stream of its domain.
    """

    counts: Ints
    domain: NDArray[np.int32]
    ordinal: Ints
    sequence: Ints
    stride: Ints | int

    def slots(self, numbers: Ints) -> Slots:
        """Return the sequences with some numbers, counted through all cells."""
        ends = self.counts.cumsum()
        # For few of the sequences, a binary search for each; else a table of the cells of all sequences.
        if 8 * len(numbers) < ends[-1]:
            cell = ends.searchsorted(numbers, "right")
        else:
            cell = np.arange(len(ends)).repeat(self.counts).take(numbers)
        stride = self.stride if isinstance(self.stride, int) else self.stride.take(cell)
        return Slots(
            domain=self.domain.take(cell),
            ordinal=self.ordinal.take(cell) + numbers * stride,
            sequence=self.sequence.take(cell) + numbers,
        )


class _ServedRanges(NamedTuple):
    """The served numbers of S steps in each of R ranges, which are dealt out to L lanes."""

    ranges: LaneRanges
    turns: Ints
    """The turn of every lane, in [0, L); shape (L,)."""
    number: Ints
    """The first served number, counted from the origin of its range; shape (S, R).

    Modulo L it is the turn of its lane. Every number after it has the next turn.
    """
    size: Ints
    """Count of served numbers; shape (S, R)."""

    @classmethod
    def of_steps(cls, ranges: LaneRanges, turns: Ints, first: Ints, stop: Ints) -> "_ServedRanges":
        """Cut the served numbers of each domain at the ranges.

        Args:
            ranges: all numbers that the steps serve.
            turns: the turn of every lane; shape (L,).
            first: first served number of every domain in every step; shape (S, K).
            stop: one past the last served number; shape (S, K).
        """
        begin = first.take(ranges.domain, axis=1)
        end = stop.take(ranges.domain, axis=1)
        for number in (begin, end):
            np.maximum(number, ranges.first, out=number)
            np.minimum(number, ranges.stop, out=number)
        end -= begin
        begin -= ranges.origin
        return cls(ranges, turns, begin, end)

    def cells(self, step_lanes: NDArray[np.intp] | None = None) -> _Cells:
        """Return the cells of all lanes of all steps, or of the lanes with the numbers L · step + lane."""
        lanes = len(self.turns)
        if step_lanes is None:
            number = self.number[:, None]
            size = self.size[:, None]
            lane = np.arange(lanes)[:, None]
            turn_of_lane = self.turns[:, None]
        else:
            step = step_lanes // lanes
            number = self.number.take(step, axis=0)
            size = self.size.take(step, axis=0)
            lane = (step_lanes - step * lanes)[:, None]
            turn_of_lane = self.turns.take(lane)

        # From the first number of a range to the first one in this lane.
        distance = (turn_of_lane - number) % lanes
        counts = (size + (lanes - 1) - distance) // lanes
        first = number + distance
        sequence = first // lanes + (self.ranges.origin + lane * self.ranges.lane_length)
        stride: Ints | int = lanes
        is_dealt = self.ranges.is_dealt
        if not is_dealt.all():
            counts = np.where(is_dealt, counts, np.where(lane == lanes - 1, size, 0))
            first = np.where(is_dealt, first, number)
            sequence = np.where(is_dealt, sequence, first + self.ranges.origin)
            stride = np.broadcast_to(np.where(is_dealt, lanes, 1), counts.shape).ravel()

        ordinal = (first + self.ranges.origin).ravel()
        domain = np.broadcast_to(self.ranges.domain.astype(np.int32), counts.shape).ravel()
        counts = counts.ravel()
        before = counts.cumsum() - counts
        return _Cells(counts, domain, ordinal - stride * before, sequence.ravel() - before, stride)

    def per_lane(self) -> Ints:
        """Return the sequences of each lane in each step; shape (S · L,)."""
        lanes = len(self.turns)
        width = 2 * lanes + 1
        size = self.size
        is_dealt = self.ranges.is_dealt
        dealt = size if is_dealt.all() else size * is_dealt
        # Whole rounds add one to every lane. The rest of a range adds one to neighbouring turns, counted by its ends.
        rounds, rest = np.divmod(dealt, lanes)
        begins = self.number % lanes + np.arange(0, len(size) * width, width)[:, None]
        changes = np.bincount(begins.ravel(), minlength=len(size) * width)
        changes -= np.bincount((begins + rest).ravel(), minlength=len(size) * width)
        per_turn = changes.reshape(-1, width).cumsum(axis=1)
        # Turns from L on are those of the next round.
        by_turn = per_turn[:, :lanes] + per_turn[:, lanes : 2 * lanes] + rounds.sum(axis=1, keepdims=True)
        by_lane: Ints = by_turn.take(self.turns, axis=1)
        if dealt is not size:
            # Sequences that are not dealt out are in the last lane.
            by_lane[:, -1] += (size - dealt).sum(axis=1)
        return by_lane.ravel()

    def sorted_slots(self, numbers: Ints) -> Slots:
        """Return the sequences with some numbers, counted through all cells, by sorting all sequences of the steps."""
        lanes = len(self.turns)
        num_steps, num_ranges = self.size.shape
        filled = np.flatnonzero(self.size)
        size = self.size.ravel().take(filled)
        step = filled // num_ranges
        ranges = self.ranges.select(filled - step * num_ranges)
        # Of each sequence: its step and range, as a position in `filled`, and its served number from the origin on.
        part = np.arange(len(filled)).repeat(size)
        first = self.number.ravel().take(filled) - (size.cumsum() - size)
        number: Ints = np.add(first.take(part), np.arange(len(part)), dtype=np.int64)
        rounds = number // lanes
        lane = self.turns.argsort().take(number - rounds * lanes)
        at_end = None if ranges.is_dealt.all() else ~ranges.is_dealt.take(part)
        if at_end is not None:
            lane[at_end] = lanes - 1

        # The steps ascend, so a sort by step and lane sorts each step by lane.
        by_lane = _stable_order((step * lanes).take(part) + lane, num_steps * lanes).take(numbers)
        part = part.take(by_lane)
        origin = ranges.origin.take(part)
        ordinal = number.take(by_lane) + origin
        sequence = origin + lane.take(by_lane) * ranges.lane_length.take(part) + rounds.take(by_lane)
        if at_end is not None:
            sequence = np.where(at_end.take(by_lane), ordinal, sequence)
        return Slots(domain=ranges.domain.astype(np.int32).take(part), ordinal=ordinal, sequence=sequence)


def positions_of_steps(
    ranges: LaneRanges, turns: Ints, first: Ints, stop: Ints, positions: Sequence[slice]
) -> StepSlots:
    """Return the sequences at some positions of the batches of several steps, in their order.

    Args:
        ranges: all numbers that the steps serve.
        turns: the turn of every lane; shape (L,).
        first: first served number of every domain in every step; shape (num_steps, K).
        stop: one past the last served number; shape (num_steps, K).
        positions: of the batch of each step, with both ends; a batch at the end of the data may have fewer sequences.
    """
    served = _ServedRanges.of_steps(ranges, turns, first, stop)
    sizes = served.size.sum(axis=1).tolist()
    numbers, borders = _numbers_of(sizes, positions, len(turns))
    return StepSlots(_slots_at(served, numbers, sum(sizes)), borders)


def _slots_at(served: _ServedRanges, numbers: Ints, num_sequences: int) -> Slots:
    """Return the sequences with some numbers, counted through all steps, sorted by lane in each step."""
    if not len(numbers):
        return StepSlots.of_steps([]).together
    lanes = len(served.turns)
    if served.size.size * lanes <= min(FEW_CELLS, num_sequences):
        return served.cells().slots(numbers)
    if 2 * len(numbers) >= num_sequences:
        # The rank gets most of the batches.
        return served.sorted_slots(numbers)
    per_lane = served.per_lane()
    ends = per_lane.cumsum()
    step_lane = ends.searchsorted(numbers, "right")
    is_touched = np.zeros(len(ends), np.bool_)
    is_touched[step_lane] = True
    touched = np.flatnonzero(is_touched)
    if len(touched) * served.size.shape[1] > num_sequences:
        # Many lanes of many domains.
        return served.sorted_slots(numbers)
    # Only the cells of touched lanes: the numbers do not count the sequences of the others.
    others = np.where(is_touched, 0, per_lane).cumsum()
    return served.cells(touched).slots(numbers - others.take(step_lane))


def _numbers_of(sizes: Sequence[int], positions: Sequence[slice], lanes: int) -> tuple[Ints, list[int]]:
    """Return which sequences are at some positions, and where those of each step begin, then the number of all.

    The sequences are numbered through all steps, and inside each step by lane.

    Args:
        sizes: sequences of each step.
        positions: of the batch of each step, with both ends.
        lanes: number of lanes.
    """
    own = [_rotated_positions(size, part.start, part.stop, lanes) for size, part in zip(sizes, positions, strict=True)]
    begins = np.fromiter(accumulate(sizes[:-1], initial=0), np.int64, len(sizes))
    counts = [len(part) for part in own]
    return np.concatenate(own) + begins.repeat(counts), list(accumulate(counts, initial=0))


@lru_cache(maxsize=16)
def _rotated_positions(size: int, start: int, stop: int, lanes: int) -> Ints:
    """Return which of the `size` sequences of a step, sorted by lane, fill the positions from `start` to `stop`.

    The sequences are rotated by half a lane. So the borders between ranks lie in the middle of lanes, and the changing
    number of sequences per lane does not move them into another lane. The result is read-only.
    """
    numbers = (np.arange(min(start, size), min(stop, size)) + size // (2 * lanes)) % max(size, 1)
    numbers.setflags(write=False)
    return numbers


def _stable_order(key: Ints, num_keys: int) -> NDArray[np.intp]:
    """Return the stable order of keys in [0, num_keys); shape of `key`."""
    # Small integers are sorted by their digits, in linear time.
    if num_keys < 1 << 16:
        key = key.astype(np.uint16)
    return key.argsort(kind="stable")
