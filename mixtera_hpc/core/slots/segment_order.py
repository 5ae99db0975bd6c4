"""The order of the slots of a chunk: earliest deadline first (EDF), computed only for the slots that are needed.

A rank needs a few slots of every step. `served_counts` returns how many sequences of each domain EDF has served before
any slot, without going through the slots before it. From there, EDF runs slot by slot. Price: the counts before each
range of slots, and about 0.5 µs per slot in the range, for any number of slots between ranges.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.apportion import BITS, UNIT
from mixtera_hpc.core.slots.served_counts import ServedCounts

__all__ = ["SegmentOrder", "Slots"]

MAX_PIECE = 512
"""Slots in one pass of EDF. A pass is pure Python, so it holds the interpreter's lock: about 0.3 ms."""
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


class SegmentOrder:
    """EDF over consecutive slots with constant weights."""

    def __init__(self, lag: Ints, weight: Ints, counts: Ints) -> None:
        """Compute nothing yet.

        Args:
            lag: at the first slot, in `UNIT`. Shape (K,), as the following.
            weight: in `UNIT`.
            counts: sequences of each domain in the segment, from `apportion.advance`.
        """
        self.counts = counts
        self._lag = lag
        self._served = ServedCounts(lag, weight, counts)
        self._rate = self._served.rate
        self.num_slots = self._served.num_slots

    def counts_before(self, slots: Ints) -> Ints:
        """Return how many sequences of each domain are served before each of `slots`; shape (len(slots), K)."""
        return self._served.before(slots)

    def slots(self, ranges: Sequence[tuple[int, int]], cursors: Ints) -> list[Slots]:
        """Return the sequences of the slots [first, stop) for each of `ranges`, which ascend and do not overlap.

        Args:
            cursors: position in each domain's stream at the first slot of the segment; shape (K,).
        """
        groups = _near_ranges(ranges)
        spans = np.array([(ranges[group.start][0], ranges[group.stop - 1][1]) for group in groups], np.int64)
        before = self.counts_before(spans[:, 0])
        orders = self._run(spans, before)

        parts = []
        for group, (begin, _), counts, domain in zip(groups, spans.tolist(), before, orders, strict=True):
            ordinal = (cursors + counts)[domain] + _running_count(domain)
            for number in group:
                own = slice(ranges[number][0] - begin, ranges[number][1] - begin)
                parts.append(Slots(domain=domain[own], ordinal=ordinal[own]))
        return parts

    def _run(self, spans: Ints, before: Ints) -> list[NDArray[np.int32]]:
        """Return the domain of every slot of each span, given the counts before it."""
        orders: list[NDArray[np.int32]] = []
        # Short spans are served together, so that numpy works on long arrays. A long one is served in pieces.
        total = (spans[:, 1] - spans[:, 0]).cumsum()
        borders = np.flatnonzero(np.diff(total // MAX_PIECE)) + 1
        for together, counts in zip(np.split(spans, borders), np.split(before, borders), strict=True):
            begin, end = together[0].tolist()
            if len(together) > 1 or end - begin <= MAX_PIECE:
                orders += self._serve(together, counts)
                continue
            pieces = []
            for first in range(begin, end, MAX_PIECE):
                piece = self._serve(np.array([[first, min(first + MAX_PIECE, end)]]), counts)[0]
                counts = counts + np.bincount(piece, minlength=counts.shape[1])
                pieces.append(piece)
            orders.append(np.concatenate(pieces))
        return orders

    def _serve(self, spans: Ints, served: Ints) -> list[NDArray[np.int32]]:
        """Return the domain of every slot of each span, given the counts before it; shape (num_spans, K)."""
        num_domains = len(self._lag)
        stops = spans[:, 1, None]
        share_ceiling: Ints = self._lag + self._rate * stops + (UNIT - 1)
        released = share_ceiling >> BITS
        released = np.minimum(np.maximum(released, 0), self.counts)
        waiting = (np.where(stops == self.num_slots, self.counts, released) - served).ravel()

        # One entry per sequence that is released before the end of its span: by span, domain and number.
        cell = np.arange(len(waiting)).repeat(waiting)
        nth = np.arange(len(cell)) - (waiting.cumsum() - waiting - served.ravel()).repeat(waiting)
        span = cell // num_domains
        domain = cell - span * num_domains
        rate = self._rate[domain]
        share = nth * UNIT - self._lag[domain]
        first = spans[span, 0]
        release = np.minimum(np.maximum(share // rate, first), spans[span, 1] - 1)
        deadline = np.minimum(np.maximum(-(-(share + UNIT) // rate), 1), self.num_slots)

        by_priority = (span * (self.num_slots + 1) + deadline).argsort(kind="stable")
        span = span[by_priority]
        release = release[by_priority]
        by_release = (span * (self.num_slots + 1) + release).argsort(kind="stable")
        releases = release[by_release].tolist()
        priorities = by_release.tolist()
        borders = np.searchsorted(span, np.arange(len(spans) + 1)).tolist()
        orders = []
        for (begin, end), (start, stop) in zip(pairwise(borders), spans.tolist(), strict=True):
            orders.append(_earliest_deadline_first(releases[begin:end], priorities[begin:end], range(start, stop)))
        domains = domain[by_priority].astype(np.int32)
        return [domains[order] for order in orders]


def _near_ranges(ranges: Sequence[tuple[int, int]]) -> list[range]:
    """Group ranges that are close to each other; return the positions of each group."""
    borders = [i for i in range(1, len(ranges)) if ranges[i][0] - ranges[i - 1][1] > NEAR]
    return [range(begin, end) for begin, end in pairwise([0, *borders, len(ranges)])]


def _earliest_deadline_first(release: list[int], priority: list[int], slots: range) -> list[int]:
    """Return the priorities in the order in which they are served; a lower number is served first.

    Args:
        release: first slot of each sequence, ascending.
        priority: rank of each sequence by deadline.
        slots: each of them has a sequence waiting.
    """
    waiting: list[int] = []
    served: list[int] = []
    num_released = 0
    total = len(release)
    for slot in slots:
        while num_released < total and release[num_released] <= slot:
            heapq.heappush(waiting, priority[num_released])
            num_released += 1
        served.append(heapq.heappop(waiting))
    return served


def _running_count(domain: NDArray[np.int32]) -> Ints:
    """Return how often the value of each entry occurs before that entry; shape of `domain`."""
    # A stable sort groups equal values. The count is the position inside the group.
    by_domain = np.argsort(domain, kind="stable")
    counts = np.bincount(domain)
    group_start = np.repeat(np.cumsum(counts) - counts, counts)
    running = np.empty(len(domain), np.int64)
    running[by_domain] = np.arange(len(domain)) - group_start
    return running
