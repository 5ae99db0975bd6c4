"""The planner: a pure state machine that decides what every step contains.

`plan(state, weights) → (ChunkPlan, state)`. `slots` expands a plan into the domain and the stream position of every
sequence, and `order` of those that a rank needs; both give the same result on every rank. No function here takes the
number of ranks, nodes or readers.

A chunk is cut into segments where a domain runs out of data (`core/slots/segments.py`). Inside a segment the weights
are constant, and `core/apportion.py` decides the slots. The last step of the data is full, unless `last_batch="pad"`
adds a step with fewer sequences.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.apportion import BITS, quantise_requested
from mixtera_hpc.core.chunk_plan import ChunkPlan, PlannerState
from mixtera_hpc.core.slots.batch_schedule import BatchSchedule
from mixtera_hpc.core.slots.chunk_order import ChunkOrder
from mixtera_hpc.core.slots.segment_order import SegmentOrder, Slots
from mixtera_hpc.core.slots.segments import Segment, SegmentStart, cut_segments

__all__ = ["LastBatch", "OnExhausted", "Planner"]

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
    _newest: deque[tuple[ChunkPlan, list[Segment]]] = field(
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

        # No domain gets more than num_slots + 1 sequences. Segments are needed only where one may have fewer.
        if not start.remaining.min() > num_slots + 1:
            num_slots = sum(int(segment.counts.sum()) for segment in self._cut_segments(start, num_slots))
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
        num_slots = self.batch_schedule.slots(plan.first_step, plan.first_step + self.chunk_steps)
        segments = self._cut_segments(self._start_of(plan), num_slots)
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

    def _first_segment_start(self, state: PlannerState, weights: NDArray[np.float64]) -> SegmentStart:
        """Quantise the requested weights and leave out domains that are already exhausted."""
        start = SegmentStart(state.lags, quantise_requested(weights), self._remaining(state.cursors))
        if self.on_exhausted == "redistribute":
            # A domain that was served ahead of its share (negative lag) keeps its weight until the share has caught up.
            exhausted = (state.cursors >= self.capacity) & (state.lags >= 0)
            if exhausted.any() and (weights[~exhausted] > 0).any():
                return start.redistribute(exhausted)
            return start
        # A dropped domain may lag behind its share, but has no sequence left for it. The number of slots up to the end
        # of the data follows from the lags, so the other domains take this lag.
        gone = (start.weights == 0) & (state.lags > 0) & (state.cursors >= self.capacity)
        if gone.any() and self.capacity[start.weights > 0].min() < self.UNLIMITED:
            return start.move_lags(gone)
        return start

    def _segments_of(self, plan: ChunkPlan) -> list[Segment]:
        """Return the segments of a plan, which are computed once for several calls in a row."""
        # A copy, because another thread may add a plan meanwhile.
        for known, segments in self._newest.copy():
            if known.is_equal(plan):
                return segments
        segments = self._cut_segments(self._start_of(plan), self.num_slots(plan))
        if len(segments) > 1:
            # Thousands of domains may end in a chunk, with arrays for each of them. No reader expects such plans.
            self._newest.clear()
        self._newest.appendleft((plan, segments))
        return segments

    def _start_of(self, plan: ChunkPlan) -> SegmentStart:
        """Return the start of the first segment of `plan`."""
        return SegmentStart(plan.lags, plan.weights, self._remaining(plan.cursors))

    def _remaining(self, cursors: Ints) -> Ints:
        """Return the sequences that each domain can still serve."""
        remaining: Ints = np.maximum(self.capacity - cursors, 0)
        return remaining

    def _cut_segments(self, start: SegmentStart, num_slots: int) -> list[Segment]:
        """Cut the slots of a chunk by the rule of `on_exhausted`."""
        return cut_segments(start, num_slots, redistribute=self.on_exhausted == "redistribute")
