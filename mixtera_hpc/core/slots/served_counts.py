"""Count the sequences of each domain that earliest deadline first (EDF) has served before any slot of a segment.

EDF has served every sequence that is due by slot n, and nothing that is released after it. In between, each domain has
at most one open sequence. EDF has served the open sequences with the earliest deadlines, subject to one condition: for
every L, the sequences served of those released in the last L slots are at most L (docs/planner.md has the proofs).

Price for the slots of 8 steps together: 0.05 ms with 7 domains, or 0.1 ms where the first choice breaks the condition,
0.2 to 0.7 ms with 1,000 equal ones, and up to 2 ms with 1,000 of different sizes, where it often does.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.apportion import BITS, UNIT, earliest_due

__all__ = ["ServedCounts"]

FIRST_LOOKBACK = 256
LOOKBACK_FACTOR = 8
"""The condition is checked exactly for the last 256 slots, then for 8 times as many, until longer ranges surely fit."""
SPARE_CANDIDATES = 8
"""Sequences that are considered besides those with the earliest deadlines, because some of these do not fit."""
NOT_OPEN = 1 << 62
"""Sort key of domains without an open sequence."""
_EVERY = slice(None)

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


class _OpenSequences(NamedTuple):
    """The open sequences before some slots; shape (n, K) each, or (n,) where a field says so."""

    slot: Ints
    """The slots; shape (n,)."""
    num_choices: Ints
    """Open sequences that were served; shape (n,)."""
    due: Ints
    """Sequences of each domain that are due by then."""
    remainder: Ints
    """Share that is outstanding after all due sequences, in `UNIT`."""
    is_closed: Mask
    """True for domains without an open sequence; their other values mean nothing."""
    deadline: Ints
    """Sort key: the deadline, then the domain; at least `NOT_OPEN` for domains without an open sequence."""
    by_age: NDArray[np.intp]
    """Domains by the age of their open sequences, youngest first; those without one at the end."""
    age: Ints
    """Number of last slots in which the sequence is released, at most all slots before; in the order of `by_age`."""
    others_weight: Ints
    """Weight of the open domains behind each place of `by_age`, in `UNIT`."""

    def select(self, rows: NDArray[np.intp]) -> "_OpenSequences":
        """Return the open sequences before some of the slots."""
        return _OpenSequences._make(values[rows] for values in self)

    def in_order(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return values of shape (n, K) in the order of `by_age`."""
        # A flat index is several times faster than one per axis.
        return values.ravel().take(self.by_age + np.arange(0, values.size, values.shape[1])[:, None])

    def earliest(self, more: int = 0) -> Mask:
        """Return which sequences have the earliest deadlines: as many as are served, and `more`; shape (n, K)."""
        ascending = self.deadline.copy()
        ascending.sort(axis=1)
        num_domains = ascending.shape[1]
        count = np.minimum(np.maximum(self.num_choices + more, 0), num_domains)
        # The key at place `count` of each row, counted from 1.
        bound = ascending.ravel().take(count + np.arange(-1, ascending.size - 1, num_domains))
        # Domains without an open sequence have keys from `NOT_OPEN` on.
        np.minimum(bound, NOT_OPEN - 1, out=bound)
        np.putmask(bound, count == 0, 0)
        is_earliest: Mask = self.deadline <= bound[:, None]
        return is_earliest


class ServedCounts:
    """The counts of segments with the same weights: consecutive slots each, in which the weights are constant."""

    def __init__(self, lag: Ints, weight: Ints, counts: Ints) -> None:
        """Compute nothing yet.

        Args:
            lag: of each domain at the first slot of each segment, in `UNIT`; shape (S, K).
            weight: in `UNIT`; shape (K,).
            counts: sequences of each domain in each segment; shape (S, K).
        """
        self.lag = lag
        self.weight = weight
        self.rate: Ints = np.maximum(weight, 1)
        """The weight, at least 1: a domain of weight 0 may still have a sequence due because of its lag."""
        self.counts = counts
        self.num_slots: Ints = counts.sum(axis=1)
        """Slots of each segment; shape (S,)."""
        self._negative_rate = -self.rate
        # Domains are part of the sort keys: numpy vectorises plain sorts, but not those of positions.
        self._domain_bits = len(weight).bit_length()
        self._domains = np.arange(len(weight))

    def before(self, slots: Ints, segment: Ints | None = None) -> Ints:
        """Return how many sequences of each domain are served before some slots; shape (len(slots), K).

        Args:
            slots: counted from the first one of their segments.
            segment: number of the segment of each slot; None if there is one segment.
        """
        if not slots.any():
            return np.zeros((len(slots), len(self.weight)), np.int64)
        chosen = _EVERY if segment is None else segment
        lag = self.lag[chosen]
        limit = self.counts[chosen]
        remainder = self.rate * slots[:, None]
        remainder += lag
        due = remainder >> BITS
        np.maximum(due, 0, out=due)
        np.minimum(due, limit, out=due)
        remainder -= due << BITS
        is_closed = remainder <= 0
        is_closed |= due >= limit
        ends = self.num_slots[chosen, None]
        sequences = self._open_sequences(slots, due, remainder, is_closed, ends)
        counts: Ints = due + self._chosen(sequences)
        if sequences.num_choices.min() < 0:
            # After a change of weights more can be due than there were slots. Only due sequences were served then.
            for row in np.flatnonzero(sequences.num_choices < 0).tolist():
                own = 0 if segment is None else int(segment[row])
                counts[row] = earliest_due(self.lag[own], self.rate, self.counts[own], int(slots[row]))
        return counts

    def _open_sequences(self, slots: Ints, due: Ints, remainder: Ints, is_closed: Mask, ends: Ints) -> _OpenSequences:
        """Sort the open sequences before each slot.

        Args:
            slots: shape (n,).
            due: see `_OpenSequences`; shape (n, K), as the following.
            remainder: see `_OpenSequences`.
            is_closed: see `_OpenSequences`.
            ends: slots of the segment of each slot; shape (n, 1) or (1, 1).
        """
        bits = self._domain_bits
        slot = slots[:, None]

        # a // -b is -a / b rounded down.
        deadline = (UNIT - remainder) // self._negative_rate
        np.subtract(slot, deadline, out=deadline)
        np.minimum(deadline, ends, out=deadline)
        np.putmask(deadline, is_closed, NOT_OPEN >> bits)
        deadline <<= bits
        deadline += self._domains

        age = remainder // self._negative_rate
        np.negative(age, out=age)
        np.minimum(age, slot, out=age)
        np.putmask(age, is_closed, NOT_OPEN >> bits)
        # Of the sequences that are released in the last slot, one at most was served: that with the first deadline.
        is_newest = age == 1
        first_deadline = np.where(is_newest, deadline, NOT_OPEN).min(axis=1, keepdims=True)
        np.putmask(deadline, is_newest & (deadline > first_deadline), NOT_OPEN)
        age <<= bits
        age += self._domains
        age.sort(axis=1)
        by_age = age & ((1 << bits) - 1)
        age >>= bits
        others_weight = self.weight.take(by_age).cumsum(axis=1)
        open_weight = np.where(is_closed, 0, self.weight).sum(axis=1, keepdims=True)
        np.subtract(open_weight, others_weight, out=others_weight)
        num_choices = slots - due.sum(axis=1)
        return _OpenSequences(slots, num_choices, due, remainder, is_closed, deadline, by_age, age, others_weight)

    def _chosen(self, sequences: _OpenSequences) -> Mask:
        """Return which open sequences EDF has served before each slot; shape (n, K)."""
        # First guess: the earliest deadlines.
        chosen = sequences.earliest()
        has_room = self._has_room(sequences, chosen, 0)
        if has_room.all():
            return chosen
        # Where all open sequences were served, or none, there is no choice.
        num_open = sequences.is_closed.shape[1] - sequences.is_closed.sum(axis=1)
        has_choice = (sequences.num_choices > 0) & (sequences.num_choices < num_open)
        unsure = np.flatnonzero(has_choice & ~has_room)
        lookback = FIRST_LOOKBACK
        while len(unsure):
            own = self._without_excess(sequences.select(unsure), lookback)
            chosen[unsure] = own.earliest()
            is_sure = self._has_room(own, chosen[unsure], lookback)
            for row in np.flatnonzero(~is_sure).tolist():
                is_sure[row] = self._has_room_beyond(own, row, chosen[unsure[row]], lookback)
            unsure = unsure[~is_sure]
            lookback *= LOOKBACK_FACTOR
        return chosen

    def _has_room(self, sequences: _OpenSequences, chosen: Mask, lookback: int) -> Mask:
        """Return True for slots before which the last L slots certainly have room for the choice, for L > lookback."""
        # At least Σ f + L · W slots are free of due sequences (docs/planner.md). More are rarely needed.
        lag_after = chosen * -UNIT
        lag_after += sequences.remainder
        slot = sequences.slot[:, None]
        last_slots = sequences.age
        if lookback:
            last_slots = np.minimum(np.maximum(last_slots, lookback + 1), slot)
        room = last_slots * sequences.others_weight
        room += sequences.in_order(lag_after).cumsum(axis=1)
        is_free = (room > -UNIT) | (last_slots >= slot)
        return np.asarray(is_free.all(axis=1))

    def _has_room_beyond(self, sequences: _OpenSequences, row: int, chosen: Mask, lookback: int) -> bool:
        """Return True if the last L slots before one slot certainly have room for its choice, for L > lookback."""
        slot = int(sequences.slot[row])
        own = sequences.select(np.array([row]))
        while lookback < slot - 1:
            further = min(lookback * LOOKBACK_FACTOR, slot - 1)
            if not self._has_room_within(own, range(lookback + 1, further + 1), chosen):
                return False
            lookback = further
            if self._has_room(own, chosen[None], lookback)[0]:
                return True
        return True

    def _has_room_within(self, sequences: _OpenSequences, last_slots: range, chosen: Mask) -> bool:
        """Return True if the last L slots before one slot certainly have room for the choice, for L in `last_slots`.

        The due sequences of rare domains are counted exactly, those of frequent domains are bounded by w · L - f: a
        bound is off by less than 1 per domain, and the frequent domains are few.
        """
        due = sequences.due[0]
        num_open = len(due) - int(np.count_nonzero(sequences.is_closed))
        domain = sequences.by_age[0, :num_open]
        is_frequent = (self.rate > 2 * UNIT // last_slots.start) & (due > 0)
        # Due sequences of rare domains, by age.
        _, age = self._due_ages(sequences, np.where(is_frequent, 0, due)[None], last_slots.stop - 1)

        # Events: what comes into the last L slots when L grows. `load` counts against the room, in `UNIT`.
        of_frequent = is_frequent[domain]
        always = int(self.weight[is_frequent & sequences.is_closed[0]].sum())
        event_age = np.concatenate([age, sequences.age[0, :num_open]])
        by_age = event_age.argsort(kind="stable")
        own_load = chosen[domain] * UNIT - np.where(of_frequent, sequences.remainder[0, domain], 0)
        load = np.concatenate([np.full(len(age), UNIT), own_load])
        weight = np.concatenate([np.zeros(len(age), np.int64), self.weight[domain] * of_frequent])

        event_age = event_age[by_age]
        slots = np.minimum(np.maximum(event_age, last_slots.start), last_slots.stop - 1)
        room = slots * (UNIT - always - weight[by_age].cumsum()) - load[by_age].cumsum()
        # Events of equal age, and all events before the first L, count together.
        is_last = np.append(event_age[1:] > np.maximum(event_age[:-1], last_slots.start), True)
        return bool(((room > -UNIT) | ~is_last | (event_age >= last_slots.stop)).all())

    def _without_excess(self, sequences: _OpenSequences, lookback: int) -> _OpenSequences:
        """Leave out sequences that EDF cannot have served, because of what is released in the last `lookback` slots.

        At most L minus the due sequences released in the last L slots fit, for every L. These sets are nested, so a
        sweep over ascending L finds the best choice: whenever there are too many, it drops the latest deadline. The
        sequences that may be chosen suffice for it: what is dropped stays out, whatever is due later.
        """
        sequences = sequences._replace(deadline=sequences.deadline.copy())
        room = self._free_slots(sequences, lookback)
        is_short = True
        while is_short:
            is_candidate = sequences.in_order(sequences.earliest(SPARE_CANDIDATES))
            excess = np.maximum.accumulate(is_candidate.cumsum(axis=1) - room, axis=1)
            num_dropped = np.maximum(excess[:, -1], 0)
            for row in np.flatnonzero(num_dropped).tolist():
                domain = sequences.by_age[row]
                key = np.where(is_candidate[row], sequences.deadline[row].take(domain), 0)
                # After e - 1 drops, the first place with e too many is the next one with too many.
                for end in excess[row].searchsorted(np.arange(1, num_dropped[row] + 1)).tolist():
                    latest = int(key[: end + 1].argmax())
                    sequences.deadline[row, domain[latest]] = NOT_OPEN
                    key[latest] = 0
            is_short = bool((num_dropped > SPARE_CANDIDATES).any())
        return sequences

    def _free_slots(self, sequences: _OpenSequences, lookback: int) -> Ints:
        """Return how many open sequences fit that are at most as old as each one, in the order of `by_age`.

        What fits into the last L slots also has to fit into all longer ranges. Only the last `lookback` slots count.
        """
        row, age = self._due_ages(sequences, sequences.due, lookback)
        # Free slots among the last L, for L = 0 … lookback. Nothing limits longer ranges, nor those before slot 1.
        width = lookback + 2
        of_age = np.bincount(row * width + np.minimum(age, lookback + 1), minlength=len(sequences.slot) * width)
        last_slots = np.arange(width)
        free = last_slots - of_age.reshape(-1, width).cumsum(axis=1)
        np.putmask(free, last_slots >= np.minimum(sequences.slot, lookback + 1)[:, None], NOT_OPEN)
        # The last ranges first, so that a running minimum covers all longer ranges.
        fits = np.minimum.accumulate(free[:, ::-1], axis=1)
        place = (lookback + 1) - np.minimum(sequences.age, lookback + 1)
        place += np.arange(0, fits.size, width)[:, None]
        of_sequence: Ints = fits.ravel().take(place)
        return of_sequence

    def _due_ages(self, sequences: _OpenSequences, due: Ints, lookback: int) -> tuple[Ints, Ints]:
        """Return row and age of all due sequences that are released in the last `lookback` slots before some slots.

        Args:
            sequences: the open sequences before the slots.
            due: due sequences of the domains that count, 0 for others; shape (n, K).
        """
        # With a remainder f, ⌊w L - f⌋ due sequences are released in the last L slots.
        num_late = (self.rate * lookback - sequences.remainder) >> BITS
        num_late = np.minimum(np.maximum(num_late, 0), due).ravel()
        cell = np.arange(len(num_late)).repeat(num_late)
        # The latest sequence of each domain has number 1.
        number = np.arange(1, len(cell) + 1) - (num_late.cumsum() - num_late).take(cell)
        row, domain = np.divmod(cell, len(self.weight))
        age: Ints = -((number * UNIT + sequences.remainder.ravel().take(cell)) // self._negative_rate.take(domain))
        return row, age
