"""One rank serving batches, from a resume point to the end: what `DataPlane` does once it knows where to begin.

MPI is called from the trainer's thread only, inside these methods. Plans and reductions never block it: they are tested
when a batch is requested. Meanwhile the reading thread fills a bounded queue.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import hosts_of
from mixtera_hpc.config.batch_ramp import sizes_from
from mixtera_hpc.core.apportion import UNIT
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.batch_wait import POLL_S, BatchWait, describe_interrupt
from mixtera_hpc.dataplane.mixing.learning_event import LearningEvent
from mixtera_hpc.dataplane.mixing.loss_weights import LossWeights
from mixtera_hpc.dataplane.mixing.silence import SilenceWatch
from mixtera_hpc.dataplane.plane_state import PlaneState
from mixtera_hpc.dataplane.plans.delivered_plans import DeliveredPlans
from mixtera_hpc.dataplane.plans.mixture_feed import MixtureFeed
from mixtera_hpc.dataplane.plans.plan_broadcast import PlanBroadcaster
from mixtera_hpc.dataplane.reading.batches import Batch, check_shared_evenly
from mixtera_hpc.dataplane.reading.delivery.open_feed import open_feed
from mixtera_hpc.dataplane.reading.packing.agreed_micro_batches import agree_on_micro_batches
from mixtera_hpc.dataplane.recording.journal import AttemptSetup
from mixtera_hpc.dataplane.resources import PlaneResources
from mixtera_hpc.dataplane.resume.resume_point import ResumePoint, find_resume_point, share_resume_point
from mixtera_hpc.dataplane.step_results import StepResults
from mixtera_hpc.dataplane.steps.open_steps import RecordedPart
from mixtera_hpc.dataplane.steps.ready_agreement import OpenRequests, ReadyAgreement
from mixtera_hpc.dataplane.steps.step_ledger import StepLedger
from mixtera_hpc.dataplane.steps.trainer_steps import TrainerSteps
from mixtera_hpc.dataplane.watchdog.progress import WAIT, RankProgress
from mixtera_hpc.dataplane.watchdog.watchdog import Watchdog
from mixtera_hpc.dataplane.watchdog.watched_rank import WatchedRank

__all__ = ["Session", "start_session"]

ABANDON_S = 1.0
"""Seconds for which a failing rank waits for its reading thread."""

logger = logging.getLogger("mixtera_hpc")


def start_session(resources: PlaneResources, state: PlaneState | None) -> "Session":
    """Resume from `state`, or begin the run. **Collective.**

    Args:
        state: on rank 0 the state to resume from, or None to begin the run; None on the other ranks.

    Raises:
        ConfigError: the state belongs to a run with other settings, the ranks cannot share a batch of the coming steps
            evenly, or this process was forked.
    """
    resources.control.check_process()
    comm = resources.comm
    own = find_resume_point(resources.source, state, resources.recorder.run_edits()) if comm.rank == 0 else None
    start = share_resume_point(comm, own, resources.source.num_domains)
    num_groups = resources.batch_slice.num_groups
    check_shared_evenly(
        resources.source.config.dataplane,
        num_groups,
        f"{num_groups} data-parallel groups of ranks",
        first_step=start.stream_version.data_step(start.step),
    )
    return Session(resources, start, state)


class Session:
    """Serves the batches of one rank. Every rank makes the same calls in the same order."""

    def __init__(self, resources: PlaneResources, start: ResumePoint, state: PlaneState | None) -> None:
        """Begin to serve at `start`. **Collective.**"""
        # Run edits may have changed how steps and positions are counted.
        self._source = resources.source.at_version(start.stream_version)
        self._comm = resources.comm
        self._control = resources.control
        self._recorder = resources.recorder

        source = self._source
        num_fed = state.num_fed if state is not None else 0
        self._ledger = StepLedger.at_resume(source.stream_version, source.planner.chunk_steps, start, num_fed)
        # Only rank 0 computes weights; the others receive plans.
        is_root = self._comm.rank == 0
        decisions = self._recorder.decisions() if is_root else []
        self._mixture = MixtureFeed(source, self._ledger, state, decisions, learn=is_root)
        self._plans = PlanBroadcaster(self._comm, source.planner, self._mixture.weights_of, start.plan)
        self._delivered_plans = DeliveredPlans()
        """The plans from the chunk of the oldest step that may be unfinished."""
        self._silence = SilenceWatch(source.config, self._comm.rank)
        self._results = StepResults(self._comm.rank, self._mixture, self._silence, self._recorder)
        self._steps = TrainerSteps(resources, source, self._ledger, self._results)
        self._first_step = start.step
        self._loss_weights = LossWeights(source.config.mixture, source.num_domains)
        self.is_stopping = False
        """True if the trainer was told to save and leave."""
        self.is_interrupted = False
        """True if the last request for a batch was ended by a request to save or stop."""
        self.pauses_to_save = False
        """True if requests to save end a long wait for a batch; equal on all ranks."""
        self.data_wait_s = 0.0
        """Seconds that the trainer waited for the last batch."""

        self._record_start(resources)
        self._mixture.answer_request(self._control, self._recorder, self._plans.next_chunk)
        agreement = ReadyAgreement(self._comm, start.step)
        # Last, so that no thread or process is left behind if the above fails.
        self._feed = open_feed(source, resources.batch_slice, resources.group, self._comm.local_size)
        self._progress = RankProgress(self._feed.places)
        self._watchdog = Watchdog(self._progress, WatchedRank.of(resources))
        self._wait = BatchWait(self._feed, agreement, self._steps.flags, self._progress)

    @property
    def next_step(self) -> int:
        """The training step of the next batch."""
        return self._ledger.next_step

    @property
    def next_data_step(self) -> int:
        """The data step of the next batch."""
        return self._ledger.next_data_step

    @property
    def stages_to_come(self) -> dict[str, int]:
        """Sizes of the global batches from the next one on, by the keys that set them."""
        return sizes_from(self._source.config.dataplane, self.next_data_step)

    @property
    def weights(self) -> NDArray[np.float64]:
        """Weights of the current chunk, shape (K,); zeros before the first batch."""
        if self.next_step == self._first_step:
            return np.zeros(self._source.num_domains)
        return self._delivered_plans.of_chunk(self._ledger.current_chunk).weights / UNIT

    def next_batch(self) -> Batch | None:
        """Start the reductions of finished steps and return the next batch. **Collective.**

        Returns:
            None at the end, or if all ranks end a long wait because of a request; see `is_interrupted`.

        Raises:
            ValueError: the trainer holds too many batches that are not finished.
        """
        self._control.check_process()
        if self.is_interrupted and self.is_stopping:
            return None
        self.is_interrupted = False
        # At its end, the trainer's stage begins again.
        with self._progress.in_stage("reduce"):
            self._mixture.answer_request(self._control, self._recorder, self._plans.next_chunk)
            self._steps.reduce_at_request()
            self._progress.enter_stage(WAIT)
            began = time.perf_counter()
            has_unfinished = self._steps.has_unfinished
            batch = self._wait.next(self.next_step, has_unfinished, self._poll, self.pauses_to_save)
            self.data_wait_s = time.perf_counter() - began
        if batch is None:
            return None
        if isinstance(batch, OpenRequests):
            self._interrupt(batch)
            return None

        batch = agree_on_micro_batches(self._comm, self._source.config.dataplane, self._loss_weights.apply(batch))
        # Also after a resume inside a chunk: metrics then show its mixture again.
        if batch.chunk != self._ledger.current_chunk:
            self._enter_chunk(batch.chunk)
        self._steps.add(batch, self._times_of(batch))
        self._progress.step = batch.step
        self._ledger.serve(batch.step, batch.chunk)
        self._recorder.record_batch(batch, self.data_wait_s)
        self._wait.advance(self.next_step)
        return batch

    def record(self, batch: Batch | Mapping[str, Any], loss: Any, part: RecordedPart) -> None:
        """Add losses of an open step; see `DataPlane.record`."""
        self._steps.record(batch, loss, part)
        self._wait.advance(self.next_step)
        self._progress.changes += 1

    def finish_step(self, batch: Batch | Mapping[str, Any]) -> None:
        """Finish the step of a batch and those before it; see `DataPlane.finish`."""
        self._steps.finish(batch)

    def feed_held_out(self, statistics: DomainStatistics) -> None:
        """Take the held-out losses after `statistics.step` steps, for a mixing algorithm that learns from them."""
        self._silence.note_held_out()
        if self._comm.rank == 0:
            self._mixture.feed_held_out(statistics)

    def expect_loader(self) -> None:
        """Refuse to guess which batches are finished: a loader may ask for batches ahead of the trainer."""
        self._steps.is_read_by_loader = True

    def stop_requested(self) -> bool:
        """Return whether all ranks should save and leave now. **Collective.**"""
        with self._progress.in_stage("reduce"):
            self._wait.advance(self.next_step)
            self.is_stopping = self._steps.stop_requested()
        return self.is_stopping

    def save_requested(self) -> bool:
        """Return whether all ranks should save and continue, once for every request. **Collective.**"""
        with self._progress.in_stage("reduce"):
            self._wait.advance(self.next_step)
            return self._steps.save_requested()

    def completed_statistics(self) -> list[DomainStatistics]:
        """Return the statistics of the steps that were completed since the last call, in order."""
        return self._results.take_statistics()

    def state(self) -> PlaneState | None:
        """Return the state after the last finished step on rank 0, None elsewhere. **Collective.**

        Raises:
            ConfigError: a loader reads the batches, and no rank has said which steps are finished.
        """
        with self._progress.in_stage("reduce"):
            next_step = self._steps.reduce_finished(is_end=False)
        # The state must hold the plan of the next step, or show that the steps before it were all planned.
        data_step = self._source.stream_version.data_step(next_step)
        # On every rank: the broadcast of a plan may complete on rank 0 only when the others take part.
        with self._progress.in_stage("broadcast"):
            self._poll_plans_until(lambda: self._plans.covers(data_step))
        if self._comm.rank != 0:
            return None
        return PlaneState(
            next_step=next_step,
            plan=self._delivered_plans.of_step(data_step),
            mixer=self._mixture.arrays(),
            num_fed=self._ledger.num_fed,
            decisions=self._mixture.decisions,
            stream_version=self._source.stream_version,
            identity=self._source.identity(),
        )

    def finish(self) -> int:
        """Complete everything that other ranks may wait for; return one past the last finished step. **Collective.**"""
        with self._progress.in_stage("close"):
            next_step = self._steps.complete()
            self._poll_plans_until(lambda: self._plans.is_settled(self._ledger.last_chunk_to_plan))
            self._wait.finish()
            return next_step

    def close(self, orderly: bool) -> None:
        """Stop the threads; a rank that fails (not `orderly`) does not wait long for a read in progress."""
        # The thread may be inside a read that a broken file system never answers.
        with self._progress.in_stage("close"):
            self._feed.close(timeout_s=ABANDON_S if self.is_interrupted or not orderly else None)
        self._watchdog.close()
        self._mixture.close()

    def _record_start(self, resources: PlaneResources) -> None:
        """Write to the journal what this attempt serves, and in which layout of ranks."""
        self._recorder.record_start(
            AttemptSetup(
                first_step=self._first_step,
                num_ranks=self._comm.size,
                model_parallel_size=self._comm.size // resources.batch_slice.num_groups,
                data_parallel_ranks=resources.data_parallel_ranks,
                identity=self._source.identity(),
                stream_version=self._source.stream_version,
            )
        )
        self._recorder.log_attempt(self._source, self._comm, self._first_step)
        self._recorder.log_hosts(hosts_of(self._comm), self._first_step)

    def _poll(self) -> bool:
        """Drive reductions and plans; return True if the next step is planned."""
        self._steps.poll()
        self._poll_plans()
        return self._plans.covers(self._ledger.next_data_step + 1)

    def _times_of(self, batch: Batch) -> Mapping[str, float]:
        """Return the seconds that each stage took for a batch that was just received."""
        return self._wait.times_of(batch, self._plans.take_plan_s(), self._results.take_reduce_s(), self._comm.rank)

    def _interrupt(self, requests: OpenRequests) -> None:
        """Answer requests that have ended the wait of all ranks."""
        self.is_interrupted = True
        self.is_stopping |= requests.stop
        self._steps.interrupt(requests)
        if self._comm.rank == 0:
            logger.warning(describe_interrupt(requests, self.next_step, self.data_wait_s))

    def _poll_plans(self) -> None:
        """Drive the broadcast of the next plan, and hand a plan that arrives to the reading thread."""
        plan = self._plans.poll(self._ledger.last_chunk_to_plan)
        if plan is not None:
            self._delivered_plans.add(plan)
            self._recorder.record_plan(plan)
            if plan.last:
                self._recorder.log_data_end(plan, self._source)
            self._feed.submit(plan, self.next_step)

    def _poll_plans_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._poll_plans()
            time.sleep(POLL_S)

    def _enter_chunk(self, chunk: int) -> None:
        """Forget the plans of earlier chunks, and log the one that begins."""
        # The plans of steps that may be unfinished stay: a state may still need them.
        oldest = max(self.next_step - 1 - self._steps.max_unfinished, self._first_step)
        self._delivered_plans.forget_before(chunk, self._source.stream_version.data_step(oldest))
        plan = self._delivered_plans.of_chunk(chunk)
        is_root = self._comm.rank == 0
        learning = LearningEvent(
            hears_losses=self._silence.enter_chunk(),
            described=self._mixture.description_of(chunk) if is_root else {},
            problem=self._mixture.problem if is_root else None,
        )
        self._recorder.log_chunk(plan, self._source, self._plans.plan_s, self._plans.broadcast_s, learning)
