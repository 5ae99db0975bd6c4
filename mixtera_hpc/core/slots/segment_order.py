"""The order of the slots of a chunk: earliest deadline first (EDF), computed only for the slots that are needed.

A rank needs a few slots of every step. `SegmentOrder.counts_before` returns how many sequences of each domain EDF has
served before any slot, without going through the slots before it. From there, EDF runs slot by slot. Price: O(K) numpy
operations per range of slots, and about 0.5 µs per slot in the range, for any number of slots between ranges.

Why the counts can be computed (docs/planner.md has the proofs): EDF has served every sequence that is due by slot n,
and nothing that is released after it. In between, each domain has at most one open sequence. EDF has served the open
sequences with the earliest deadlines, subject to one condition: for every L, the sequences served of those released in
the last L slots are at most L.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.apportion import BITS, UNIT, earliest_due

__all__ = ["SegmentOrder", "Slots", "order_slots"]

MAX_PIECE = 512
"""Slots in one pass of EDF. A pass is pure Python, so it holds the interpreter's lock: about 0.3 ms."""
NEAR = 128
"""Slots between two ranges that EDF passes through faster than `counts_before` jumps over them."""
FIRST_LOOKBACK = 32
LOOKBACK_FACTOR = 8
"""`_choose_open` examines the releases of the last 32 slots, then of 8 times as many, until the choice is certain."""
NOT_OPEN = 1 << 62
"""Sort key of domains without an open sequence."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """Sequences of a chunk, in the order in which they are served; shape (n,) each."""

    domain: NDArray[np.int32]
    ordinal: Ints
    """Position in the domain's stream, counted in sequences from the start of the run."""


class _OpenSequences(NamedTuple):
    """The open sequences before one slot, ordered by domain; shape (num_open,) each."""

    domain: Ints
    remainder: Ints
    """Share that is outstanding after all due sequences, in `UNIT`."""
    age: Ints
    """Number of last slots in which the sequence is released."""
    by_age: Ints
    """Positions, youngest first."""
    rank: Ints
    """Position by deadline."""


class SegmentOrder:
    """EDF over consecutive slots with constant weights."""

    def __init__(self, lag: Ints, weight: Ints, counts: Ints) -> None:
        """Compute nothing yet.

        Args:
            lag: at the first slot, in `UNIT`. Shape (K,), as the following.
            weight: in `UNIT`.
            counts: sequences of each domain in the segment, from `apportion.advance`.
        """
        self._lag = lag
        self._weight = weight
        # A domain of weight 0 may still have a sequence due because of its lag.
        self._rate: Ints = np.maximum(weight, 1)
        self.counts = counts
        self.num_slots = int(counts.sum())

    def counts_before(self, slots: Ints) -> Ints:
        """Return how many sequences of each domain are served before each of `slots`; shape (len(slots), K)."""
        distinct, number = np.unique(slots, return_inverse=True)
        # EDF passes through a few slots faster than the counts of many domains are computed.
        first = np.flatnonzero(np.diff(distinct, prepend=-UNIT) > max(NEAR, len(self._lag)))
        last = np.append(first[1:], len(distinct)) - 1
        spans = np.stack([distinct[first], distinct[last]], axis=1)
        jumped = self._jump(spans[:, 0])
        if len(first) == len(distinct):
            return jumped[number]
        counts = np.empty((len(distinct), len(self._lag)), np.int64)
        for begin, end, before, order in zip(first, last + 1, jumped, self._run(spans, jumped), strict=True):
            counts[begin] = before
            for i in range(begin + 1, end):
                passed = order[distinct[i - 1] - distinct[begin] : distinct[i] - distinct[begin]]
                counts[i] = counts[i - 1] + np.bincount(passed, minlength=len(self._lag))
        return counts[number]

    def _jump(self, slots: Ints) -> Ints:
        """Return the same as `counts_before`, without the slots in between."""
        share: Ints = self._lag + self._rate * slots[:, None]
        due: Ints = np.minimum(np.maximum(share >> BITS, 0), self.counts)
        remainder = share - (due << BITS)
        is_open = (remainder > 0) & (due < self.counts)
        num_choices = slots - due.sum(axis=1)

        # First guess: the earliest deadlines. Equal deadlines are served by domain.
        key = np.where(is_open, self._deadline(due), NOT_OPEN)
        by_deadline = key.argsort(axis=1, kind="stable")
        rank = np.empty_like(by_deadline)
        np.put_along_axis(rank, by_deadline, np.arange(len(self._lag))[None, :], axis=1)
        chosen = is_open & (rank < num_choices[:, None])
        counts: Ints = due + chosen

        certain = (num_choices == 0) | (num_choices == is_open.sum(axis=1))
        certain |= self._is_certain(slots, remainder, is_open, chosen)
        for row in np.flatnonzero(~certain | (num_choices < 0)).tolist():
            slot = int(slots[row])
            if num_choices[row] < 0:
                # After a change of weights more can be due than there were slots. Only due sequences were served then.
                counts[row] = earliest_due(self._lag, self._rate, self.counts, slot)
                continue
            domain = np.flatnonzero(is_open[row])
            age = -(-remainder[row, domain] // self._rate[domain])
            by_age = age.argsort(kind="stable")
            ranks = rank[row, domain]
            sequences = _OpenSequences(domain, remainder[row, domain], age, by_age, ranks)
            counts[row] = due[row]
            counts[row, domain[self._choose_open(slot, due[row], sequences, int(num_choices[row]))]] += 1
        return counts

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
        for some, counts in zip(np.split(spans, borders), np.split(before, borders), strict=True):
            if len(some) > 1 or some[0, 1] - some[0, 0] <= MAX_PIECE:
                orders += self._serve(some, counts)
                continue
            pieces = []
            for begin in range(int(some[0, 0]), int(some[0, 1]), MAX_PIECE):
                piece = self._serve(np.array([[begin, min(begin + MAX_PIECE, int(some[0, 1]))]]), counts)[0]
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

    def _deadline(self, nth: Ints) -> Ints:
        """Return the last slot (counted from 1) of the sequence `nth` of every domain, at most the segment's last."""
        deadline: Ints = np.minimum(-(-((nth + 1) * UNIT - self._lag) // self._rate), self.num_slots)
        return deadline

    def _is_certain(
        self, slots: Ints, remainder: Ints, is_open: NDArray[np.bool_], chosen: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Return True for slots before which the last L slots certainly have room for the choice, for every L."""
        age = np.where(is_open, -(-remainder // self._rate), NOT_OPEN)
        by_age = age.argsort(axis=1, kind="stable")
        last_slots = np.take_along_axis(age, by_age, 1)
        open_weight = np.take_along_axis(np.where(is_open, self._weight, 0), by_age, 1)
        lag_after = np.take_along_axis(np.where(is_open, remainder - (chosen * UNIT), 0), by_age, 1)

        # At least Σ f + L · W slots are free of due sequences (docs/planner.md). More are rarely needed.
        others_weight = open_weight.sum(axis=1, keepdims=True) - open_weight.cumsum(axis=1)
        room = lag_after.cumsum(axis=1) + np.minimum(last_slots, self.num_slots) * others_weight
        certain: NDArray[np.bool_] = ((room > -UNIT) | (last_slots >= slots[:, None])).all(axis=1)
        return certain

    def _choose_open(self, slot: int, due: Ints, sequences: _OpenSequences, num_choices: int) -> NDArray[np.intp]:
        """Return the positions in `sequences` of those that EDF has served before `slot`.

        Args:
            due: sequences of each domain that are due by then; shape (K,).
        """
        lookback = min(FIRST_LOOKBACK, slot - 1)
        while True:
            ranks = self._best_ranks(lookback, self._free_slots(slot, due, lookback), sequences)
            is_chosen_rank = np.zeros(len(sequences.rank), np.bool_)
            is_chosen_rank[ranks[:num_choices]] = True
            chosen = is_chosen_rank[sequences.rank]
            if self._is_certain_beyond(lookback, slot, due, sequences, chosen):
                return np.flatnonzero(chosen)
            lookback = min(lookback * LOOKBACK_FACTOR, slot - 1)

    def _is_certain_beyond(
        self, lookback: int, slot: int, due: Ints, sequences: _OpenSequences, chosen: NDArray[np.bool_]
    ) -> bool:
        """Return True if the last L slots certainly have room for the choice, for every L > lookback."""
        while lookback < slot - 1:
            if self._has_room(slot, lookback, sequences, chosen):
                return True
            further = min(lookback * LOOKBACK_FACTOR, slot - 1)
            if not self._has_room_within(slot, range(lookback + 1, further + 1), due, sequences, chosen):
                return False
            lookback = further
        return True

    def _has_room_within(
        self, slot: int, last_slots: range, due: Ints, sequences: _OpenSequences, chosen: NDArray[np.bool_]
    ) -> bool:
        """Return True if the last L slots certainly have room for the choice, for every L in `last_slots`.

        The due sequences of rare domains are counted exactly, those of frequent domains are bounded by w · L - f: a
        bound is off by less than 1 per domain, and the frequent domains are few.
        """
        is_frequent = (self._rate > 2 * UNIT // last_slots.start) & (due > 0)
        # Due sequences of rare domains, by age.
        age = self._due_ages(slot, np.where(is_frequent, 0, due), last_slots.stop - 1)

        # Events: what comes into the last L slots when L grows. `load` counts against the room, in `UNIT`.
        of_frequent = is_frequent[sequences.domain]
        is_open = np.zeros(len(due), np.bool_)
        is_open[sequences.domain] = True
        always = int(self._weight[is_frequent & ~is_open].sum())
        event_age = np.concatenate([age, sequences.age])
        by_age = event_age.argsort(kind="stable")
        load = np.concatenate([np.full(len(age), UNIT), chosen * UNIT - np.where(of_frequent, sequences.remainder, 0)])
        weight = np.concatenate([np.zeros(len(age), np.int64), self._weight[sequences.domain] * of_frequent])

        event_age = event_age[by_age]
        slots = np.clip(event_age, last_slots.start, last_slots.stop - 1)
        room = slots * (UNIT - always - weight[by_age].cumsum()) - load[by_age].cumsum()
        # Events of equal age, and all events before the first L, count together.
        is_last = np.append(event_age[1:] > np.maximum(event_age[:-1], last_slots.start), True)
        return bool(((room > -UNIT) | ~is_last | (event_age >= last_slots.stop)).all())

    def _free_slots(self, slot: int, due: Ints, lookback: int) -> Ints:
        """Return L minus the due sequences released in the last L slots, for L = 0 … lookback."""
        age = self._due_ages(slot, due, lookback)
        free: Ints = np.arange(lookback + 1) - np.bincount(age, minlength=lookback + 1).cumsum()
        return free

    def _due_ages(self, slot: int, due: Ints, lookback: int) -> Ints:
        """Return the age of each due sequence that is released in the last `lookback` slots."""
        released = (self._lag + self._rate * (slot - lookback) + (UNIT - 1)) >> BITS
        num_late = due - np.minimum(np.maximum(released, 0), due)
        domain = np.arange(len(due)).repeat(num_late)
        nth = np.arange(len(domain)) - (num_late.cumsum() - due).repeat(num_late)
        age: Ints = slot - (nth * UNIT - self._lag[domain]) // self._rate[domain]
        return age

    @staticmethod
    def _best_ranks(lookback: int, free: Ints, sequences: _OpenSequences) -> Ints:
        """Return the ranks of the sequences that fit, ascending.

        At most min(free[L]) of the sequences released in the last L slots fit. These sets are nested, so a sweep over
        ascending L finds the best choice: whenever there are too many, drop the latest deadlines.
        """
        age = sequences.age[sequences.by_age]
        rank = sequences.rank[sequences.by_age]
        num_recent = int(np.searchsorted(age, lookback, side="right"))
        if not num_recent:
            return np.sort(rank)
        # Sequences of equal age form a group. Its bound holds until the next group begins.
        begins = np.concatenate([[0], np.flatnonzero(np.diff(age[:num_recent])) + 1])
        bounds = np.minimum.reduceat(free, age[begins])
        negated_ranks = (-rank[:num_recent]).tolist()
        heap: list[int] = []
        for (begin, end), bound in zip(pairwise([*begins.tolist(), num_recent]), bounds.tolist(), strict=True):
            for negated_rank in negated_ranks[begin:end]:
                heapq.heappush(heap, negated_rank)
            while len(heap) > bound:
                heapq.heappop(heap)
        return np.sort(np.concatenate([-np.array(heap, np.int64), rank[num_recent:]]))

    def _has_room(self, slot: int, lookback: int, sequences: _OpenSequences, chosen: NDArray[np.bool_]) -> bool:
        """Return True if the last L slots certainly have room for the choice, for every L > lookback."""
        by_age = sequences.by_age
        weight = self._weight[sequences.domain[by_age]]
        lag_after = (sequences.remainder - (chosen * UNIT))[by_age].cumsum()
        others_weight = weight.sum() - weight.cumsum()
        last_slots = np.maximum(sequences.age[by_age], lookback + 1)
        room = lag_after + np.minimum(last_slots, slot) * others_weight
        return bool(((room > -UNIT) | (last_slots >= slot)).all())


def order_slots(lag: Ints, weight: Ints, counts: Ints) -> NDArray[np.int32]:
    """Return the domain of every slot if domain k gets `counts[k]` of the slots; shape (counts.sum(),)."""
    segment = SegmentOrder(lag, weight, counts)
    return segment.slots([(0, segment.num_slots)], np.zeros_like(counts))[0].domain


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
