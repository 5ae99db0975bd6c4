"""Chunk plans on their way from rank 0 to everybody: one broadcast of 24 bytes per domain per chunk, one chunk ahead.

Chunk c + 1 is planned and broadcast while chunk c is trained on. Rank 0 starts the broadcast when the weights of the chunk are
known; the others have posted theirs already. Nobody blocks: `poll` drives it, from the main thread only.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import CollectiveRequest, Communicator
from mixtera_hpc.core.planner import ChunkPlan, Planner, PlannerState
from mixtera_hpc.errors import CommError

__all__ = ["PlanBroadcaster"]


class PlanBroadcaster:
    """Delivers one `ChunkPlan` after the other, the same ones on every rank."""

    def __init__(
        self,
        comm: Communicator,
        planner: Planner,
        weights_of: Callable[[int], NDArray[np.float64] | None],
        deliver: Callable[[ChunkPlan], None],
    ) -> None:
        """
        Args:
            weights_of: the weights of a chunk, None while they are not known; asked on rank 0 only.
            deliver: called on every rank with each plan, in order.
        """
        self._comm = comm.Dup()
        self._planner = planner
        self._weights_of = weights_of
        self._deliver = deliver
        self._buffer = np.zeros(ChunkPlan.array_size(len(planner.capacity)), np.int64)
        self._request: CollectiveRequest | None = None
        self._posted_s = 0.0
        self._state = PlannerState.start(len(planner.capacity))
        self._resumed: ChunkPlan | None = None
        self.plan_s = 0.0
        """Seconds that rank 0 took for its last plan."""
        self.broadcast_s = 0.0
        """Seconds from posting the last broadcast to its completion on this rank."""
        self.latest: ChunkPlan | None = None
        """The plan delivered last."""

    def resume(self, plan: ChunkPlan) -> None:
        """Deliver `plan`, known on every rank, again, and go on after it; one of no steps only says where to go on."""
        self._state = PlannerState(chunk=plan.chunk, step=plan.first_step, cursors=plan.cursors, lags=plan.lags)
        self._resumed = plan if plan.num_steps or plan.last else None

    def poll(self, current_chunk: int) -> None:
        """Drive the broadcast of the next chunk, at most one beyond `current_chunk`."""
        if self._request is None and self._state.chunk <= current_chunk + 1 and not self._ended:
            self._request = self._post()
        if self._request is not None and self._request.Test():
            self._request = None
            self._receive()

    def settled(self, current_chunk: int) -> bool:
        """Whether `poll(current_chunk)` has nothing left to drive."""
        return self._ended or (self._request is None and self._state.chunk > current_chunk + 1)

    @property
    def next_chunk(self) -> int:
        """The first chunk that rank 0 has not planned yet."""
        return self._state.chunk + int(self._request is not None or self._resumed is not None)

    def reaches(self, step: int) -> bool:
        """Whether the plans delivered cover everything in front of `step`."""
        return self.latest is not None and (self._state.step >= step or self.latest.last)

    @property
    def _ended(self) -> bool:
        return self.latest is not None and self.latest.last

    def _post(self) -> CollectiveRequest | None:
        if self._comm.rank == 0:
            plan = self._next_plan()
            if plan is None:
                return None
            self._buffer[...] = plan.to_array()
        self._posted_s = time.perf_counter()
        return self._comm.Ibcast(self._buffer)

    def _next_plan(self) -> ChunkPlan | None:
        if self._resumed is not None:
            return self._resumed
        weights = self._weights_of(self._state.chunk)
        if weights is None:
            return None
        began = time.perf_counter()
        plan = self._to_next_border().decide(self._state, weights)
        self.plan_s = time.perf_counter() - began
        return plan

    def _to_next_border(self) -> Planner:
        """A planner for the steps that the chunk still has: all of them, unless planning begins inside it."""
        begun = self._state.step % self._planner.chunk_steps
        return replace(self._planner, chunk_steps=self._planner.chunk_steps - begun) if begun else self._planner

    def _receive(self) -> None:
        self.broadcast_s = time.perf_counter() - self._posted_s
        plan = ChunkPlan.from_array(self._buffer)
        if plan.chunk != self._state.chunk or not np.array_equal(plan.cursors, self._state.cursors):
            raise CommError(
                f"Rank {self._comm.rank} was sent chunk {plan.chunk} from other cursors than its own for chunk "
                f"{self._state.chunk}: ranks run different code or read different indexes.\n"
                "  Give all nodes the same installation and the same index.path."
            )
        self._resumed = None
        self._state = self._planner.after(plan)
        self.latest = plan
        self._deliver(plan)
