"""Exact apportionment: decide which domain gets each slot, so that every prefix stays within one sequence of its share.

Terms (docs/planner.md has the proofs):

- A slot is one sequence of the global order.
- A domain's share is the sum of its weights over the slots so far. Its lag is the share minus the sequences served.
- The m-th sequence of a domain with weight w and lag l keeps the lag below 1 in absolute value exactly if it is served
  between its release, slot ⌊(m-1-l)/w⌋ + 1, and its deadline, slot ⌈(m-l)/w⌉. These are the windows of proportionate
  fairness (Baruah, Cohen, Plaxton, Varvel 1996) for one processor.
- Earliest deadline first (EDF): serve the earliest deadline among the released sequences. EDF meets all windows
  whenever any order does, and with constant weights one does.

A chunk is planned in two steps:

1. `advance` computes only how many sequences each domain gets in n slots. It takes O(K log K) time for K domains,
   whatever n is. Every sequence with a deadline inside the chunk is due and is counted. The remaining slots go to open
   sequences: those that are released inside the chunk and due after it.
2. `core/slots/segment_order.py` runs EDF over exactly those sequences, for the slots that a rank needs.

Which open sequences to take is decided by one of two rules. The first rule takes the largest remainders and is checked
against the two conditions of docs/planner.md: the choice must fit into the chunk, and it must be forward-safe (not
leave more urgent sequences than the slots after the chunk can serve). If a check fails, the second rule takes the
earliest deadlines, which always satisfies both.

With unchanged weights every prefix of every chunk is exact. After a change of weights the chunk boundaries are exact
whenever that is possible at all.

Shares, lags and weights are integers in units of 2^-40 sequence. Nothing is rounded, so every machine gets the same
result.
"""

import heapq
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import MixtureError

__all__ = [
    "BITS",
    "MAX_SLOTS",
    "UNIT",
    "advance",
    "earliest_due",
    "quantise_requested",
    "quantise_weights",
    "slots_until_exhausted",
]

BITS = 40
UNIT = 1 << BITS
"""One sequence, and the sum of all weights, in fixed-point units."""
MAX_SLOTS = 1 << 21
"""Maximum number of slots of one call; keeps every product below 2^62."""
NEVER = np.int64(1 << 62)
"""Number of slots until a domain is exhausted that lies beyond the horizon."""
NOT_OPEN_KEY = 1 << 42
"""Sort key of domains without an open sequence; larger than the key of any open sequence."""
STABLE_SORT_LIMIT = 200
"""Number of keys below which numpy's stable sort is faster than the packed sort of `_sort_stable`."""

Ints = NDArray[np.int64]


class _ChunkEnd(NamedTuple):
    """The end of a chunk, for the choice of the open sequences that are served before it."""

    num_choices: int
    """Number of open sequences to choose."""
    num_slots: int
    """Slots in the chunk."""


def quantise_weights(weights: NDArray[np.float64]) -> Ints:
    """Convert non-negative weights to integers that sum to exactly `UNIT`; shape (K,).

    Each result is within K + 1 units of its exact share. A positive weight gets at least 1 unit. The result is the same
    on every machine, because only correctly rounded operations on single numbers and integer sums are used.
    """
    # The sum is taken over integers: a floating-point sum would depend on the order of its terms.
    scaled = np.rint(weights * (UNIT / weights.max()))
    total = int(scaled.astype(np.int64).sum())
    units: Ints = np.rint(scaled * (UNIT / total)).astype(np.int64)
    if not units.all():
        units[(units == 0) & (weights > 0)] = 1

    # The largest weight absorbs the rounding error of the sum.
    units[units.argmax()] += UNIT - int(units.sum())
    return units


def quantise_requested(weights: NDArray[np.float64]) -> Ints:
    """Convert weights with `quantise_weights` after checking them; the result is read-only.

    Raises:
        MixtureError: a weight is negative or not finite, or all weights are zero.
    """
    # Most chunks have the weights of the chunk before.
    return _quantised(np.asarray(weights, np.float64).tobytes())


@lru_cache(maxsize=2)
def _quantised(content: bytes) -> Ints:
    """Check and convert the weights whose float64 bytes are `content`."""
    weights = np.frombuffer(content, np.float64)
    low = weights.min()
    high = weights.max()
    if low >= 0 and 0 < high < np.inf:
        units = quantise_weights(weights)
        units.setflags(write=False)
        return units
    if low == high == 0:
        raise MixtureError(
            "All weights of the mixture are 0, or belong to domains that were dropped.\n"
            "  Give another domain a weight; in a run that has begun, with mixtera-hpc mixture set RUN FILE."
        )
    invalid = int(np.flatnonzero(~np.isfinite(weights) | (weights < 0))[0])
    raise MixtureError(f"The weight of domain {invalid} is {weights[invalid]}; weights must be finite and at least 0.")


def advance(lag: Ints, weight: Ints, num_slots: int, remaining: Ints) -> tuple[Ints, Ints]:
    """Return the sequences that each domain gets in the next `num_slots` slots, and the lags after; shape (K,) each.

    The counts sum to `num_slots`.

    Args:
        lag: share minus sequences served, in `UNIT`; sums to 0. Shape (K,).
        weight: in `UNIT`; sums to `UNIT`. Shape (K,).
        num_slots: at most `MAX_SLOTS`.
        remaining: sequences that each domain can still serve; shape (K,). No domain's share may exceed it within
            `num_slots` slots (see `slots_until_exhausted`).
    """
    # The integer part of the outstanding share is due inside the chunk. The rest is the remainder f of docs/planner.md:
    # a domain with f > 0 has an open sequence at the end.
    share = lag + weight * num_slots
    counts = np.maximum(share >> BITS, 0)
    remainder = share - (counts << BITS)

    num_choices = num_slots - int(counts.sum())
    if num_choices < 0:
        # After changes of weights, more can be due than there are slots. The others stay due.
        counts = earliest_due(lag, weight, remaining, num_slots)
        remainder = share - (counts << BITS)
    if num_choices > 0:
        is_open = (remainder > 0) & (counts < remaining)
        chosen = _choose_open(remainder, weight, is_open, _ChunkEnd(num_choices, num_slots))
        counts[chosen] += 1
        remainder[chosen] -= UNIT

    # Share minus everything served is the lag.
    return counts, remainder


def earliest_due(lag: Ints, weight: Ints, limit: Ints, num_slots: int) -> Ints:
    """Return how many sequences of each domain are among the `num_slots` with the earliest deadlines; shape (K,).

    More than that must be due within `num_slots` slots. Equal deadlines are served by domain.

    Args:
        limit: sequences that each domain can serve; shape (K,).
    """

    def due_by(slot: int) -> Ints:
        return np.clip((lag + weight * slot) >> BITS, 0, limit) if slot else np.zeros_like(lag)

    # Find the last slot by which at most `num_slots` sequences are due. Overdue sequences are due by slot 1.
    low = 0
    high = num_slots
    while high - low > 1:
        middle = (low + high) // 2
        if due_by(middle).sum() <= num_slots:
            low = middle
        else:
            high = middle

    counts = due_by(low)
    due_next = due_by(low + 1) - counts
    slots_left = num_slots - int(counts.sum())
    counts += np.clip(slots_left - (due_next.cumsum() - due_next), 0, due_next)
    return counts


def _choose_open(remainder: Ints, weight: Ints, is_open: NDArray[np.bool_], end: _ChunkEnd) -> NDArray[np.integer[Any]]:
    """Return the domains whose open sequence is served inside the chunk; shape (end.num_choices,).

    Args:
        remainder: share outstanding at the end of the chunk after all due sequences; at most 0 where the next sequence
            is not released. Shape (K,), as the following.
        weight: in `UNIT`.
        is_open: True for domains with an open sequence.
        end: the number of choices, and the size of the chunk.
    """
    # -(a // -b) is a / b rounded up. After the end of the chunk, the next sequence is due within `deadline` slots,
    # and it is released in the last `age` slots of the chunk.
    until_due = UNIT - remainder
    negative_weight = -np.maximum(weight, 1)
    deadline = -(until_due // negative_weight)
    age = -(remainder // negative_weight)
    all_open = is_open.all()
    if not all_open:
        until_due = np.where(is_open, until_due, NOT_OPEN_KEY)
        age = np.where(is_open, age, NOT_OPEN_KEY)

    # First rule: the largest remainders. Accept it if both conditions hold.
    _, largest_first = _sort_stable(until_due)
    chosen = largest_first[: end.num_choices]
    lag_after = remainder.copy()
    lag_after[chosen] -= UNIT
    if _is_forward_safe(lag_after, weight, deadline):
        if not all_open:
            lag_after = lag_after * is_open
            weight = weight * is_open
        if _fits(lag_after, weight, age, end.num_slots):
            return chosen

    # Second rule: the earliest deadlines.
    candidates = np.flatnonzero(is_open)
    return candidates[_choose_due_first(remainder[candidates], age[candidates], deadline[candidates], end)]


def _sort_stable(key: Ints) -> tuple[Ints, Ints]:
    """Return `key` in ascending order and the permutation that sorts it; equal keys stay in order.

    Keys are in [0, 2^42].
    """
    if len(key) < STABLE_SORT_LIMIT:
        permutation = key.argsort(kind="stable")
        return key.take(permutation), permutation

    # Pack the position into the low bits of the key: numpy vectorises plain sorts, but not stable ones.
    position_bits = len(key).bit_length()
    packed = (key << position_bits) + np.arange(len(key))
    packed.sort()
    return packed >> position_bits, packed & ((1 << position_bits) - 1)


def _is_forward_safe(lag_after: Ints, weight: Ints, deadline: Ints) -> bool:
    """Return True if, for every b ≥ 1, at most b sequences not served in the chunk are due within the b slots after it.

    The condition is Σ (lag_after + weight · b) < b + 1 over the domains whose next sequence is due within b slots.

    The sums are computed in floating point, which cannot overflow, and err on the safe side: a product is off by at
    most 2^-52 of its value, and a product above 2^62 outweighs every sum of lags.
    """
    b, soonest_first = _sort_stable(deadline)
    weight_sum = weight.take(soonest_first).cumsum()
    others_share = np.multiply(b, UNIT - weight_sum, dtype=np.float64)
    excess = lag_after.take(soonest_first).cumsum() - others_share
    return bool(excess.max() < UNIT - (1 << 12))


def _fits(lag_after: Ints, weight: Ints, age: Ints, num_slots: int) -> bool:
    """Return True if the last L slots of the chunk have room for the chosen sequences released in them, for every L.

    The condition of docs/planner.md, |S ∩ A_L| ≤ ⌈Σ_{A_L} f + L · W⌉, is rewritten as Σ_{A_L} lag_after + L · W > -1.

    Args:
        lag_after: remainder minus the chosen sequences; 0 for domains that are not open.
        weight: 0 for domains that are not open.
        age: number of last slots of the chunk in which the domain's next sequence is released.
        num_slots: slots in the chunk.
    """
    last_slots, youngest_first = _sort_stable(age)
    others_weight = int(weight.sum()) - weight.take(youngest_first).cumsum()
    # The product may overflow where L exceeds the chunk. Those entries are ignored.
    room = lag_after.take(youngest_first).cumsum() + last_slots * others_weight
    return bool(((room > -UNIT) | (last_slots >= num_slots)).all())


def _choose_due_first(remainder: Ints, age: Ints, deadline: Ints, end: _ChunkEnd) -> Ints:
    """Return the positions of the sequences with the earliest deadlines, among the choices that fit into the chunk.

    A choice fits if it has at most ⌈Σ_{A_L} f⌉ members of A_L, the sequences released in the last L slots, for every
    L < num_slots. The sets A_L are nested, so a sweep over ascending L finds the best choice: the bound grows by at
    most one per sequence, and each sequence either joins the choice or replaces its latest deadline.

    Args:
        remainder: of the open domains only; shape (num_open,), as the following.
        age: number of last slots of the chunk in which the sequence is released.
        deadline: slots from the end of the chunk until the sequence is due.
        end: the number of choices, and the size of the chunk.
    """
    _, by_age = _sort_stable(age)
    _, by_deadline = _sort_stable(deadline)
    deadline_rank = np.empty(len(remainder), np.int64)
    deadline_rank[by_deadline] = np.arange(len(remainder))

    # Sequences released before the chunk are bound by nothing but their number.
    num_inside = int(np.count_nonzero(age < end.num_slots))
    inside = by_age[:num_inside]
    outside = by_age[num_inside:]
    bound = np.concatenate([[0], -(-remainder[inside].cumsum() >> BITS)])
    bound_grows = bound[1:] > bound[:-1]

    # A heap of negated ranks has the latest deadline on top.
    heap: list[int] = []
    for negated_rank, joins in zip((-deadline_rank[inside]).tolist(), bound_grows.tolist(), strict=True):
        if joins:
            heapq.heappush(heap, negated_rank)
        else:
            heapq.heappushpop(heap, negated_rank)
    ranks = np.sort(np.concatenate([-np.array(heap, np.int64), deadline_rank[outside]]))
    chosen: Ints = by_deadline[ranks[: end.num_choices]]
    return chosen


def slots_until_exhausted(lag: Ints, weight: Ints, remaining: Ints, horizon: int) -> Ints:
    """Return the number of slots after which each domain's share uses up its remaining sequences; shape (K,).

    The value is `NEVER` for domains that last longer than `horizon` slots.
    """
    slots = np.full(len(lag), NEVER)
    is_near = (remaining <= horizon + 1) & (weight > 0)
    if is_near.any():
        missing = (remaining[is_near] << BITS) - lag[is_near]
        slots[is_near] = np.maximum(-(-missing // weight[is_near]), 0)
    return slots
