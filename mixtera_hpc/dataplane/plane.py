"""`DataPlane`: the whole public face for a training script.

    with DataPlane.open(config, comm=MPI.COMM_WORLD) as plane:
        for batch in plane:
            loss_per_token = train_step(batch)
            plane.record(batch, loss_per_token)
            if plane.stop_requested():
                save(plane.state_dict())
                break

Everything MPI happens in the caller's thread, inside these methods, and never blocks: requests are tested when a batch is
asked for. The reading thread fills a bounded queue meanwhile.
"""

import queue
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.comm.launcher import open_communicator
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.holdout import Split
from mixtera_hpc.core.planner import ChunkPlan
from mixtera_hpc.core.statistics import NUM_BUFFER_ROWS, DomainStatistics, statistics_from_buffer
from mixtera_hpc.dataplane.control import RunControl
from mixtera_hpc.dataplane.journal import AttemptStart
from mixtera_hpc.dataplane.mixing.sequence import MixtureSequence
from mixtera_hpc.dataplane.plan_broadcast import PlanBroadcaster
from mixtera_hpc.dataplane.plane_state import PlaneState
from mixtera_hpc.dataplane.reading.batches import Batch, BatchSlice
from mixtera_hpc.dataplane.reading.prefetcher import Prefetcher
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.dataplane.reading.workers import open_batch_source
from mixtera_hpc.dataplane.resume.resume_point import find_resume_point, share_resume_point
from mixtera_hpc.dataplane.resume.run_edits import subset_of_run
from mixtera_hpc.dataplane.run_recorder import RunRecorder
from mixtera_hpc.dataplane.step_losses import StepLosses
from mixtera_hpc.dataplane.step_reducer import RankFlags, StepReducer, StepResult
from mixtera_hpc.errors import is_clean_exit
from mixtera_hpc.track.tracker import NullTracker, Tracker

__all__ = ["Batch", "DataPlane"]

POLL_S = 5e-4

MAX_UNREAD = 1024
"""Statistics kept for a trainer that does not ask for them."""

ABANDON_S = 1.0
"""How long a failing rank waits for its reading thread."""


class DataPlane:
    """One rank's view of the data of a run. Every rank makes the same calls in the same order."""

    def __init__(self, source: Source, comm: Communicator, sinks: RunRecorder) -> None:
        """Use `DataPlane.open`."""
        config = source.config
        self._source = source
        self._comm = comm
        self._sinks = sinks
        self._share = BatchSlice.of(config.dataplane, comm.rank, comm.size)
        self._control = RunControl(sinks.control, watch_files=comm.rank == 0)
        self._mixer: MixtureSequence
        self._feedback = StepReducer(comm, source.num_domains)
        self._plans: PlanBroadcaster
        self._prefetcher: Prefetcher
        self._losses = StepLosses(source.num_domains)
        self._open_step: Batch | None = None
        self._next_step = 0
        self._current_chunk = -1
        self._known_plans: dict[int, ChunkPlan] = {}
        self._completed: deque[DomainStatistics] = deque(maxlen=MAX_UNREAD)
        self._first_stop: int | None = None
        self._saves: set[int] = set()
        self._reduced = 0
        self._fed = 0
        self._started = False
        self._ended = False
        self.data_wait_s = 0.0
        """Seconds that the last batch was waited for."""

    @classmethod
    def open(
        cls,
        config: Config,
        comm: Any = None,
        folder: RunFolder | None = None,
        attempt: int = 1,
        tracker: Tracker | None = None,
        split: Split = "train",
    ) -> Self:
        """Open the index and get ready to serve. **Collective.**

        Args:
            comm: a `Communicator` or an mpi4py communicator; None finds out how this process was started.
            folder: of the run; without one nothing is journalled.
            attempt: number of this attempt in the folder.
            tracker: where metric events go (rank 0).
            split: with `query.holdout`, which side is served.

        Raises:
            ConfigError: the global batch cannot be shared evenly by the ranks.
            PropertyIndexError: the index is missing, stale, or of another tokenizer.
            MixtureError: a domain of the mixture has no samples.
        """
        communicator = _communicator(config, comm)
        source = open_source(
            config, communicator, subset=subset_of_run(folder if communicator.rank == 0 else None, split)
        )
        return cls(
            source, communicator, RunRecorder(folder, attempt, communicator.rank, config, tracker or NullTracker())
        )

    @property
    def domain_names(self) -> list[str]:
        """What each domain is called, by domain_id."""
        return self._source.names

    @property
    def num_domains(self) -> int:
        return self._source.num_domains

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer; 0 without one."""
        return self._source.tokenizer.vocab_size if self._source.tokenizer else 0

    @property
    def local_batch_size(self) -> int:
        """Sequences in every batch of this rank."""
        return self._share.size

    @property
    def next_step(self) -> int:
        """The step of the next batch."""
        return self._next_step

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(orderly=error is None or is_clean_exit(error))

    def __iter__(self) -> Iterator[Batch]:
        """Batches until the data ends; every rank gets the same number. **Collective.**"""
        while (batch := self._next()) is not None:
            yield batch

    def record(self, batch: Batch, loss_per_token: Any, rows: slice = slice(None)) -> None:
        """Add losses of `batch` to its step's statistics.

        Args:
            loss_per_token: cross-entropy in nats of every predicted token, an array or a tensor on any device, shape
                (B, T). Tokens outside `batch.loss_mask` do not count. Not kept beyond the call, unless on an accelerator.
            rows: the sequences of the batch these are, for micro-batches.
        """
        if self._open_step is None or batch.step != self._open_step.step:
            raise ValueError(f"record() was given step {batch.step}, which is not the step being trained on.")
        self._losses.add(batch, loss_per_token, rows)

    def stop_requested(self) -> bool:
        """Whether all ranks should save and leave now: the same answer on each. **Collective.**

        A signal or `control/stop` seen during step s makes this true after step s + 1; who never asks outlives SIGTERM.
        """
        self._agree()
        return self._first_stop is not None and self._first_stop < self._next_step - 1

    def save_requested(self) -> bool:
        """Whether all ranks should save and go on, once for every request: the same answer on each. **Collective.**"""
        self._agree()
        due = {step for step in self._saves if step < self._next_step - 1}
        self._saves -= due
        return bool(due)

    def completed_statistics(self) -> list[DomainStatistics]:
        """Statistics, summed over all ranks, of the steps that have completed since the last call, in order.

        Of more than `MAX_UNREAD` steps the newest are kept, so that a trainer may leave them alone.
        """
        completed = list(self._completed)
        self._completed.clear()
        return completed

    def state_dict(self) -> dict[str, Any] | None:
        """The state between two steps, on rank 0; None elsewhere. **Collective.**"""
        self._start()
        self._close_step()
        self._absorb(self._feedback.wait_for(self._next_step))
        if self._comm.rank != 0:
            return None
        while not self._plans.reaches(self._source.stream_version.data_step(self._next_step)):
            self._plans.poll(self._horizon())
            time.sleep(POLL_S)
        state = PlaneState(
            next_step=self._next_step,
            plan=self._plan_of(self._next_step),
            mixer=self._mixer.arrays(),
            fed=self._fed,
            decisions=self._mixer.decisions,
            stream_version=self._source.stream_version,
            identity=self._source.identity(),
        )
        return state.to_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a saved state, which rank 0 gives (others may give None). Before the first batch. **Collective.**

        Raises:
            ConfigError: the state belongs to a run with other settings.
        """
        if self._started:
            raise ValueError("load_state_dict() comes before the first batch.")
        if not state and self._comm.rank == 0:
            raise ValueError("load_state_dict() was given no state on rank 0; to begin a run, leave the call out.")
        self._start(PlaneState.from_dict(state) if state and self._comm.rank == 0 else None)

    def close(self, orderly: bool = True) -> None:
        """Stop the reading thread; with `orderly`, finish what is under way and free what is shared. **Collective.**"""
        if self._ended:
            return
        self._ended = True
        if orderly and self._started:
            self._close_step()
            self._absorb(self._feedback.wait_for(self._next_step))
            while not self._plans.settled(self._horizon()):
                self._plans.poll(self._horizon())
                time.sleep(POLL_S)
        if self._started:
            self._prefetcher.close(timeout_s=None if orderly else ABANDON_S)
            self._mixer.close()
        self._control.close()
        self._sinks.close(self._next_step if orderly and self._started else None)
        if orderly:
            self._comm.Free()

    def _start(self, state: PlaneState | None = None) -> None:
        """Go on from `state`, which rank 0 has, or begin; only the first call does anything. **Collective.**"""
        if self._started:
            return
        found = find_resume_point(self._source, state, self._sinks.run_edits()) if self._comm.rank == 0 else None
        beginning = share_resume_point(self._comm, found, self.num_domains)
        source = self._source = self._source.at_version(beginning.stream_version)
        self._mixer = MixtureSequence(source.config.mixture, source.mixture_context)
        self._next_step, plan = beginning.step, beginning.plan
        if self._comm.rank == 0:
            if state is not None:
                self._mixer.load(state.decisions, state.mixer)
            self._mixer.restore(self._sinks.decisions())
        self._reduced, self._fed = beginning.step, state.fed if state is not None else 0
        served = plan.num_steps and source.stream_version.data_step(self._next_step) >= plan.first_step + plan.num_steps
        self._current_chunk = plan.chunk if served else plan.chunk - 1
        self._plans = PlanBroadcaster(self._comm, source.planner, self._weights_of, self._deliver)
        self._plans.resume(plan)
        plane = source.config.dataplane
        self._prefetcher = Prefetcher(open_batch_source(source, self._share), plane.prefetch_batches)
        self._started = True
        self._sinks.opened(
            AttemptStart(
                first_step=self._next_step,
                num_ranks=self._comm.size,
                model_parallel_size=plane.model_parallel_size,
                identity=source.identity(),
                stream_version=source.stream_version,
            )
        )
        self._change_mind()

    def _horizon(self) -> int:
        """The chunk beyond which one more is planned: the current one, or the one before the next step's data."""
        next_chunk = self._source.stream_version.data_step(self._next_step) // self._source.planner.chunk_steps
        return max(self._current_chunk, next_chunk - 1)

    def _weights_of(self, chunk: int) -> NDArray[np.float64] | None:
        """What the mixer wishes, without domains that have nothing left to give after samples were dropped."""
        plane = self._source.config.dataplane
        decisive = (chunk - plane.feedback_lag + 1) * plane.chunk_steps
        self._pass_over(min(decisive, self._source.stream_version.data_step(self._reduced)))
        weights = self._mixer.weights_of(chunk)
        if weights is None or self._source.drop_filter is None:
            return weights
        return np.where(self._source.planner.capacity > 0, weights, 0.0)

    def _change_mind(self) -> None:
        """Look for another mixture that is wished for; rank 0 only."""
        if (wish := self._control.mixture_request()) is not None:
            self._sinks.record_decision(self._mixer.decide_request(wish, self._plans.next_chunk))

    def _next(self) -> Batch | None:
        self._start()
        self._close_step()
        began = time.perf_counter()
        batch = self._await_batch()
        self.data_wait_s = time.perf_counter() - began
        if batch is None:
            return None
        if batch.chunk != self._current_chunk:
            self._enter_chunk(batch.chunk)
        self._open_step = batch
        self._next_step = batch.step + 1
        self._sinks.consumed(batch)
        return batch

    def _await_batch(self) -> Batch | None:
        while True:
            self._absorb(self._feedback.poll())
            self._plans.poll(self._horizon())
            try:
                return self._prefetcher.get(POLL_S)
            except queue.Empty:
                continue

    def _deliver(self, plan: ChunkPlan) -> None:
        """A plan has arrived, on every rank."""
        self._known_plans[plan.chunk] = plan
        self._sinks.planned(plan)
        self._prefetcher.submit(plan, self._next_step)

    def _enter_chunk(self, chunk: int) -> None:
        self._current_chunk = chunk
        self._known_plans = {c: p for c, p in self._known_plans.items() if c >= chunk}
        plan = self._known_plans[chunk]
        self._sinks.entered(plan, self._source, self._plans.plan_s, self._plans.broadcast_s)

    def _plan_of(self, step: int) -> ChunkPlan:
        """The plan `step` lies in, or the last one before it."""
        plans, data_step = (
            sorted(self._known_plans.values(), key=lambda p: p.chunk),
            self._source.stream_version.data_step(step),
        )
        return next((p for p in plans if p.first_step <= data_step < p.first_step + p.num_steps), plans[-1])

    def _close_step(self) -> None:
        """Start the reduction of the step that was being trained on."""
        batch, self._open_step = self._open_step, None
        if batch is None:
            return
        self._change_mind()
        stop, save = self._control.poll()
        sums = self._losses.take(batch)
        sums = sums if self._share.is_group_leader else np.zeros_like(sums)
        self._feedback.post(batch.step, sums, RankFlags(stop=stop, save=save, digest=batch.plan_digest))

    def _agree(self) -> None:
        """Have what all ranks said of the step before this one, on every rank alike. This step's losses are left alone."""
        self._absorb(self._feedback.wait_for(self._next_step - 2))

    def _absorb(self, agreements: list[StepResult]) -> None:
        for agreement in agreements:
            step = agreement.statistics.step
            if agreement.stop and self._first_stop is None:
                self._first_stop = step
            if agreement.save:
                self._saves.add(step)
            if self._comm.rank == 0:
                self._feed(agreement.statistics)
            self._completed.append(agreement.statistics)
            self._sinks.reduced(step, agreement.reduce_s)

    def _feed(self, statistics: DomainStatistics) -> None:
        """Tell the mixer of a step."""
        data_step = self._source.stream_version.data_step(statistics.step)
        self._pass_over(data_step)
        self._mixer.feed(replace(statistics, step=data_step))
        self._reduced, self._fed = statistics.step + 1, data_step + 1

    def _pass_over(self, data_step: int) -> None:
        """Tell the mixer that the data steps before `data_step` that it has heard nothing of are skipped."""
        while self._fed < data_step:
            self._mixer.feed(statistics_from_buffer(self._fed, np.zeros((NUM_BUFFER_ROWS, self.num_domains), np.int64)))
            self._fed += 1


def _communicator(config: Config, comm: Any) -> Communicator:
    """One of the plane's own, which it frees; MPI has some two thousand of them. **Collective.**"""
    if comm is None:
        return open_communicator(config.dataplane.comm)
    if isinstance(comm, Communicator):
        return comm.Dup()
    from mixtera_hpc.comm.mpi import Mpi

    return Mpi(comm)
