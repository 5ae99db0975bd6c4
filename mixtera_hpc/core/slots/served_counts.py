"""Count the sequences of each domain that earliest deadline first (EDF) has served before any slot of a segment.

EDF has served every sequence that is due by slot n, and nothing that is released after it. In between, each domain has
at most one open sequence. EDF has served the open sequences with the earliest deadlines, subject to one condition: for
every L, the sequences served of those released in the last L slots are at most L (docs/planner.md has the proofs).

Price for the slots of 8 steps together: 0.2 ms with 7 domains, 0.7 ms with 1,000 equal ones, and up to 2 ms with 1,000
of different sizes, where the earliest deadlines often break the condition.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.apportion import BITS, UNIT, earliest_due

__all__ = ["ServedCounts"]

FIRST_LOOKBACK = 256
LOOKBACK_FACTOR = 8
"""The condition is checked exactly for the last 256 slots, then for 8 times as many, until longer ranges surely fit."""
SPARE_CANDIDATES = 8
"""Sequences that are compared beside those that would be chosen, because some of these do not fit."""
NOT_OPEN = 1 << 62
"""Sort key of domains without an open sequence."""

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


class _OpenSequences(NamedTuple):
    """The open sequences before some slots."""

    slot: Ints
    """The slots; shape (n,)."""
    num_choices: Ints
    """Open sequences that were served; shape (n,)."""
    due: Ints
    """Sequences of each domain that are due by then; shape (n, K)."""
    deadline: Ints
    """Sort key: the deadline, then the domain; `NOT_OPEN` for domains without an open sequence."""
    by_age: NDArray[np.intp]
    """Domains by the age of their open sequences, youngest first; those without one at the end. Shape (n, m)."""
    age: Ints
    """Number of last slots in which the sequence is released, in the order of `by_age`."""
    remainder: Ints
    """Share that is outstanding after all due sequences, in `UNIT`; in the order of `by_age`, 0 without a sequence."""
    others_weight: Ints
    """Weight of the open domains behind each place of `by_age`, in `UNIT`."""

    def select(self, rows: NDArray[np.intp]) -> "_OpenSequences":
        """Return the open sequences before some of the slots."""
        return _OpenSequences(*(values[rows] for values in self))

    def in_order(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return values of shape (n, K) in the order of `by_age`."""
        # A flat index is several times faster than one per axis.
        return values.ravel().take(self.by_age + np.arange(0, values.size, values.shape[1])[:, None])

    def earliest(self, more: int = 0) -> Mask:
        """Return which sequences have the earliest deadlines, `more` than are served; shape (n, K)."""
        ascending = np.sort(self.deadline, axis=1)
        last = np.minimum(self.num_choices + more, ascending.shape[1]) - 1
        # All others have the same key, and are none of them.
        bound = np.minimum(ascending[np.arange(len(self.slot)), last], NOT_OPEN - 1)
        is_earliest: Mask = self.deadline <= bound[:, None]
        return is_earliest


@dataclass(frozen=True, slots=True)
class ServedCounts:
    """The counts of one segment: consecutive slots with constant weights. All arrays have the shape (K,)."""

    lag: Ints
    """Lag of each domain at the first slot, in `UNIT`."""
    weight: Ints
    """Weight of each domain, in `UNIT`."""
    rate: Ints
    """The weight, at least 1: a domain of weight 0 may still have a sequence due because of its lag."""
    counts: Ints
    """Sequences of each domain in the segment."""
    num_slots: int

    def before(self, slots: Ints) -> Ints:
        """Return how many sequences of each domain are served before each of `slots`; shape (len(slots), K)."""
        share: Ints = self.lag + self.rate * slots[:, None]
        due: Ints = np.minimum(np.maximum(share >> BITS, 0), self.counts)
        remainder = share - (due << BITS)
        is_open = (remainder > 0) & (due < self.counts)
        num_choices = slots - due.sum(axis=1)
        num_open = is_open.sum(axis=1)
        counts: Ints = due + (is_open & (num_choices == num_open)[:, None])
        for row in np.flatnonzero(num_choices < 0).tolist():
            # After a change of weights more can be due than there were slots. Only due sequences were served then.
            counts[row] = earliest_due(self.lag, self.rate, self.counts, int(slots[row]))
        rows = np.flatnonzero((num_choices > 0) & (num_choices < num_open))
        if len(rows):
            sequences = self._open_sequences(slots[rows], num_choices[rows], due[rows], remainder[rows], is_open[rows])
            counts[rows] += self._chosen(sequences)
        return counts

    def _open_sequences(
        self, slot: Ints, num_choices: Ints, due: Ints, remainder: Ints, is_open: Mask
    ) -> _OpenSequences:
        """Sort the open sequences before each slot."""
        # Domains are part of the sort keys: numpy vectorises plain sorts, but not those of positions.
        bits = len(self.lag).bit_length()
        domain = np.arange(len(self.lag))
        # -(a // -b) is a / b rounded up.
        deadline = np.minimum(slot[:, None] - (UNIT - remainder) // -self.rate, self.num_slots)
        age = np.minimum(-(remainder // -self.rate), self.num_slots)
        age = np.sort(np.where(is_open, (age << bits) + domain, NOT_OPEN + domain), axis=1)
        age = age[:, : int(is_open.sum(axis=1).max())]
        sequences = _OpenSequences(
            slot=slot,
            num_choices=num_choices,
            due=due,
            deadline=np.where(is_open, (deadline << bits) + domain, NOT_OPEN),
            by_age=age & ((1 << bits) - 1),
            age=age >> bits,
            remainder=age,
            others_weight=age,
        )
        weight = sequences.in_order(np.where(is_open, self.weight, 0))
        return sequences._replace(
            remainder=sequences.in_order(np.where(is_open, remainder, 0)),
            others_weight=weight.sum(axis=1, keepdims=True) - weight.cumsum(axis=1),
        )

    def _chosen(self, sequences: _OpenSequences) -> Mask:
        """Return which open sequences EDF has served before each slot; shape (n, K)."""
        # First guess: the earliest deadlines.
        chosen = sequences.earliest()
        unsure = np.flatnonzero(~self._has_room(sequences, chosen, 0))
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
        lag_after = sequences.remainder - sequences.in_order(chosen) * UNIT
        slot = sequences.slot[:, None]
        last_slots = np.minimum(np.maximum(sequences.age, lookback + 1), slot)
        room = lag_after.cumsum(axis=1) + last_slots * sequences.others_weight
        has_room: Mask = ((room > -UNIT) | (last_slots == slot)).all(axis=1)
        return has_room

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
        num_open = int(np.count_nonzero(sequences.remainder[0]))
        domain = sequences.by_age[0, :num_open]
        is_frequent = (self.rate > 2 * UNIT // last_slots.start) & (due > 0)
        # Due sequences of rare domains, by age.
        _, age = self._due_ages(sequences.slot, np.where(is_frequent, 0, due)[None], last_slots.stop - 1)

        # Events: what comes into the last L slots when L grows. `load` counts against the room, in `UNIT`.
        of_frequent = is_frequent[domain]
        is_open = np.zeros(len(due), np.bool_)
        is_open[domain] = True
        always = int(self.weight[is_frequent & ~is_open].sum())
        event_age = np.concatenate([age, sequences.age[0, :num_open]])
        by_age = event_age.argsort(kind="stable")
        own_load = chosen[domain] * UNIT - np.where(of_frequent, sequences.remainder[0, :num_open], 0)
        load = np.concatenate([np.full(len(age), UNIT), own_load])
        weight = np.concatenate([np.zeros(len(age), np.int64), self.weight[domain] * of_frequent])

        event_age = event_age[by_age]
        slots = np.clip(event_age, last_slots.start, last_slots.stop - 1)
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
                key = np.where(is_candidate[row], sequences.deadline[row, domain], 0)
                # After e - 1 drops, the first place with e too many is the next one with too many.
                for end in np.searchsorted(excess[row], np.arange(1, num_dropped[row] + 1)).tolist():
                    latest = int(key[: end + 1].argmax())
                    sequences.deadline[row, domain[latest]] = NOT_OPEN
                    key[latest] = 0
            is_short = bool((num_dropped > SPARE_CANDIDATES).any())
        return sequences

    def _free_slots(self, sequences: _OpenSequences, lookback: int) -> Ints:
        """Return how many open sequences fit that are at most as old as each one, in the order of `by_age`.

        What fits into the last L slots also has to fit into all longer ranges. Only the last `lookback` slots count.
        """
        slot = sequences.slot[:, None]
        row, age = self._due_ages(sequences.slot, sequences.due, lookback)
        # Free slots among the last L, for L = 0 … lookback. Nothing limits longer ranges, nor those before slot 1.
        width = lookback + 2
        of_age = np.bincount(row * width + np.minimum(age, lookback + 1), minlength=len(slot) * width)
        free = np.arange(width) - of_age.reshape(-1, width).cumsum(axis=1)
        free[(np.arange(width) >= slot) | (np.arange(width) > lookback)] = NOT_OPEN
        fits = np.minimum.accumulate(free[:, ::-1], axis=1)[:, ::-1]
        of_sequence: Ints = np.take_along_axis(fits, np.minimum(sequences.age, lookback + 1), 1)
        return of_sequence

    def _due_ages(self, slots: Ints, due: Ints, lookback: int) -> tuple[Ints, Ints]:
        """Return row and age of all due sequences that are released in the last `lookback` slots before some slots.

        Args:
            slots: a slot for each row; shape (n,).
            due: sequences of each domain; shape (n, K).
        """
        released = (self.lag + self.rate * (slots[:, None] - lookback) + (UNIT - 1)) >> BITS
        num_late = (due - np.minimum(np.maximum(released, 0), due)).ravel()
        cell = np.arange(len(num_late)).repeat(num_late)
        nth = np.arange(len(cell)) - (num_late.cumsum() - due.ravel()).repeat(num_late)
        row, domain = np.divmod(cell, len(self.lag))
        return row, slots[row] - (nth * UNIT - self.lag[domain]) // self.rate[domain]
