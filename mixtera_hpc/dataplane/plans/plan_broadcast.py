"""Broadcast chunk plans from rank 0 to all ranks, one chunk ahead: 24 bytes per domain per chunk.

Chunk c + 1 is planned and broadcast while chunk c is trained on. Rank 0 starts the broadcast when the weights of the
chunk are known; the other ranks have posted their part already. No rank blocks: `poll` drives the broadcast, from the
main thread only.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import CollectiveRequest, Communicator
from mixtera_hpc.core.chunk_plan import ChunkPlan, PlannerState
from mixtera_hpc.core.planner import Planner
from mixtera_hpc.errors import CommError

__all__ = ["PlanBroadcaster"]


class PlanBroadcaster:
    """Delivers chunk plans in order; every rank receives the same plans."""

    def __init__(
        self,
        comm: Communicator,
        planner: Planner,
        weights_of: Callable[[int], NDArray[np.float64] | None],
        resumed: ChunkPlan,
    ) -> None:
        """Start with the plan `resumed`, which every rank has; deliver it again, then continue. **Collective.**

        Args:
            weights_of: returns the weights of a chunk, or None while they are not known; called on rank 0 only.
            resumed: the plan of the chunk to continue in. A plan without steps is not delivered; it only gives the
                chunk, step and cursors at which planning starts.
        """
        # A duplicate orders its collectives independently: broadcasts must not mix with reductions of other ranks.
        self._comm = comm.Dup()
        self._planner = planner
        self._weights_of = weights_of
        self._buffer = np.zeros(ChunkPlan.array_size(len(planner.capacity)), np.int64)
        self._request: CollectiveRequest | None = None
        self._posted_s = 0.0
        self._state = PlannerState(
            chunk=resumed.chunk, step=resumed.first_step, cursors=resumed.cursors, lags=resumed.lags
        )
        """The state before the plan `_latest`, or after it once `_next_state` was called."""
        self._next_chunk = resumed.chunk
        """The chunk of the plan that arrives next."""
        self._planned_end = resumed.first_step
        """One past the last data step of the plans that have arrived."""
        self._own_plan: ChunkPlan | None = None
        """On rank 0, the plan that is on its way."""
        self._resumed = resumed if resumed.num_steps or resumed.last else None
        self._latest: ChunkPlan | None = None
        self.plan_s = 0.0
        """Seconds that rank 0 took for its last plan."""
        self._new_plan_s = 0.0
        self.broadcast_s = 0.0
        """Seconds from posting the last broadcast to its completion on this rank."""

    @property
    def next_chunk(self) -> int:
        """The first chunk that rank 0 has not planned yet."""
        is_planned = self._request is not None or self._resumed is not None
        return self._next_chunk + int(is_planned)

    def poll(self, last_chunk: int) -> ChunkPlan | None:
        """Drive the broadcasts of chunks up to `last_chunk`; return a plan that has just arrived."""
        # All ranks but 0 post their part of the broadcast before the plan exists.
        if self._request is None and self._next_chunk <= last_chunk and not self._has_ended:
            self._request = self._post()
        if self._request is None or not self._request.Test():
            return None
        self._request = None
        return self._receive()

    def take_plan_s(self) -> float:
        """Return the seconds that rank 0 has planned since the last call."""
        seconds = self._new_plan_s
        self._new_plan_s = 0.0
        return seconds

    def is_settled(self, last_chunk: int) -> bool:
        """Return True if `poll(last_chunk)` has no broadcast to start or complete."""
        # A broadcast that only some ranks complete would hang the others.
        return self._has_ended or (self._request is None and self._next_chunk > last_chunk)

    def covers(self, data_step: int) -> bool:
        """Return True if the delivered plans cover all data steps before `data_step`."""
        return self._latest is not None and (self._planned_end >= data_step or self._latest.last)

    @property
    def _has_ended(self) -> bool:
        return self._latest is not None and self._latest.last

    def _post(self) -> CollectiveRequest | None:
        """Start the broadcast of the next plan; on rank 0, None while its weights are not known."""
        if self._comm.rank == 0:
            plan = self._next_plan() if self._resumed is None else self._resumed
            if plan is None:
                return None
            self._own_plan = plan
            if self._comm.size > 1:
                # The buffer is free: at most one broadcast is in progress.
                self._buffer[...] = plan.to_array()
        self._posted_s = time.perf_counter()
        return self._comm.Ibcast(self._buffer)

    def _next_plan(self) -> ChunkPlan | None:
        weights = self._weights_of(self._next_chunk)
        if weights is None:
            return None
        began = time.perf_counter()
        state = self._next_state()
        plan = self._planner_to_chunk_end(state).decide(state, weights)
        self.plan_s = time.perf_counter() - began
        self._new_plan_s += self.plan_s
        return plan

    def _next_state(self) -> PlannerState:
        """Return the state before the next plan, which every rank derives by itself.

        It is computed when the next plan is due, one chunk later: the reading thread has expanded the plan meanwhile.
        """
        if self._state.chunk < self._next_chunk and self._latest is not None:
            self._state = self._planner.after(self._latest)
        return self._state

    def _planner_to_chunk_end(self, state: PlannerState) -> Planner:
        """Return a planner for the remaining steps of the chunk: all of them, unless a run edit begins inside it."""
        steps_done = state.step % self._planner.chunk_steps
        if not steps_done:
            return self._planner
        return replace(self._planner, chunk_steps=self._planner.chunk_steps - steps_done)

    def _receive(self) -> ChunkPlan:
        self.broadcast_s = time.perf_counter() - self._posted_s
        plan = self._own_plan or self._received_plan()
        self._own_plan = self._resumed = None
        self._latest = plan
        self._next_chunk = plan.chunk + 1
        self._planned_end = plan.first_step + plan.num_steps
        return plan

    def _received_plan(self) -> ChunkPlan:
        """Return the plan in the buffer."""
        plan = ChunkPlan.from_array(self._buffer)
        # Equal cursors show that all ranks agree.
        state = self._next_state()
        if plan.chunk != state.chunk or not np.array_equal(plan.cursors, state.cursors):
            raise CommError(
                f"Rank {self._comm.rank} received a plan of chunk {plan.chunk} that does not match its own state "
                f"before chunk {state.chunk}: ranks run different code or read different indexes.\n"
                "  Give all nodes the same installation and the same index.path."
            )
        return plan
