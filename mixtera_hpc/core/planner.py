"""The planner: a pure state machine that decides what every step contains.

`plan(state, weights) → (ChunkPlan, state)`. A plan is 24 bytes per domain whatever the chunk's size: the cursors, lags and
weights its first slot starts from. `slots` expands it, the same on every rank, to the domain and the position in that
domain's stream of every sequence. Number of ranks, of nodes and of readers are not among the arguments of anything here.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.apportion import (
    BITS,
    MAX_SLOTS,
    UNIT,
    advance,
    order_slots,
    quantise_weights,
    slots_until_exhausted,
)
from mixtera_hpc.errors import CommError, MixtureError

__all__ = ["ChunkPlan", "OnExhausted", "Planner", "PlannerState", "Slots"]

OnExhausted = Literal["repeat", "redistribute", "stop"]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerState:
    """Where a run stands: O(domains) integers, the same size at step 10 and at step 10,000,000."""

    chunk: int
    """Chunks planned so far."""
    step: int
    """Steps planned so far."""
    cursors: Ints
    """Sequences each domain has been asked for; shape (K,)."""
    lags: Ints
    """Share due minus sequences served, in units of 2^-40 sequence; sums to 0. Shape (K,)."""

    @classmethod
    def start(cls, num_domains: int) -> "PlannerState":
        zeros = np.zeros(num_domains, np.int64)
        return cls(chunk=0, step=0, cursors=zeros, lags=zeros)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPlan:
    """The assignment of `num_steps` consecutive steps."""

    chunk: int
    first_step: int
    num_steps: int
    """Fewer than asked, possibly 0, when the data ends in this chunk."""
    last: bool
    """Nothing follows: a domain, or all of them, is exhausted."""
    cursors: Ints
    """At the first slot; shape (K,)."""
    lags: Ints
    """At the first slot."""
    weights: Ints
    """In units of 2^-40; sums to 2^40."""

    def to_array(self) -> Ints:
        """The plan as one int64 buffer of `array_size(K)`, its digest last."""
        head = np.array([self.chunk, self.first_step, self.num_steps, int(self.last)], np.int64)
        body = np.concatenate([head, self.cursors, self.lags, self.weights])
        return np.append(body, _digest(body))

    @classmethod
    def from_array(cls, buffer: Ints) -> "ChunkPlan":
        """The inverse of `to_array`.

        Raises:
            CommError: the digest does not match: the buffer was damaged on its way.
        """
        if _digest(buffer[:-1]) != buffer[-1]:
            raise CommError("A chunk plan arrived damaged: its digest does not match its content.")
        cursors, lags, weights = buffer[4:-1].reshape(3, -1).copy()
        chunk, first_step, num_steps, last = (int(n) for n in buffer[:4])
        return cls(
            chunk=chunk,
            first_step=first_step,
            num_steps=num_steps,
            last=bool(last),
            cursors=cursors,
            lags=lags,
            weights=weights,
        )

    @staticmethod
    def array_size(num_domains: int) -> int:
        return 5 + 3 * num_domains

    @property
    def digest(self) -> int:
        """64-bit digest of the content."""
        return int(self.to_array()[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """Every sequence of a chunk, in served order; shape (num_steps * global_batch_size,) each."""

    domain: NDArray[np.int32]
    ordinal: Ints
    """Position in the domain's stream, counted in sequences from the start of the run."""


class _Start(NamedTuple):
    """What slots begin with."""

    lags: Ints
    weights: Ints


class _Segment(NamedTuple):
    """Slots under constant weights: from the chunk's start, or from a domain's exhaustion, on."""

    lags: Ints
    weights: Ints
    counts: Ints
    end: Ints
    """Lags after them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """What stays the same during a run."""

    capacity: Ints
    """Sequences each domain can serve over all its epochs; `UNLIMITED` for endless. Shape (K,)."""
    global_batch_size: int
    chunk_steps: int
    on_exhausted: OnExhausted

    UNLIMITED = 1 << 61

    def plan(self, state: PlannerState, weights: NDArray[np.float64]) -> tuple[ChunkPlan, PlannerState]:
        """Decide the next chunk, and where it leads: `decide` and `after` in one."""
        plan = self.decide(state, weights)
        return plan, self.after(plan)

    def decide(self, state: PlannerState, weights: NDArray[np.float64]) -> ChunkPlan:
        """What the next chunk contains.

        Every prefix of the served order keeps every domain within 1 sequence of its share while weights stay the same;
        over changing weights the same holds at chunk boundaries (docs/planner.md says exactly when). O(K) time, O(K log K)
        where data may end.

        Args:
            weights: the wish, non-negative, shape (K,). Exhausted domains are left out under `redistribute`.

        Raises:
            MixtureError: the weights are negative, not finite or all zero.
        """
        num_slots = asked = self.chunk_steps * self.global_batch_size
        start = self._start(state, weights)
        remaining = np.maximum(self.capacity - state.cursors, 0)
        if not remaining.min() > num_slots + 1:
            served = sum(int(s.counts.sum()) for s in self._segments(start, remaining, num_slots))
            num_slots = served - served % self.global_batch_size
        return ChunkPlan(
            chunk=state.chunk,
            first_step=state.step,
            num_steps=num_slots // self.global_batch_size,
            last=num_slots < asked,
            cursors=state.cursors,
            lags=start.lags,
            weights=start.weights,
        )

    def after(self, plan: ChunkPlan) -> PlannerState:
        """The state that follows `plan`. O(K log K), whatever the chunk's size."""
        segments = self._segments_of(plan)
        counts = [segment.counts for segment in segments]
        return PlannerState(
            chunk=plan.chunk + 1,
            step=plan.first_step + plan.num_steps,
            cursors=sum(counts, plan.cursors),
            lags=segments[-1].end if segments else plan.lags,
        )

    def slots(self, plan: ChunkPlan) -> Slots:
        """Expand a plan to its sequences; O(n log K)."""
        pieces = [order_slots(s.lags, s.weights, s.counts) for s in self._segments_of(plan)]
        domain = np.concatenate([np.zeros(0, np.int32), *pieces])
        return Slots(domain=domain, ordinal=plan.cursors[domain] + _running_count(domain))

    def segment_counts(self, plan: ChunkPlan) -> list[Ints]:
        """Sequences of every domain from each exhaustion inside `plan` to the next; shape (K,) each."""
        return [segment.counts for segment in self._segments_of(plan)]

    def state_at(self, plan: ChunkPlan, step: int) -> PlannerState:
        """The state between two steps of `plan`: what is left of its chunk can be planned anew from there. O(n log K)."""
        if step >= plan.first_step + plan.num_steps:
            return self.after(plan)
        domain = self.slots(plan).domain[: (step - plan.first_step) * self.global_batch_size]
        lags, done = plan.lags, 0
        for segment in self._segments_of(plan):
            part = domain[done : done + int(segment.counts.sum())]
            if not len(part):
                break
            counts = np.bincount(part, minlength=len(plan.cursors))
            lags = segment.lags + segment.weights * len(part) - (counts << BITS)
            done += len(part)
        cursors = plan.cursors + np.bincount(domain, minlength=len(plan.cursors))
        return PlannerState(chunk=plan.chunk, step=step, cursors=cursors, lags=lags)

    def _start(self, state: PlannerState, weights: NDArray[np.float64]) -> _Start:
        start = _Start(state.lags, quantise_or_refuse(weights))
        if self.on_exhausted == "redistribute":
            gone = (state.cursors >= self.capacity) & (state.lags >= 0)
            if gone.any() and (weights[~gone] > 0).any():
                return _retire(start, gone)
        return start

    def _segments_of(self, plan: ChunkPlan) -> list[_Segment]:
        remaining = np.maximum(self.capacity - plan.cursors, 0)
        return self._segments(_Start(plan.lags, plan.weights), remaining, plan.num_steps * self.global_batch_size)

    def _segments(self, now: _Start, remaining: Ints, num_slots: int) -> list[_Segment]:
        """Cut `num_slots` at exhaustions; they cover less when the data ends."""
        segments: list[_Segment] = []
        while num_slots > 0:
            gone, length = _next_exhaustion(now, remaining, min(num_slots, MAX_SLOTS))
            counts, end = advance(now.lags, now.weights, length, remaining)
            segments.append(_Segment(now.lags, now.weights, counts, end))
            num_slots -= length
            if num_slots == 0:
                break
            remaining = remaining - counts
            now = _Start(end, now.weights)
            if gone is not None:
                if self.on_exhausted != "redistribute" or not (now.weights[~gone] > 0).any():
                    break
                now = _retire(now, gone)
        return segments


def _next_exhaustion(now: _Start, remaining: Ints, num_slots: int) -> tuple[NDArray[np.bool_] | None, int]:
    """The domains that run out first, None if none does within `num_slots`, and the slots until then."""
    if remaining.min() > num_slots + 1:
        return None, num_slots
    until = slots_until_exhausted(now.lags, now.weights, remaining, num_slots)
    length = min(num_slots, int(until.min()))
    gone = until <= length
    return (gone if gone.any() else None), length


def _retire(now: _Start, gone: NDArray[np.bool_]) -> _Start:
    """Give the share of exhausted domains, and what they were still due, to the others."""
    weights = quantise_weights(np.where(gone, 0, now.weights).astype(np.float64))
    due = int(now.lags[gone].sum())
    extra = np.floor(weights * (due / UNIT)).astype(np.int64)
    extra[np.argmax(weights)] += due - int(extra.sum())
    return _Start(np.where(gone, 0, now.lags) + extra, weights)


def quantise_or_refuse(weights: NDArray[np.float64]) -> Ints:
    """`quantise_weights`, refusing weights that are negative, not finite or all zero."""
    low, high = weights.min(), weights.max()
    if low >= 0 and 0 < high < np.inf:
        return quantise_weights(weights)
    if low == high == 0:
        raise MixtureError(
            "All weights of the mixture are 0, or of domains that were dropped.\n  Give another domain a weight; in a run that has "
            "begun, with mixtera-hpc mixture set RUN FILE."
        )
    worst = int(np.flatnonzero(~np.isfinite(weights) | (weights < 0))[0])
    raise MixtureError(f"The weight of domain {worst} is {weights[worst]}; weights are finite and at least 0.")


def _running_count(domain: NDArray[np.int32]) -> Ints:
    """How often each entry's value occurred before it."""
    by_domain = np.argsort(domain, kind="stable")
    counts = np.bincount(domain)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    running = np.empty(len(domain), np.int64)
    running[by_domain] = np.arange(len(domain)) - first
    return running


def _digest(body: Ints) -> np.int64:
    raw = hashlib.blake2b(np.ascontiguousarray(body, "<i8").tobytes(), digest_size=8).digest()
    return np.frombuffer(raw, "<i8")[0]
