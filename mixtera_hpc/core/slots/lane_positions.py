"""The sequences at some positions of a batch whose sequences are sorted by lane.

The sequences of a step are consecutive served numbers of each domain, and consecutive numbers are in the lanes
0, g, 2g, … (mod L). So the sequences per lane follow from the first number and the number of sequences of every domain,
and those of a lane are L numbers apart. Price: a few numpy operations on numbers per lane, per domain, and on the
sequences of the lanes that the positions touch, for several steps at once; nothing depends on the size of the global
batch.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.slots.segment_order import Slots

__all__ = ["END_OF_EPOCH", "ServedRanges", "positions_of_steps", "sort_by_lane"]

Ints = NDArray[np.int64]
END_OF_EPOCH = -1
"""The turn of the sequences that remain at the end of an epoch. They are in the last lane."""


class ServedRanges(NamedTuple):
    """Consecutive served numbers of one domain in one step each, sorted by step, domain and number; shape (n,) each."""

    step: Ints
    """Position of the step among those asked for."""
    domain: Ints
    first: Ints
    size: Ints
    turn: Ints
    """The turn of the lane of the first number, in [0, L); every number after it has the next turn.
    `END_OF_EPOCH` for numbers that are not dealt out to lanes."""
    origin: Ints
    """The first number of the stream in these lanes, which is also the first one that they serve."""
    lane_length: Ints
    """Sequences per lane."""

    def select(self, chosen: NDArray[np.intp]) -> "ServedRanges":
        """Return some of the ranges."""
        return ServedRanges(*(values[chosen] for values in self))

    def merged(self, other: "ServedRanges") -> "ServedRanges":
        """Return these ranges and those of other domains, in order."""
        every = ServedRanges(*map(np.concatenate, zip(self, other, strict=True)))
        return every.select(np.argsort(every.step * (every.domain.max() + 1) + every.domain, kind="stable"))

    def per_lane(self, num_steps: int, turns: Ints) -> Ints:
        """Return the sequences of each lane in each step; shape (num_steps, L). `turns` has the turn of every lane."""
        lanes = len(turns)
        width = 2 * lanes + 1
        is_dealt = self.turn >= 0
        step = self.step[is_dealt]
        size = self.size[is_dealt]
        turn = self.turn[is_dealt]
        # Whole rounds add one to every lane. The rest of a range adds one to neighbouring turns, counted by its ends.
        begins = step * width + turn
        ends = np.bincount(begins, minlength=num_steps * width)
        ends -= np.bincount(begins + size % lanes, minlength=num_steps * width)
        per_turn = np.cumsum(ends.reshape(num_steps, width), axis=1)
        rounds = np.zeros(num_steps, np.int64)
        np.add.at(rounds, step, size // lanes)
        of_turns = per_turn[:, :lanes] + per_turn[:, lanes : 2 * lanes] + rounds[:, None]
        of_lanes: Ints = of_turns[:, turns]
        np.add.at(of_lanes[:, -1], self.step[~is_dealt], self.size[~is_dealt])
        return of_lanes

    def of_lane(self, lane: Ints, number: Ints, turns: Ints) -> tuple[Ints, Ints, Ints]:
        """Return first number, count and stride of the sequences that ranges have in lanes.

        Args:
            lane: lanes; shape (m,).
            number: a range for each of them; shape (m,).
            turns: the turn of every lane.
        """
        lanes = len(turns)
        turn = self.turn[number]
        size = self.size[number]
        distance = (turns[lane] - turn) % lanes
        count = np.maximum(size - distance + lanes - 1, 0) // lanes
        at_end = turn == END_OF_EPOCH
        distance[at_end] = 0
        count[at_end] = np.where(lane == lanes - 1, size, 0)[at_end]
        return self.first[number] + distance, count, np.where(at_end, 1, lanes)

    def all_positions(self, turns: Ints, positions: Sequence[slice]) -> list[Slots]:
        """Return the sequences at some positions of the batch of each step, from all sequences of these steps."""
        lanes = len(turns)
        number = np.repeat(np.arange(len(self.size)), self.size)
        ordinal = np.arange(len(number)) + (self.first - (np.cumsum(self.size) - self.size))[number]
        lane, sequence = self.in_stream(number, ordinal, turns)
        # The steps ascend, so a sort by step and lane sorts each step by lane.
        step = self.step[number]
        by_lane = _stable_order(step * lanes + lane, len(positions) * lanes)
        steps = zip(pairwise(_borders(step, len(positions))), positions, strict=True)
        chosen = [_rotated(by_lane[first:stop], lanes)[own] for (first, stop), own in steps]
        in_order = np.concatenate(chosen)
        ends = np.cumsum([len(of_step) for of_step in chosen]).tolist()
        return self.slots_of_steps(number[in_order], ordinal[in_order], sequence[in_order], [0, *ends])

    def in_stream(self, number: NDArray[np.intp], ordinal: Ints, turns: Ints) -> tuple[Ints, Ints]:
        """Return the lanes of served sequences, and their numbers in the streams of their domains.

        Args:
            number: the range of each sequence; shape (m,).
            ordinal: the served number of each sequence.
            turns: the turn of every lane.
        """
        lanes = len(turns)
        rounds, turn = np.divmod(ordinal - self.origin[number], lanes)
        lane = np.argsort(turns)[turn]
        sequence = self.origin[number] + lane * self.lane_length[number] + rounds
        if (self.turn == END_OF_EPOCH).any():
            at_end = np.flatnonzero(self.turn[number] == END_OF_EPOCH)
            lane[at_end] = lanes - 1
            sequence[at_end] = ordinal[at_end]
        return lane, sequence

    def slots_of_steps(
        self, number: NDArray[np.intp], ordinal: Ints, sequence: Ints, borders: Sequence[int]
    ) -> list[Slots]:
        """Return sequences of all steps step by step.

        Args:
            number: the range of each sequence; shape (m,).
            ordinal: the served number of each sequence.
            sequence: the number of each sequence in the stream of its domain.
            borders: first sequence of each step, and m.
        """
        every = Slots(domain=self.domain.astype(np.int32)[number], ordinal=ordinal, sequence=sequence)
        return [every.select(slice(begin, end)) for begin, end in pairwise(borders)]


class _Parts(NamedTuple):
    """Parts of batches before their rotation; shape (n,) each."""

    step: NDArray[np.intp]
    begin: Ints
    """First position."""
    end: Ints

    @classmethod
    def of_positions(cls, positions: Sequence[slice], size: Ints, lanes: int) -> "_Parts":
        """Return where the positions of rotated batches lie: in up to two parts of each, which may begin again.

        Args:
            positions: of each batch, with both ends.
            size: sequences of each batch.
            lanes: number of lanes.
        """
        first, stop = np.minimum(np.array([(own.start, own.stop) for own in positions]).T, size) + size // (2 * lanes)
        begin = np.stack([first, np.maximum(first, size) - size], axis=1).ravel()
        end = np.stack([np.minimum(stop, size), stop - size], axis=1).ravel()
        parts = np.flatnonzero(begin < end)
        return cls(parts // 2, begin[parts], end[parts])


def positions_of_steps(ranges: ServedRanges, turns: Ints, positions: Sequence[slice]) -> list[Slots]:
    """Return the sequences at some positions of the batches of several steps, in their order.

    Args:
        ranges: all sequences of the steps.
        turns: the turn of every lane; shape (L,).
        positions: of the batch of each step, with both ends; a batch at the end of the data may have fewer sequences.
    """
    # The plan after the last step of the data has no steps.
    if not positions:
        return []
    num_steps = len(positions)
    if 2 * sum(own.stop - own.start for own in positions) >= int(ranges.size.sum()):
        # The rank gets most of the batches.
        return ranges.all_positions(turns, positions)
    ends = np.cumsum(ranges.per_lane(num_steps, turns), axis=1)
    size = ends[:, -1]
    step, begin, end = _Parts.of_positions(positions, size, len(turns))
    first_lane = (ends[step] <= begin[:, None]).sum(axis=1)
    num_lanes = (ends[step] <= end[:, None] - 1).sum(axis=1) + 1 - first_lane

    # One row per lane of a part and range of its step.
    range_ends = np.searchsorted(ranges.step, np.arange(num_steps + 1))
    num_ranges = np.diff(range_ends)
    if int((num_lanes * num_ranges[step]).sum()) > int(size.sum()):
        # Many lanes of many domains: expanding the batches costs less.
        return ranges.all_positions(turns, positions)
    part = np.repeat(np.arange(len(step)), num_lanes)
    lane = first_lane[part] + _count_up(num_lanes)
    per_row = num_ranges[step[part]]
    number = np.repeat(range_ends[step[part]], per_row) + _count_up(per_row)
    ordinal, count, stride = ranges.of_lane(np.repeat(lane, per_row), number, turns)

    # One entry per sequence of these lanes; those of a part follow each other.
    ordinal = np.repeat(ordinal, count) + _count_up(count) * np.repeat(stride, count)
    of_part = np.repeat(np.repeat(part, per_row), count)
    before = np.where(first_lane > 0, ends[step, first_lane - 1], 0)
    in_order = _count_up(np.bincount(of_part, minlength=len(step))) + before[of_part]
    own = np.flatnonzero((in_order >= begin[of_part]) & (in_order < end[of_part]))
    ordinal = ordinal[own]
    number = np.repeat(number, count)[own]
    _, sequence = ranges.in_stream(number, ordinal, turns)
    return ranges.slots_of_steps(number, ordinal, sequence, _borders(step[of_part[own]], num_steps))


def _count_up(sizes: Ints) -> Ints:
    """Return 0, 1, … up to each size, one after the other."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _borders(step: Ints, num_steps: int) -> list[int]:
    """Return the position at which every step begins in ascending step numbers, then the number of entries."""
    borders: list[int] = np.searchsorted(step, np.arange(num_steps + 1)).tolist()
    return borders


def sort_by_lane(lane: Ints, lanes: int) -> NDArray[np.intp]:
    """Return which sequence of a step fills each position of the batch; shape of `lane`.

    The sequences are sorted by lane and rotated by half a lane. So the borders between ranks lie in the middle of
    lanes, and the changing number of sequences per lane does not move them into another lane.
    """
    return _rotated(_stable_order(lane, lanes), lanes)


def _rotated(values: NDArray[Any], lanes: int) -> NDArray[Any]:
    """Return the sequences of a step, sorted by lane, in the order of the positions of its batch."""
    shift = len(values) // (2 * lanes)
    return np.concatenate([values[shift:], values[:shift]])


def _stable_order(key: Ints, num_keys: int) -> NDArray[np.intp]:
    """Return the stable order of keys in [0, num_keys); shape of `key`."""
    # Small integers are sorted by their digits, in linear time.
    if num_keys < 1 << 16:
        key = key.astype(np.uint16)
    return np.argsort(key, kind="stable")
