"""One rank serving batches, from a resume point to the end: what `DataPlane` does once it knows where to begin.

MPI is called from the trainer's thread only, inside these methods. Plans and reductions never block it: they are tested
when a batch is requested. Meanwhile the reading thread fills a bounded queue.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import hosts_of
from mixtera_hpc.core.apportion import UNIT
from mixtera_hpc.core.planner import ChunkPlan
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.batch_wait import POLL_S, BatchWait, describe_interrupt
from mixtera_hpc.dataplane.journal import AttemptSetup
from mixtera_hpc.dataplane.mixing.learning_event import LearningEvent
from mixtera_hpc.dataplane.mixing.loss_weights import LossWeights
from mixtera_hpc.dataplane.mixing.silence import SilenceWatch
from mixtera_hpc.dataplane.mixture_feed import MixtureFeed
from mixtera_hpc.dataplane.plan_broadcast import PlanBroadcaster
from mixtera_hpc.dataplane.plane_state import PlaneState
from mixtera_hpc.dataplane.reading.batches import Batch, positions_of, step_of
from mixtera_hpc.dataplane.reading.group_delivery import open_feed
from mixtera_hpc.dataplane.reading.packing.agreed_micro_batches import agree_on_micro_batches
from mixtera_hpc.dataplane.resources import PlaneResources
from mixtera_hpc.dataplane.resume.resume_point import ResumePoint, find_resume_point, share_resume_point
from mixtera_hpc.dataplane.steps.flag_exchange import AgreedRequests, FlagExchange
from mixtera_hpc.dataplane.steps.open_steps import OpenSteps, RecordedPart, unknown_progress_error
from mixtera_hpc.dataplane.steps.ready_agreement import NO_LIMIT, OpenRequests, ReadyAgreement
from mixtera_hpc.dataplane.steps.step_ledger import StepLedger
from mixtera_hpc.dataplane.steps.step_reducer import StepReducer, StepResult
from mixtera_hpc.dataplane.watchdog.progress import WAIT, RankProgress
from mixtera_hpc.dataplane.watchdog.watchdog import Watchdog, WatchedRank

__all__ = ["Session", "start_session"]

MAX_UNREAD_STATISTICS = 1024
"""Statistics kept for a trainer that does not ask for them; the newest ones."""

NO_SAY = int(np.iinfo(np.int64).max)
"""Stands for the last finished step of a rank whose trainer names no steps; larger than every step."""

ABANDON_S = 1.0
"""Seconds for which a failing rank waits for its reading thread."""

logger = logging.getLogger("mixtera_hpc")


def start_session(resources: PlaneResources, state: PlaneState | None) -> "Session":
    """Resume from `state`, or begin the run. **Collective.**

    Args:
        state: on rank 0 the state to resume from, or None to begin the run; None on the other ranks.

    Raises:
        ConfigError: the state belongs to a run with other settings, or this process was forked.
    """
    resources.control.check_process()
    comm = resources.comm
    own = find_resume_point(resources.source, state, resources.recorder.run_edits()) if comm.rank == 0 else None
    start = share_resume_point(comm, own, resources.source.num_domains)
    return Session(resources, start, state)


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
        num_fed = state.num_fed if state is not None else 0
        self.ledger = StepLedger.at_resume(source.stream_version, source.planner.chunk_steps, start, num_fed)
        # Only rank 0 computes weights; the others receive plans.
        decisions = self._recorder.decisions() if self._comm.rank == 0 else []
        self._mixture = MixtureFeed(source, self.ledger, state, decisions, learn=self._comm.rank == 0)
        self._plans = PlanBroadcaster(self._comm, source.planner, self._mixture.weights_of, start.plan)
        parts = resources.parts
        losses_of = (parts, self._recorder.loss_log, plane.scalars)
        self._reducer = StepReducer(self._comm, source.num_domains, source.batch_size_of, self._slice, *losses_of)

        self._max_unfinished = (plane.feedback_lag - 1) * plane.chunk_steps
        """Batches that a trainer may hold: with more, the losses that the next plan needs could not arrive."""
        num_parts = 1 if parts is None else parts.num_parts
        self._steps = OpenSteps(source.num_domains, self._max_unfinished, num_parts, plane.scalars)
        self._flags = FlagExchange(self._comm, self._control, start.step + self._steps.max_undecided + 1)
        self._requests = AgreedRequests()
        self._first_step = start.step
        self._is_read_by_loader = False
        self._loss_weights = LossWeights(source.config.mixture, source.num_domains)
        self._silence = SilenceWatch(source.config, self._comm.rank)
        self._completed: deque[DomainStatistics] = deque(maxlen=MAX_UNREAD_STATISTICS)
        self._delivered_plans: dict[int, ChunkPlan] = {}
        """Chunk → plan, from the chunk of the oldest step that may be unfinished on."""
        self.is_stopping = False
        """True if the trainer was told to save and leave."""
        self.is_interrupted = False
        """True if the last request for a batch was ended by a request to save or stop."""
        self.pauses_to_save = False
        """True if requests to save end a long wait for a batch; equal on all ranks."""
        self.data_wait_s = 0.0
        """Seconds that the trainer waited for the last batch."""
        self._planned_end = 0  # One past the last data step of the plans that have arrived.

        self._record_start(resources.data_parallel_ranks)
        self._mixture.answer_request(self._control, self._recorder, self._plans.next_chunk)
        agreement = ReadyAgreement(self._comm, start.step)
        # Last, so that no thread or process is left behind if the above fails.
        self._feed = open_feed(source, self._slice, resources.group, self._comm.local_size)
        self._progress = RankProgress(self._feed.places)
        self._watchdog = Watchdog(self._progress, WatchedRank.of(resources))
        self._wait = BatchWait(self._feed, agreement, self._flags, self._progress)

    @property
    def weights(self) -> NDArray[np.float64]:
        """Weights of the current chunk, shape (K,); zeros before the first batch."""
        plan = (
            self._delivered_plans.get(self.ledger.current_chunk) if self.ledger.next_step > self._first_step else None
        )
        return np.zeros(self._source.num_domains) if plan is None else plan.weights / UNIT

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
            self._prepare_request()
            self._progress.enter_stage(WAIT)
            began = time.perf_counter()
            batch = self._wait.next(self.ledger.next_step, len(self._steps) > 0, self._poll, self.pauses_to_save)
            self.data_wait_s = time.perf_counter() - began
        if batch is None:
            return None
        if isinstance(batch, OpenRequests):
            self._interrupt(batch)
            return None

        batch = agree_on_micro_batches(self._comm, self._source.config.dataplane, self._loss_weights.apply(batch))
        # Also after a resume inside a chunk: metrics then show its mixture again.
        if batch.chunk != self.ledger.current_chunk:
            self._enter_chunk(batch.chunk)
        self._steps.add(batch, self._wait.times_of(batch, self._plans.take_plan_s(), self._comm.rank))
        self._progress.step = batch.step
        self.ledger.serve(batch.step, batch.chunk)
        self._recorder.record_batch(batch, self.data_wait_s)
        self._wait.advance(self.ledger.next_step)
        return batch

    def record(self, batch: Batch | Mapping[str, Any], loss: Any, part: RecordedPart) -> None:
        """Add losses of an open step; see `DataPlane.record`."""
        step = self._steps.named(step_of(batch), "record")
        rows = step.losses.rows_at(positions_of(batch), part.rows)
        if part.scalars:
            step.scalars.add(part.scalars, rows, step.number)
        step.losses.add(loss, rows, part.tokens, part.num_tokens)
        self._reducer.advance()
        self._wait.advance(self.ledger.next_step)
        self._progress.changes += 1

    def finish_step(self, step: int) -> None:
        """Finish an open step and those before it; see `DataPlane.finish`."""
        self._steps.named(step, "finish").was_finished_by_name = True

    def feed_held_out(self, statistics: DomainStatistics) -> None:
        """Take the held-out losses after `statistics.step` steps, for a mixing algorithm that learns from them."""
        self._silence.note_held_out()
        if self._comm.rank == 0:
            self._mixture.feed_held_out(statistics)

    def expect_loader(self) -> None:
        """Refuse to guess which batches are finished: a loader may ask for batches ahead of the trainer."""
        self._is_read_by_loader = True

    def stop_requested(self) -> bool:
        """Return whether all ranks should save and leave now. **Collective.**"""
        with self._progress.in_stage("reduce"):
            self.is_stopping = self._requests.stop_by(self._agree())
        return self.is_stopping

    def save_requested(self) -> bool:
        """Return whether all ranks should save and continue, once for every request. **Collective.**"""
        with self._progress.in_stage("reduce"):
            is_due = self._requests.take_save_by(self._agree())
        if is_due:
            self._flags.note_saved()
        return is_due

    def completed_statistics(self) -> list[DomainStatistics]:
        """Return the statistics of the steps that were completed since the last call, in order."""
        completed = list(self._completed)
        self._completed.clear()
        return completed

    def state(self) -> PlaneState | None:
        """Return the state after the last finished step on rank 0, None elsewhere. **Collective.**

        Raises:
            ConfigError: a loader reads the batches, and no rank has said which steps are finished.
        """
        with self._progress.in_stage("reduce"):
            next_step = self._reduce_finished(is_end=False)
        # The state must hold the plan of the next step, or show that the steps before it were all planned.
        data_step = self._source.stream_version.data_step(next_step)
        # On every rank: the broadcast of a plan may complete on rank 0 only when the others take part.
        with self._progress.in_stage("broadcast"):
            self._poll_plans_until(lambda: self._plans.covers(data_step))
        if self._comm.rank != 0:
            return None
        return PlaneState(
            next_step=next_step,
            plan=self._plan_of(data_step),
            mixer=self._mixture.arrays(),
            num_fed=self.ledger.num_fed,
            decisions=self._mixture.decisions,
            stream_version=self._source.stream_version,
            identity=self._source.identity(),
        )

    def finish(self) -> int:
        """Complete everything that other ranks may wait for; return one past the last finished step. **Collective.**"""
        with self._progress.in_stage("close"):
            return self._finish()

    def _finish(self) -> int:
        next_step = self._reduce_finished(is_end=True)
        # All ranks were handed the same batches. Their reductions must end, although nobody uses the results.
        self._post_before(self.ledger.next_step, unfinished_from=next_step)
        self._apply_reductions(self._reducer.drain(), log_before=next_step)
        self._poll_plans_until(lambda: self._plans.is_settled(self.ledger.last_chunk_to_plan))
        self._wait.finish()
        return next_step

    def close(self, orderly: bool) -> None:
        """Stop the threads; a rank that fails (not `orderly`) does not wait long for a read in progress."""
        # The thread may be inside a read that a broken file system never answers.
        with self._progress.in_stage("close"):
            self._feed.close(timeout_s=ABANDON_S if self.is_interrupted or not orderly else None)
        self._watchdog.close()
        self._mixture.close()

    def _record_start(self, data_parallel_ranks: Sequence[int] | None) -> None:
        """Write to the journal what this attempt serves, and in which layout of ranks."""
        self._recorder.record_start(
            AttemptSetup(
                first_step=self._first_step,
                num_ranks=self._comm.size,
                model_parallel_size=self._comm.size // self._slice.num_groups,
                data_parallel_ranks=data_parallel_ranks,
                identity=self._source.identity(),
                stream_version=self._source.stream_version,
            )
        )
        self._recorder.log_attempt(self._source, self._comm, self._first_step)
        self._recorder.log_hosts(hosts_of(self._comm), self._first_step)

    def _poll(self) -> bool:
        self._apply_reductions(self._reducer.poll())
        self._poll_plans()
        return self.ledger.next_data_step < self._planned_end

    def _interrupt(self, requests: OpenRequests) -> None:
        """Answer requests that have ended the wait of all ranks."""
        self.is_interrupted = True
        self.is_stopping |= requests.stop
        self._requests.interrupt(self._first_step, stop=requests.stop, save=requests.save)
        self._flags.answer_saves()
        if self._comm.rank == 0:
            logger.warning(describe_interrupt(requests, self.ledger.next_step, self.data_wait_s))

    def _poll_plans(self) -> None:
        """Drive the broadcast of the next plan, and hand a plan that arrives to the reading thread."""
        plan = self._plans.poll(self.ledger.last_chunk_to_plan)
        if plan is not None:
            self._delivered_plans[plan.chunk] = plan
            self._planned_end = NO_LIMIT if plan.last else plan.first_step + plan.num_steps
            self._recorder.record_plan(plan)
            if plan.last:
                self._recorder.log_data_end(plan, self._source)
            self._feed.submit(plan, self.ledger.next_step)

    def _poll_plans_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._poll_plans()
            time.sleep(POLL_S)

    def _enter_chunk(self, chunk: int) -> None:
        """Forget the plans of earlier chunks, and log the one that begins."""
        # The plans of steps that may be unfinished stay: a state may still need them.
        oldest = max(self.ledger.next_step - 1 - self._max_unfinished, self._first_step)
        first_needed = self._source.stream_version.data_step(oldest)
        self._delivered_plans = {
            number: plan
            for number, plan in self._delivered_plans.items()
            if number >= chunk or plan.first_step + plan.num_steps > first_needed
        }
        plan = self._delivered_plans[chunk]
        is_root = self._comm.rank == 0
        learning = LearningEvent(
            hears_losses=self._silence.enter_chunk(),
            described=self._mixture.description_of(chunk) if is_root else {},
            problem=self._mixture.problem if is_root else None,
        )
        self._recorder.log_chunk(plan, self._source, self._plans.plan_s, self._plans.broadcast_s, learning)

    def _plan_of(self, data_step: int) -> ChunkPlan:
        """Return the plan that a step lies in, or the last one before it when that is not planned yet."""
        plans = [plan for _, plan in sorted(self._delivered_plans.items())]
        for plan in plans:
            if plan.first_step <= data_step < plan.first_step + plan.num_steps:
                return plan
        # Rank 0 has delivered all plans before the step, see `state`; the last one says where to go on.
        return plans[-1]

    def _prepare_request(self) -> None:
        """Reduce the steps that are finished when the trainer asks for another batch. **Collective.**"""
        self._mixture.answer_request(self._control, self._recorder, self._plans.next_chunk)
        # Requests are looked for once per step, whether or not the trainer asks about them.
        self._flags.poll(self.ledger.current_step)
        self._post_before(self._steps.end_at_request(self.ledger.next_step))
        self._steps.note_request(self._source.config.dataplane, self._max_unfinished)
        # Every rank has at most so many unfinished batches here, and has started the reductions before them.
        self._apply_reductions(self._reducer.wait_for(self.ledger.current_step - self._max_unfinished - 1))

    def _post_before(self, end: int, unfinished_from: int | None = None) -> None:
        """Start the reductions of the open steps before `end`; from `unfinished_from` on without their losses."""
        for step in self._steps.take_before(end):
            stop, save = self._flags.take(step.number)
            is_counted = unfinished_from is None or step.number < unfinished_from
            flags = step.flags(stop, save)
            self._reducer.post_losses(step.number, step.losses, flags, is_counted=is_counted, scalars=step.scalars)

    def _reduce_finished(self, is_end: bool) -> int:
        """Agree on the last finished step, wait for its reduction, and return one past it. **Collective.**

        Ranks that call neither `record` nor `finish` have no say. If no rank calls them, every batch is finished.
        """
        handed_out = self.ledger.next_step
        own = self._steps.finished_end(handed_out) if self._steps.names_steps else NO_SAY
        agreed = int(self._comm.Allreduce(np.array([own], np.int64), "min")[0])
        if agreed == NO_SAY:
            if self._is_read_by_loader and not is_end and handed_out > self._first_step:
                raise unknown_progress_error()
            agreed = handed_out
        self._flags.poll(self.ledger.current_step)
        self._post_before(max(agreed, own) if self._steps.names_steps else agreed)
        self._apply_reductions(self._reducer.wait_for(agreed - 1))
        return agreed

    def _agree(self) -> int:
        """Return a step up to which all ranks know all requests; leave the current step open. **Collective.**"""
        self._wait.advance(self.ledger.next_step)
        if self._flags.are_early(self.ledger.current_step):
            self._flags.exchange_early(self._requests, self._first_step)
            return self._first_step
        look_ahead = self._flags.agreed_look_ahead(self._steps.look_ahead, self._requests, self._first_step)
        if self._steps.look_ahead > look_ahead:
            raise ValueError(
                f"The trainer held {self._steps.look_ahead} unfinished batches when it asked for another one, but "
                f"at most {look_ahead} before its first stop_requested() or save_requested().\n"
                "  Finish the batches of a step before you ask about requests."
            )
        newest = self.ledger.last_common_step - look_ahead
        self._apply_reductions(self._reducer.wait_for(newest))
        return max(newest, self._first_step)

    def _apply_reductions(self, results: list[StepResult], log_before: int | None = None) -> None:
        """Pass results on; steps from `log_before` on are not logged, because a resume serves them again."""
        for result in results:
            # Results arrive in order of steps, which the mixing algorithm relies on.
            self._requests.add(result)
            self._wait.reduce_s += result.reduce_s or 0.0
            self._silence.note_losses(result.statistics)
            if self._comm.rank == 0:
                self._mixture.feed(result.statistics)
            self._completed.append(result.statistics)
            if log_before is None or result.statistics.step < log_before:
                self._recorder.log_reduction(result.statistics, result.reduce_s)
