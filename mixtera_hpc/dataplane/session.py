"""One rank serving batches, from a resume point to the end: what `DataPlane` does once it knows where to begin.

MPI is called from the trainer's thread only, inside these methods. Plans and reductions never block it: they are tested
when a batch is asked for. The reading thread fills a bounded queue meanwhile.
"""

import logging
import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.core.planner import ChunkPlan
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.control import RunControl
from mixtera_hpc.dataplane.journal import AttemptSetup
from mixtera_hpc.dataplane.mixture_feed import MixtureFeed
from mixtera_hpc.dataplane.plan_broadcast import PlanBroadcaster
from mixtera_hpc.dataplane.plane_state import PlaneState
from mixtera_hpc.dataplane.reading.batches import Batch, BatchSlice
from mixtera_hpc.dataplane.reading.prefetcher import Prefetcher
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.workers import open_batch_source
from mixtera_hpc.dataplane.resume.resume_point import ResumePoint, find_resume_point, share_resume_point
from mixtera_hpc.dataplane.run_recorder import RunRecorder
from mixtera_hpc.dataplane.step_ledger import StepLedger
from mixtera_hpc.dataplane.step_losses import StepLosses
from mixtera_hpc.dataplane.step_reducer import AgreedRequests, RankFlags, StepReducer, StepResult

__all__ = ["PlaneResources", "Session", "initial_state", "start_session"]

POLL_S = 5e-4
"""How often plans and reductions are tested while this rank waits for data."""

MAX_UNREAD_STATISTICS = 1024
"""Statistics kept for a trainer that does not ask for them; the newest ones."""

ABANDON_S = 1.0
"""How long a failing rank waits for its reading thread."""

logger = logging.getLogger("mixtera_hpc")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneResources:
    """What a data plane holds from `open` to `close`."""

    source: Source
    """The data, as the configuration describes it; the session serves the version of its resume point."""
    comm: Communicator
    batch_slice: BatchSlice
    control: RunControl
    recorder: RunRecorder


def start_session(resources: PlaneResources, state: PlaneState | None) -> "Session":
    """Resume from `state`, or begin the run. **Collective.**

    Args:
        state: on rank 0 the state to resume from, or None to begin the run; None on the other ranks.

    Raises:
        ConfigError: the state belongs to a run with other settings.
    """
    own: ResumePoint | None = None
    if resources.comm.rank == 0:
        own = find_resume_point(resources.source, state, resources.recorder.run_edits())
    start = share_resume_point(resources.comm, own, resources.source.num_domains)
    return Session(resources, start, state)


def initial_state(resources: PlaneResources) -> PlaneState:
    """Return the state that a run begins with; rank 0 only.

    It has the format of any other state, but no algorithm state: a mixing algorithm begins with its prior.
    """
    source = resources.source
    start = find_resume_point(source, None, resources.recorder.run_edits())
    return PlaneState(
        next_step=start.step,
        plan=start.plan,
        mixer={},
        num_fed=0,
        decisions=[],
        stream_version=start.stream_version,
        identity=source.identity(),
    )


class Session:
    """Serves the batches of one rank. Every rank makes the same calls in the same order."""

    def __init__(self, resources: PlaneResources, start: ResumePoint, state: PlaneState | None) -> None:
        """Begin to serve at `start`. **Collective.**"""
        # Run edits may have changed how steps and positions are counted.
        self._source = resources.source.at_version(start.stream_version)
        self._comm = resources.comm
        self._slice = resources.batch_slice
        self._control = resources.control
        self._recorder = resources.recorder

        source = self._source
        plane = source.config.dataplane
        self.ledger = _ledger_at(source, start, num_fed=state.num_fed if state is not None else 0)
        # Only rank 0 computes weights; the others receive plans.
        decisions = self._recorder.decisions() if self._comm.rank == 0 else []
        self._mixture = MixtureFeed(source, self.ledger, state, decisions)
        self._plans = PlanBroadcaster(self._comm, source.planner, self._mixture.weights_of, start.plan)
        self._reducer = StepReducer(self._comm, source.num_domains)

        self._current_batch: Batch | None = None
        """The batch that is being trained on; None once its step was closed."""
        self._losses = StepLosses(source.num_domains)
        self._requests = AgreedRequests()
        self._completed: deque[DomainStatistics] = deque(maxlen=MAX_UNREAD_STATISTICS)
        self._delivered_plans: dict[int, ChunkPlan] = {}
        """Chunk → plan, from the current chunk on."""
        self.data_wait_s = 0.0
        """Seconds that the trainer waited for the last batch."""

        self._recorder.record_start(
            AttemptSetup(
                first_step=start.step,
                num_ranks=self._comm.size,
                model_parallel_size=plane.model_parallel_size,
                identity=source.identity(),
                stream_version=source.stream_version,
            )
        )
        self._poll_mixture_request()
        # Last, so that no thread or process is left behind if the above fails.
        self._prefetcher = Prefetcher(open_batch_source(source, self._slice), plane.prefetch_batches)

    def next_batch(self) -> Batch | None:
        """Close the current step and return the next batch; None after the end of the data. **Collective.**"""
        self._close_step()
        began = time.perf_counter()
        batch = self._wait_for_batch()
        self.data_wait_s = time.perf_counter() - began
        if batch is None:
            return None

        # Also after a resume inside a chunk: metrics then show its mixture again.
        if batch.chunk != self.ledger.current_chunk:
            self._enter_chunk(batch.chunk)
        self._current_batch = batch
        self.ledger.serve(batch.step, batch.chunk)
        self._recorder.record_batch(batch)
        return batch

    def record(self, batch: Batch, loss_per_token: Any, rows: slice) -> None:
        """Add losses of the current step; see `DataPlane.record`."""
        if self._current_batch is None or batch.step != self._current_batch.step:
            raise ValueError(f"record() was given step {batch.step}, which is not the step that is being trained on.")
        self._losses.add(batch, loss_per_token, rows)

    def stop_requested(self) -> bool:
        """Return whether all ranks should save and leave now. **Collective.**"""
        self._agree()
        return self._requests.stop_by(self.ledger.last_common_step)

    def save_requested(self) -> bool:
        """Return whether all ranks should save and continue, once for every request. **Collective.**"""
        self._agree()
        return self._requests.take_save_by(self.ledger.last_common_step)

    def completed_statistics(self) -> list[DomainStatistics]:
        """Return the statistics of the steps that were completed since the last call, in order."""
        completed = list(self._completed)
        self._completed.clear()
        return completed

    def state(self) -> PlaneState | None:
        """Close the current step and return the state after it on rank 0, None elsewhere. **Collective.**"""
        self._close_all_steps()
        if self._comm.rank != 0:
            return None
        # The state must hold the plan of the next step, or show that the steps before it were all planned.
        self._poll_plans_until(lambda: self._plans.covers(self.ledger.next_data_step))
        return PlaneState(
            next_step=self.ledger.next_step,
            plan=self._plan_of_next_step(),
            mixer=self._mixture.arrays(),
            num_fed=self.ledger.num_fed,
            decisions=self._mixture.decisions,
            stream_version=self._source.stream_version,
            identity=self._source.identity(),
        )

    def finish(self) -> None:
        """Close the current step and complete everything that other ranks may wait for. **Collective.**"""
        self._close_all_steps()
        self._poll_plans_until(lambda: self._plans.is_settled(self.ledger.last_chunk_to_plan))

    def close(self, orderly: bool) -> None:
        """Stop the threads; a rank that fails (not `orderly`) does not wait long for a read in progress."""
        # The thread may be inside a read that a broken file system never answers.
        self._prefetcher.close(timeout_s=None if orderly else ABANDON_S)
        self._mixture.close()

    def _wait_for_batch(self) -> Batch | None:
        while True:
            # First the statistics: the weights of the next chunk may wait for them.
            self._apply_reductions(self._reducer.poll())
            self._poll_plans()
            try:
                # Waits in the queue, so that the reading thread gets the interpreter.
                return self._prefetcher.get(POLL_S)
            except queue.Empty:
                continue

    def _poll_plans(self) -> None:
        """Drive the broadcast of the next plan, and hand a plan that arrives to the reading thread."""
        plan = self._plans.poll(self.ledger.last_chunk_to_plan)
        if plan is not None:
            self._delivered_plans[plan.chunk] = plan
            self._recorder.record_plan(plan)
            self._prefetcher.submit(plan, self.ledger.next_step)

    def _poll_plans_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._poll_plans()
            time.sleep(POLL_S)

    def _enter_chunk(self, chunk: int) -> None:
        """Forget the plans of earlier chunks, and log the one that begins."""
        # The plan of the current chunk stays: a state may still need it.
        self._delivered_plans = {number: plan for number, plan in self._delivered_plans.items() if number >= chunk}
        plan = self._delivered_plans[chunk]
        self._recorder.log_chunk(plan, self._source, self._plans.plan_s, self._plans.broadcast_s)

    def _plan_of_next_step(self) -> ChunkPlan:
        """Return the plan that the next step lies in, or the last one before it when that is not planned yet."""
        data_step = self.ledger.next_data_step
        plans = [plan for _, plan in sorted(self._delivered_plans.items())]
        for plan in plans:
            if plan.first_step <= data_step < plan.first_step + plan.num_steps:
                return plan
        # Rank 0 has delivered all plans before the next step, see `state`; the last one says where to go on.
        return plans[-1]

    def _close_step(self) -> None:
        """Start the reduction of the step that was being trained on."""
        batch = self._current_batch
        if batch is None:
            return
        # Requests are looked for once per step, whether or not the trainer asks about them.
        self._current_batch = None
        self._poll_mixture_request()
        stop, save = self._control.poll()
        sums = self._losses.take(batch)
        # All ranks of a group record the same sequences; each must be counted once.
        if not self._slice.is_group_leader:
            sums = np.zeros_like(sums)
        self._reducer.post(batch.step, sums, RankFlags(stop=stop, save=save, digest=batch.plan_digest))

    def _close_all_steps(self) -> None:
        """Close the current step and wait for all reductions."""
        self._close_step()
        self._apply_reductions(self._reducer.wait_for(self.ledger.current_step))

    def _agree(self) -> None:
        """Wait for the requests of the newest step that all ranks reduce. Leaves the current step open."""
        self._apply_reductions(self._reducer.wait_for(self.ledger.last_common_step))

    def _apply_reductions(self, results: list[StepResult]) -> None:
        for result in results:
            # Results arrive in order of steps, which the mixing algorithm relies on.
            self._requests.add(result)
            if self._comm.rank == 0:
                self._mixture.feed(result.statistics)
            self._completed.append(result.statistics)
            self._recorder.log_reduction(result.statistics.step, result.reduce_s)

    def _poll_mixture_request(self) -> None:
        """Decide on a request for another mixture, if there is one; only rank 0 sees requests."""
        request = self._control.take_mixture_request()
        if request is None:
            return
        decision = self._mixture.decide(request, self._plans.next_chunk)
        self._recorder.record_decision(decision)
        if decision.refused is None:
            logger.info("Another mixture was requested; it holds from chunk %d on.", decision.chunk)
        else:
            logger.warning("The request for another mixture was refused: %s", decision.refused)


def _ledger_at(source: Source, start: ResumePoint, num_fed: int) -> StepLedger:
    """Return the ledger of a rank that continues at `start`."""
    version = source.stream_version
    plan = start.plan
    is_served = plan.num_steps > 0 and version.data_step(start.step) >= plan.first_step + plan.num_steps
    return StepLedger(
        version,
        source.planner.chunk_steps,
        next_step=start.step,
        current_chunk=plan.chunk if is_served else plan.chunk - 1,
        num_fed=num_fed,
    )
