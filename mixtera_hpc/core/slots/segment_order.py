"""The order of the slots of a chunk: earliest deadline first (EDF), computed only for the slots that are needed.

A rank needs a few slots of every step. `served_counts` returns how many sequences of each domain EDF has served before
any slot, without going through the slots before it. From there, EDF runs slot by slot. Price: the counts before each
range of slots, and about 0.5 µs per slot in the range, for any number of slots between ranges.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.apportion import BITS, UNIT
from mixtera_hpc.core.slots.served_counts import ServedCounts

__all__ = ["SegmentOrder", "Slots"]

MAX_PIECE = 2048
"""Slots in one pass of EDF, so that the calls in it that hold the interpreter's lock are short."""
NEAR = 128
"""Slots between two ranges that EDF passes through faster than `counts_before` jumps over them."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """Sequences of a chunk, in the order in which they are served; shape (n,) each."""

    domain: NDArray[np.int32]
    ordinal: Ints
    """Served number: position among the sequences that its domain serves, counted from the start of the run."""
    sequence: Ints | None = None
    """Number in the stream of the domain; None if `LaneOrder.sequence` has to compute it."""

    def select(self, chosen: NDArray[np.intp] | slice) -> "Slots":
        """Return some of the sequences."""
        sequence = None if self.sequence is None else self.sequence[chosen]
        return Slots(domain=self.domain[chosen], ordinal=self.ordinal[chosen], sequence=sequence)


class _Served(NamedTuple):
    """Sequences in the order in which they are served; shape (n,) each."""

    domain: NDArray[np.int32]
    number: Ints
    """Position among the sequences of the domain, counted from the start of the segment."""


class SegmentOrder:
    """EDF over the slots of a segment, in which the weights are constant, or of several with the same weights."""

    def __init__(self, lag: Ints, weight: Ints, counts: Ints) -> None:
        """Compute nothing yet.

        Args:
            lag: at the first slot of a segment, in `UNIT`; shape (K,), or (S, K) for S segments.
            weight: in `UNIT`; shape (K,).
            counts: sequences of each domain in the segment, from `apportion.advance`; the shape of `lag`.
        """
        self.counts = counts
        self.weight = weight
        self._lag = lag.reshape(-1, len(weight))
        self._counts = counts.reshape(-1, len(weight))
        self._served = ServedCounts(self._lag, weight, self._counts)
        self._rate = self._served.rate

    @classmethod
    def joined(cls, segments: Sequence["SegmentOrder"]) -> "SegmentOrder":
        """Return one object for several single segments with the same weights."""
        lag, counts = (np.concatenate(rows) for rows in zip(*((s._lag, s._counts) for s in segments), strict=True))
        return cls(lag, segments[0].weight, counts)

    def counts_before(self, slots: Ints, segment: Ints | None = None) -> Ints:
        """Return how many sequences of each domain are served before each of `slots`; shape (len(slots), K).

        Args:
            slots: counted from the first one of their segments.
            segment: number of the segment of each slot; None if there is one segment.
        """
        return self._served.before(slots, segment)

    def slots(self, ranges: Sequence[tuple[int, int]], cursors: Ints, segments: Sequence[int] | None = None) -> Slots:
        """Return the sequences of the slots [first, stop) of `ranges`, one after the other.

        Args:
            ranges: ascending, not overlapping; those of a segment follow each other.
            cursors: position in each domain's stream at the first slot of the segment; shape (K,), or (S, K).
            segments: number of the segment of each range, ascending; None if there is one segment.
        """
        segments = [0] * len(ranges) if segments is None else segments
        groups = _near_ranges(ranges, segments)
        spans = np.array(
            [(ranges[group.start][0], ranges[group.stop - 1][1], segments[group.start]) for group in groups], np.int64
        )
        served = self._run(spans, self.counts_before(spans[:, 0], spans[:, 2]))
        cursors = cursors.reshape(-1, len(self.weight))
        if len(cursors) == 1:
            ordinal = cursors[0].take(served.domain)
        else:
            of_span = spans[:, 2].repeat(spans[:, 1] - spans[:, 0])
            ordinal = cursors.ravel().take(of_span * len(self.weight) + served.domain)
        ordinal += served.number
        slots = Slots(domain=served.domain, ordinal=ordinal)
        if sum(stop - first for first, stop in ranges) == len(ordinal):
            return slots

        # Leave out the slots between ranges.
        is_wanted = np.zeros(len(ordinal), np.bool_)
        before = 0
        for group, (begin, end, _) in zip(groups, spans.tolist(), strict=True):
            for first, stop in ranges[group.start : group.stop]:
                is_wanted[before + first - begin : before + stop - begin] = True
            before += end - begin
        return slots.select(np.flatnonzero(is_wanted))

    def _run(self, spans: Ints, before: Ints) -> _Served:
        """Return what the slots of each span serve.

        Args:
            spans: first slot, one past the last slot, and number of the segment; shape (num_spans, 3).
            before: counts before each span; shape (num_spans, K).
        """
        # Short spans are served together, so that numpy works on long arrays. A long one is served in pieces.
        total = (spans[:, 1] - spans[:, 0]).cumsum()
        if total[-1] <= MAX_PIECE:
            return self._serve(spans, before)
        parts: list[_Served] = []
        borders = np.flatnonzero(np.diff(total // MAX_PIECE)) + 1
        for together, counts in zip(np.split(spans, borders), np.split(before, borders), strict=True):
            begin, end, segment = together[0].tolist()
            if len(together) > 1 or end - begin <= MAX_PIECE:
                parts.append(self._serve(together, counts))
                continue
            for first in range(begin, end, MAX_PIECE):
                piece = self._serve(np.array([[first, min(first + MAX_PIECE, end), segment]]), counts)
                counts = counts + np.bincount(piece.domain, minlength=counts.shape[1])
                parts.append(piece)
        return _Served._make(np.concatenate(columns) for columns in zip(*parts, strict=True))

    def _serve(self, spans: Ints, served: Ints) -> _Served:
        """Return what the slots of each span serve; see `_run`."""
        num_domains = len(self.weight)
        starts = spans[:, 0]
        stops = spans[:, 1]
        lag = self._lag[spans[:, 2]]
        counts = self._counts[spans[:, 2]]
        num_slots = self._served.num_slots[spans[:, 2]]
        released = (lag + self._rate * stops[:, None] + (UNIT - 1)) >> BITS
        released = np.minimum(np.maximum(released, 0), counts)
        num_waiting = np.where((stops == num_slots)[:, None], counts, released) - served
        borders = [0, *num_waiting.sum(axis=1).cumsum().tolist()]
        waiting = num_waiting.ravel()

        # One entry per sequence that is released before the end of its span: by span, domain and number.
        cell = np.arange(len(waiting)).repeat(waiting)
        nth = np.arange(len(cell)) - (waiting.cumsum() - waiting - served.ravel()).repeat(waiting)
        # A single span is one number for all entries.
        span = cell // num_domains if len(spans) > 1 else np.zeros(1, np.int64)
        domain = cell - span * num_domains
        rate = self._rate.take(domain)
        share = nth * UNIT - lag.ravel().take(cell)
        release = np.minimum(np.maximum(share // rate, starts.take(span)), stops.take(span) - 1)
        deadline = np.minimum(np.maximum(-(-(share + UNIT) // rate), 1), num_slots.take(span))

        # Sorted inside of each span, so that the span of each entry remains.
        before_span = span * (int(num_slots.max()) + 1)
        by_priority = (before_span + deadline).argsort(kind="stable")
        release = release.take(by_priority)
        by_release = (before_span + release).argsort(kind="stable")
        releases = release.take(by_release).tolist()
        priorities = by_release.tolist()
        order: list[int] = []
        for (begin, end), (start, stop, _) in zip(pairwise(borders), spans.tolist(), strict=True):
            order += _earliest_deadline_first(releases[begin:end], priorities[begin:end], range(start, stop))
        chosen = by_priority.take(order)
        return _Served(domain.take(chosen).astype(np.int32), nth.take(chosen))


def _near_ranges(ranges: Sequence[tuple[int, int]], segments: Sequence[int]) -> list[range]:
    """Group ranges of one segment that are close to each other; return the positions of each group."""
    borders = [
        i for i in range(1, len(ranges)) if segments[i] != segments[i - 1] or ranges[i][0] - ranges[i - 1][1] > NEAR
    ]
    return [range(begin, end) for begin, end in pairwise([0, *borders, len(ranges)])]


def _earliest_deadline_first(release: list[int], priority: list[int], slots: range) -> list[int]:
    """Return the priorities in the order in which they are served; a lower number is served first.

    Args:
        release: first slot of each sequence, ascending.
        priority: rank of each sequence by deadline.
        slots: each of them has a sequence waiting.
    """
    heappush = heapq.heappush
    heappop = heapq.heappop
    heappushpop = heapq.heappushpop
    waiting: list[int] = []
    served: list[int] = []
    num_released = 0
    releases = [*release, slots.stop]
    for slot in slots:
        if releases[num_released] > slot:
            served.append(heappop(waiting))
            continue
        # To add the last one and to take the first one is a single call.
        newest = priority[num_released]
        num_released += 1
        while releases[num_released] <= slot:
            heappush(waiting, newest)
            newest = priority[num_released]
            num_released += 1
        served.append(heappushpop(waiting, newest))
    return served
