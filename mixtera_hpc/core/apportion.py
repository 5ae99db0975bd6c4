"""Exact apportionment: which domain gets each slot, so that no prefix is ever a full sequence away from its share.

Give the m-th sequence of a domain with lag l and weight w the window of slots in which serving it keeps the domain's count
within 1 of its share: not before slot ⌊(m-1-l)/w⌋ + 1, not after slot ⌈(m-l)/w⌉ (the proportionate-fairness windows of Baruah
et al. 1996, for one processor). Serving the earliest deadline among the released fills every window, so all prefixes are exact.

A chunk is decided in two parts. `advance` finds only how many sequences every domain has had at the end of n slots, in
O(K log K) whatever n is: everything due by then, and of the sequences whose window is open, those with the earliest
deadlines, as long as no suffix of the chunk is promised more newly released sequences than fit in it. `order_slots` then runs the
earliest-deadline rule over exactly those sequences. docs/planner.md has the proof that the two agree: with unchanged
weights every prefix of every chunk is exact; after a change of weights the boundaries are, whenever that is possible at all.

Shares are integers in units of 2^-40 sequence, so that nothing is ever rounded and every machine gets the same answer.
"""

import heapq
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BITS", "MAX_SLOTS", "UNIT", "advance", "order_slots", "quantise_weights", "slots_until_exhausted"]

BITS = 40
UNIT = 1 << BITS
"""Fixed-point one."""
MAX_SLOTS = 1 << 21
"""Slots of one call; keeps every product below 2^62."""
NEVER = np.int64(1 << 62)
FAR = 1 << 42
FEW = 200

Ints = NDArray[np.int64]


def quantise_weights(weights: NDArray[np.float64]) -> Ints:
    """Non-negative weights as integers that sum to UNIT exactly; shape (K,).

    Each is within K + 1 units of its share, and a positive one keeps at least 1. Only correctly rounded operations on single
    numbers and sums of integers are used, so every machine gets the same.
    """
    scaled = np.rint(weights * (UNIT / weights.max()))
    units = np.rint(scaled * (UNIT / int(scaled.astype(np.int64).sum()))).astype(np.int64)
    if not units.all():
        units[(units == 0) & (weights > 0)] = 1
    units[units.argmax()] += UNIT - int(units.sum())
    return units


def advance(lag: Ints, weight: Ints, num_slots: int, remaining: Ints) -> tuple[Ints, Ints]:
    """How many sequences each domain gets in the next `num_slots` slots, and the lags after them; shape (K,) each.

    The counts sum to `num_slots`.

    Args:
        lag: share due minus sequences served, in UNIT; sums to 0.
        weight: in UNIT; sums to UNIT.
        remaining: sequences a domain still has; nobody's share may outgrow it within `num_slots` (see `slots_until_exhausted`).
    """
    share = lag + weight * num_slots
    due = np.maximum(share >> BITS, 0)
    left = share - (due << BITS)
    rest = num_slots - int(due.sum())
    if rest > 0:
        early = _served_early(left, weight, (left > 0) & (due < remaining), (rest, num_slots))
        due[early] += 1
        left[early] -= UNIT
    return due, left


def _served_early(
    part: Ints, weight: Ints, open_: NDArray[np.bool_], limits: tuple[int, int]
) -> NDArray[np.integer[Any]]:
    """The domains whose open sequence, released and not due by the boundary, is served before it.

    Args:
        part: share outstanding beside what is due; at most 0 where the next sequence is not released.
        open_: which have an open sequence.
        limits: how many are wanted, and the slots of the chunk.
    """
    rest, num_slots = limits
    missing, fall = UNIT - part, -np.maximum(weight, 1)
    deadline, age = -(missing // fall), -(part // fall)
    all_open = open_.all()
    if not all_open:
        missing, age = np.where(open_, missing, FAR), np.where(open_, age, FAR)
    _, order = _ascending(missing)
    chosen = order[:rest]
    left = part.copy()
    left[chosen] -= UNIT
    if _rest_fits(left, weight, deadline):
        if not all_open:
            left, weight = left * open_, weight * open_
        if _chunk_fits(left, weight, age, num_slots):
            return chosen
    candidates = np.flatnonzero(open_)
    return candidates[_earliest(part[candidates], age[candidates], deadline[candidates], limits)]


def _ascending(key: Ints) -> tuple[Ints, Ints]:
    """`key`, at most 2^42, in order, and whose each is; equal ones stay as they were."""
    if len(key) < FEW:
        order = key.argsort(kind="stable")
        return key.take(order), order
    tie = len(key).bit_length()
    keys = (key << tie) + np.arange(len(key))  # Plain sorts are vectorised, stable ones are not.
    keys.sort()
    return keys >> tie, keys & ((1 << tie) - 1)


def _rest_fits(left: Ints, weight: Ints, deadline: Ints) -> bool:
    """Whether, for every b, at most b of what is left at the boundary is due within b slots.

    That is Σ ⌊left + weight · b⌋ ≤ b over those with a deadline by then. In floating point, which cannot overflow, and on the safe
    side: a product is off by at most 2^-52 of it, and one above 2^62 outweighs every sum of parts.
    """
    b, urgent = _ascending(deadline)
    ahead = np.multiply(b, UNIT - weight.take(urgent).cumsum(), dtype=np.float64)
    due = left.take(urgent).cumsum() - ahead
    return bool(due.max() < UNIT - (1 << 12))


def _chunk_fits(left: Ints, weight: Ints, age: Ints, num_slots: int) -> bool:
    """Whether, for every L, the last L slots of the chunk have room for what is chosen of the sequences released in them."""
    slots, young = _ascending(age)
    others = int(weight.sum()) - weight.take(young).cumsum()
    room = left.take(young).cumsum() + slots * others  # May overflow beyond the chunk, where it does not count.
    return bool(((room > -UNIT) | (slots >= num_slots)).all())


def _earliest(part: Ints, age: Ints, deadline: Ints, limits: tuple[int, int]) -> Ints:
    """The positions of those that are due first, among those that fit into the chunk.

    A set that holds at most ⌈Σ part⌉ of the sequences released in the last L slots, for every L < num_slots, can be served
    without crowding the end of the chunk. Among such sets the one with the earliest deadlines is found by a sweep over
    ascending L: the bound grows by at most one per sequence, so each either joins or replaces the latest deadline.
    """
    rest, num_slots = limits
    (_, by_age), (_, by_deadline) = _ascending(age), _ascending(deadline)
    rank = np.empty(len(part), np.int64)
    rank[by_deadline] = np.arange(len(part))
    inside = int(np.count_nonzero(age < num_slots))
    sweep, outside = by_age[:inside], by_age[inside:]
    bound = np.concatenate([[0], -(-part[sweep].cumsum() >> BITS)])
    chosen: list[int] = []
    for key, joins in zip((-rank[sweep]).tolist(), (bound[1:] > bound[:-1]).tolist(), strict=True):
        if joins:
            heapq.heappush(chosen, key)
        else:
            heapq.heappushpop(chosen, key)
    ranks = np.sort(np.concatenate([-np.array(chosen, np.int64), rank[outside]]))
    return by_deadline[ranks[:rest]]


def slots_until_exhausted(lag: Ints, weight: Ints, remaining: Ints, horizon: int) -> Ints:
    """Slots after which each domain's share equals all it has left; `NEVER` if beyond `horizon`. Shape (K,)."""
    slots = np.full(len(lag), NEVER)
    near = (remaining <= horizon + 1) & (weight > 0)
    if near.any():
        missing = (remaining[near] << BITS) - lag[near]
        slots[near] = np.maximum(-(-missing // weight[near]), 0)
    return slots


def order_slots(lag: Ints, weight: Ints, counts: Ints) -> NDArray[np.int32]:
    """The domain of every slot, when domain k is to get `counts[k]` of them; shape (counts.sum(),).

    Earliest deadline first among the released, O(n log K).
    """
    num_slots = int(counts.sum())
    domain = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    nth = np.arange(num_slots) - np.repeat(np.cumsum(counts) - counts, counts)
    rate = np.maximum(weight, 1)[domain]
    release = np.clip((nth * UNIT - lag[domain]) // rate, 0, num_slots - 1)
    deadline = np.clip(-(-((nth + 1) * UNIT - lag[domain]) // rate), 1, num_slots)
    priority = np.empty(num_slots, np.int64)
    priority[np.lexsort((nth, domain, deadline))] = np.arange(num_slots)
    by_release = np.argsort(release, kind="stable")
    served = _earliest_deadline_first(release[by_release].tolist(), priority[by_release].tolist())
    by_priority = np.empty(num_slots, np.int32)
    by_priority[priority] = domain
    return by_priority[served]


def _earliest_deadline_first(release: list[int], priority: list[int]) -> list[int]:
    """Priorities in the order they are served; when nothing is released, the next to be released is taken early."""
    waiting: list[int] = []
    served, taken, total = [], 0, len(release)
    for slot in range(total):
        while taken < total and (release[taken] <= slot or not waiting):
            heapq.heappush(waiting, priority[taken])
            taken += 1
        served.append(heapq.heappop(waiting))
    return served
