"""The planner: a pure state machine that decides what every step contains.

`plan(state, weights) → (ChunkPlan, state)`. A plan takes 24 bytes per domain, regardless of the number of steps in the
chunk: the cursor, lag and weight of each domain at the first slot. `slots` expands a plan into the domain and the
stream position of every sequence, and `order` of those that a rank needs; both give the same result on every rank. No
function here takes the number of ranks, nodes or readers.

A chunk is cut into segments where a domain runs out of data. Inside a segment the weights are constant, and
`core/apportion.py` decides the slots. With `on_exhausted="redistribute"` the weight and the lag of an exhausted domain
go to the others, and the next segment starts. With `stop` and `repeat` the data ends. Every rank finds the same
segments, from integers that all ranks have. The last step of the data is full, unless `last_batch="pad"` adds a step
with fewer sequences.
"""

import hashlib
from collections import deque
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.apportion import (
    BITS,
    MAX_SLOTS,
    UNIT,
    advance,
    quantise_requested,
    quantise_weights,
    slots_until_exhausted,
)
from mixtera_hpc.core.slots.batch_schedule import BatchSchedule
from mixtera_hpc.core.slots.chunk_order import ChunkOrder
from mixtera_hpc.core.slots.segment_order import SegmentOrder, Slots
from mixtera_hpc.errors import CommError

__all__ = ["ChunkPlan", "LastBatch", "OnExhausted", "Planner", "PlannerState"]

OnExhausted = Literal["repeat", "redistribute", "stop"]
"""Action when a domain has served its capacity: `redistribute` its weight, or end the data (`stop` and `repeat`).

With `repeat` domains start over after an epoch, so their capacity is limited by `max_epochs` only.
"""
LastBatch = Literal["drop", "pad"]
"""Treatment of the sequences at the end of the data that do not fill a step: none of them is served, or a step with
fewer sequences serves them.
"""
Ints = NDArray[np.int64]
PLANS_IN_MEMORY = 16
"""Plans whose segments stay in memory: a reader may expand eight plans before they arrive."""
_DIGEST_PLACE = np.zeros(1, np.int64)
"""The last element of a plan's buffer, before the digest is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerState:
    """The position of a run: O(K) integers for K domains, regardless of the number of steps."""

    chunk: int
    """Chunks planned so far."""
    step: int
    """Steps planned so far."""
    cursors: Ints
    """Sequences planned from each domain's stream; shape (K,)."""
    lags: Ints
    """Share minus sequences served, in units of 2^-40 sequence; sums to 0. Shape (K,)."""

    @classmethod
    def start(cls, num_domains: int) -> "PlannerState":
        """Return the state before the first step."""
        zeros = np.zeros(num_domains, np.int64)
        return cls(chunk=0, step=0, cursors=zeros, lags=zeros)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPlan:
    """The assignment of `num_steps` consecutive steps."""

    chunk: int
    first_step: int
    num_steps: int
    """Fewer than `chunk_steps`, possibly 0, if the data ends in this chunk."""
    last: bool
    """True if no chunk follows, because one domain or all of them are exhausted."""
    cursors: Ints
    """At the first slot; shape (K,)."""
    lags: Ints
    """At the first slot, in units of 2^-40 sequence; shape (K,)."""
    weights: Ints
    """At the first slot, in units of 2^-40; sums to 2^40. Shape (K,)."""

    def to_array(self) -> Ints:
        """Return the plan as one int64 buffer of shape (array_size(K),); the last element is the digest."""
        buffer = self._without_digest()
        buffer[-1] = _digest(buffer[:-1])
        return buffer

    def is_equal(self, other: "ChunkPlan") -> bool:
        """Return True if both plans have the same content."""
        if self is other:
            return True
        return self.chunk == other.chunk and np.array_equal(self._without_digest(), other._without_digest())

    def _without_digest(self) -> Ints:
        """Return the buffer of `to_array` with 0 in place of the digest."""
        # Layout: chunk, first_step, num_steps, last, K cursors, K lags, K weights, digest.
        head = [self.chunk, self.first_step, self.num_steps, int(self.last)]
        return np.concatenate([np.array(head, np.int64), self.cursors, self.lags, self.weights, _DIGEST_PLACE])

    @classmethod
    def from_array(cls, buffer: Ints) -> "ChunkPlan":
        """Rebuild a plan from the buffer of `to_array`.

        Raises:
            CommError: the digest does not match the content, so the buffer was damaged in transit.
        """
        if _digest(buffer[:-1]) != buffer[-1]:
            raise CommError("A chunk plan was damaged in transit: its digest does not match its content.")
        # Copy: the caller receives the next plan into the same buffer.
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
        """Return the number of elements of `to_array`: 4 scalars, 3 values per domain and the digest."""
        return 5 + 3 * num_domains

    @property
    def digest(self) -> int:
        """64-bit digest of the content, as a signed integer."""
        return int(self.to_array()[-1])


class _SegmentStart(NamedTuple):
    """Lags and weights at the first slot of a segment; shape (K,) each."""

    lags: Ints
    weights: Ints


class _Segment(NamedTuple):
    """Consecutive slots with constant weights; shape (K,) each.

    A segment starts at the first slot of a chunk or where a domain is exhausted.
    """

    lags: Ints
    """At the first slot."""
    weights: Ints
    counts: Ints
    """Sequences of each domain in the segment."""
    lags_after: Ints
    """After the last slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Plan chunks with settings that are constant during a run."""

    capacity: Ints
    """Sequences each domain can serve over all its epochs; `UNLIMITED` if they do not end. Shape (K,)."""
    batch_schedule: BatchSchedule
    """Sequences in every step, over all ranks."""
    chunk_steps: int
    """Steps in a chunk."""
    on_exhausted: OnExhausted
    last_batch: LastBatch = "drop"
    _newest: deque[tuple[ChunkPlan, list[_Segment]]] = field(
        default_factory=lambda: deque(maxlen=PLANS_IN_MEMORY), init=False, repr=False, compare=False
    )
    """The newest expanded plans and their segments: every rank needs each of them twice, in two threads."""

    # Beyond any run, and small enough that a sum of two capacities fits into an int64.
    UNLIMITED = 1 << 61

    def plan(self, state: PlannerState, weights: NDArray[np.float64]) -> tuple[ChunkPlan, PlannerState]:
        """Return the next chunk and the state after it: `decide` and `after` in one call."""
        plan = self.decide(state, weights)
        return plan, self.after(plan)

    def decide(self, state: PlannerState, weights: NDArray[np.float64]) -> ChunkPlan:
        """Return the next chunk.

        While the weights stay the same, every prefix of the order keeps every domain within 1 sequence of its share. If
        they change from chunk to chunk, the same holds at chunk boundaries (docs/planner.md says exactly when).

        Takes O(K) time, or O(K log K) if a domain may run out of data in the chunk.

        Args:
            state: position of the run before the chunk.
            weights: requested weights, non-negative, shape (K,). With `redistribute` the weights of exhausted domains
                are ignored.

        Raises:
            MixtureError: the weights are negative, not finite or all zero.
        """
        requested_slots = self.batch_schedule.slots(state.step, state.step + self.chunk_steps)
        num_slots = requested_slots
        num_steps = self.chunk_steps
        start = self._first_segment_start(state, weights)
        remaining = np.maximum(self.capacity - state.cursors, 0)

        # No domain gets more than num_slots + 1 sequences. Segments are needed only where one may have fewer.
        if not remaining.min() > num_slots + 1:
            num_slots = sum(int(s.counts.sum()) for s in self._segments(start, remaining, num_slots))
            end_step, num_left_over = self.batch_schedule.locate_in(state.step, num_slots)
            num_steps = end_step - state.step
            if num_left_over and self.last_batch == "pad":
                num_steps += 1
        return ChunkPlan(
            chunk=state.chunk,
            first_step=state.step,
            num_steps=num_steps,
            last=num_slots < requested_slots,
            cursors=state.cursors,
            lags=start.lags,
            weights=start.weights,
        )

    def after(self, plan: ChunkPlan) -> PlannerState:
        """Return the state after `plan`, in O(K log K) time for any size of the chunk."""
        segments = self._segments_of(plan)
        counts = [segment.counts for segment in segments]
        return PlannerState(
            chunk=plan.chunk + 1,
            step=plan.first_step + plan.num_steps,
            cursors=sum(counts, plan.cursors),
            lags=segments[-1].lags_after if segments else plan.lags,
        )

    def end_of_data(self, plan: ChunkPlan) -> tuple[Ints, int]:
        """Return where the data ends in the last `plan`, and what does not fill a global batch there.

        Returns:
            The sequences of each domain before the end, shape (K,), and how many of all do not fill a global batch.
        """
        start = _SegmentStart(plan.lags, plan.weights)
        remaining = np.maximum(self.capacity - plan.cursors, 0)
        num_slots = self.batch_schedule.slots(plan.first_step, plan.first_step + self.chunk_steps)
        segments = self._segments(start, remaining, num_slots)
        counts = sum((segment.counts for segment in segments), np.zeros_like(plan.cursors))
        return plan.cursors + counts, self.batch_schedule.locate_in(plan.first_step, int(counts.sum()))[1]

    def num_slots(self, plan: ChunkPlan) -> int:
        """Return the sequences of the steps of `plan`; a last step that is filled with padding counts as a full one."""
        return self.batch_schedule.slots(plan.first_step, plan.first_step + plan.num_steps)

    def order(self, plan: ChunkPlan) -> ChunkOrder:
        """Return the order of the slots of `plan`, in O(K log K) time; slots are computed when they are asked for."""
        segments = [SegmentOrder(s.lags, s.weights, s.counts) for s in self._segments_of(plan)]
        return ChunkOrder.of_segments(plan.cursors, segments)

    def slots(self, plan: ChunkPlan) -> Slots:
        """Expand `plan` to its n sequences, in O(n log K) time. A rank that needs a part of them uses `order`."""
        order = self.order(plan)
        return order.slots([(0, order.num_slots)]).together

    def segment_counts(self, plan: ChunkPlan) -> list[Ints]:
        """Return the sequences of every domain in each segment of `plan`; shape (K,) each.

        A segment ends where a domain is exhausted, and at the end of the chunk.
        """
        return [segment.counts for segment in self._segments_of(plan)]

    def state_at(self, plan: ChunkPlan, step: int) -> PlannerState:
        """Return the state before `step` inside `plan`, in O(K log K) time.

        The rest of the chunk can be planned again from there, with other weights.
        """
        if step >= plan.first_step + plan.num_steps:
            return self.after(plan)
        slot = self.batch_schedule.slots(plan.first_step, step)
        counts = self.order(plan).counts_before(np.array([slot]))[0]

        # Find the segment that holds the last slot before `step`: its counts up to there give the lags.
        lags = plan.lags
        before = np.zeros_like(counts)
        first = 0
        for segment in self._segments_of(plan):
            if first >= slot:
                break
            num_slots = min(int(segment.counts.sum()), slot - first)
            served = np.minimum(segment.counts, counts - before)
            lags = segment.lags + segment.weights * num_slots - (served << BITS)
            before = before + segment.counts
            first += num_slots
        return PlannerState(chunk=plan.chunk, step=step, cursors=plan.cursors + counts, lags=lags)

    def _first_segment_start(self, state: PlannerState, weights: NDArray[np.float64]) -> _SegmentStart:
        """Quantise the requested weights and leave out domains that are already exhausted."""
        start = _SegmentStart(state.lags, quantise_requested(weights))
        if self.on_exhausted == "redistribute":
            # A domain that was served ahead of its share (negative lag) keeps its weight until the share has caught up.
            exhausted = (state.cursors >= self.capacity) & (state.lags >= 0)
            if exhausted.any() and (weights[~exhausted] > 0).any():
                return _redistribute(start, exhausted)
            return start
        # A dropped domain may lag behind its share, but has no sequence left for it. The number of slots up to the end
        # of the data follows from the lags, so the other domains take this lag.
        gone = (start.weights == 0) & (state.lags > 0) & (state.cursors >= self.capacity)
        if gone.any() and self.capacity[start.weights > 0].min() < self.UNLIMITED:
            return _SegmentStart(_without_lags(start.lags, gone, start.weights), start.weights)
        return start

    def _segments_of(self, plan: ChunkPlan) -> list[_Segment]:
        """Return the segments of a plan, which are computed once for several calls in a row."""
        # A copy, because another thread may add a plan meanwhile.
        for known, segments in self._newest.copy():
            if known.is_equal(plan):
                return segments
        start = _SegmentStart(plan.lags, plan.weights)
        remaining = np.maximum(self.capacity - plan.cursors, 0)
        segments = self._segments(start, remaining, self.num_slots(plan))
        if len(segments) > 1:
            # Thousands of domains may end in a chunk, with arrays for each of them. No reader expects such plans.
            self._newest.clear()
        self._newest.appendleft((plan, segments))
        return segments

    def _segments(self, start: _SegmentStart, remaining: Ints, num_slots: int) -> list[_Segment]:
        """Cut `num_slots` slots where domains are exhausted; the segments cover fewer slots if the data ends."""
        segments: list[_Segment] = []
        while num_slots > 0:
            # A segment ends at the first exhaustion, at the end of the chunk, or after MAX_SLOTS slots.
            exhausted, length = _next_exhaustion(start, remaining, min(num_slots, MAX_SLOTS))
            counts, lags_after = advance(start.lags, start.weights, length, remaining)
            segments.append(_Segment(start.lags, start.weights, counts, lags_after))
            num_slots -= length
            if num_slots == 0:
                break

            remaining = remaining - counts
            start = _SegmentStart(lags_after, start.weights)
            if exhausted is not None:
                # The data ends here unless other domains can take the weight.
                if self.on_exhausted != "redistribute" or not (start.weights[~exhausted] > 0).any():
                    break
                start = _redistribute(start, exhausted)
        return segments


def _next_exhaustion(start: _SegmentStart, remaining: Ints, num_slots: int) -> tuple[NDArray[np.bool_] | None, int]:
    """Return the domains that are exhausted first, and the slots until then.

    Without an exhaustion within `num_slots` slots, return None and `num_slots`.
    """
    # A domain gets at most one sequence per slot, and its lag is below 1.
    if remaining.min() > num_slots + 1:
        return None, num_slots
    slots_left = slots_until_exhausted(start.lags, start.weights, remaining, num_slots)
    length = min(num_slots, int(slots_left.min()))
    exhausted = slots_left <= length
    return (exhausted if exhausted.any() else None), length


def _redistribute(start: _SegmentStart, exhausted: NDArray[np.bool_]) -> _SegmentStart:
    """Give the weights and lags of exhausted domains to the others, in proportion to their weights."""
    # float64 is exact here: weights are at most 2^40.
    weights = quantise_weights(np.where(exhausted, 0, start.weights).astype(np.float64))

    return _SegmentStart(_without_lags(start.lags, exhausted, weights), weights)


def _without_lags(lags: Ints, gone: NDArray[np.bool_], weights: Ints) -> Ints:
    """Return `lags` with 0 for the domains of `gone`; the others take their lags, in proportion to `weights`."""
    # Floor every part of the lag and give the remainder to the largest weight, so that the lags still sum to 0.
    freed_lag = int(lags[gone].sum())
    extra_lag = np.floor(weights * (freed_lag / UNIT)).astype(np.int64)
    extra_lag[np.argmax(weights)] += freed_lag - int(extra_lag.sum())
    moved: Ints = np.where(gone, 0, lags) + extra_lag
    return moved


def _digest(body: Ints) -> np.int64:
    """Return the first 8 bytes of the BLAKE2b digest of the little-endian buffer as a signed integer."""
    # The bytes are in little-endian order on every machine, so digests of different machines can be compared.
    raw = hashlib.blake2b(np.ascontiguousarray(body, "<i8").tobytes(), digest_size=8).digest()
    digest: np.int64 = np.frombuffer(raw, "<i8")[0]
    return digest
