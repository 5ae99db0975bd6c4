"""Files that a data plane reads from and writes to the folder of its run.

Rank 0 writes the journal and metric events; with `dataplane.audit`, the leader of each model-parallel group writes an
audit log; with `dataplane.record_losses`, every rank that records losses writes a loss log. Without a folder nothing is
written.
"""

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.core.apportion import UNIT
from mixtera_hpc.core.chunk_plan import ChunkPlan
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.mixing.learning_event import LearningEvent, LearningLog
from mixtera_hpc.dataplane.mixing.requests import MixtureDecision, read_decisions
from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.dataplane.reading.lane_count import lanes_in_use
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.recording.journal import AttemptSetup, AuditLog, Journal, append_line
from mixtera_hpc.dataplane.recording.loss_log import LossLog
from mixtera_hpc.dataplane.recording.own_attempt import LoopLog, OwnAttempt
from mixtera_hpc.dataplane.resume.run_edits import RunEdit, read_run_edits
from mixtera_hpc.errors import list_names
from mixtera_hpc.track.tracker import NullTracker, Tracker

__all__ = ["RunRecorder"]

MAX_NAMES = 5
"""Domain names listed in a message."""

logger = logging.getLogger("mixtera_hpc")


class RunRecorder:
    """One rank's records of a run."""

    def __init__(
        self,
        folder: RunFolder | None,
        attempt: int,
        rank: int,
        *,
        is_audited: bool,
        keeps_losses: bool = False,
        tracker: Tracker,
        own_attempt: OwnAttempt | None = None,
        loop_log: LoopLog | None = None,
    ) -> None:
        """Open the files of one rank; `tracker` receives metric events on rank 0.

        Args:
            folder: the folder of the run, or None to write nothing.
            attempt: number of the attempt.
            rank: this rank.
            is_audited: write an audit log. Ranks of a group get the same batches; one log of them is enough.
            keeps_losses: write a loss log, if this rank records losses.
            tracker: receives metric events.
            own_attempt: on rank 0, the attempt, if no launcher records it.
            loop_log: on rank 0, logs attempts, steps and validations, if the training loop does not.
        """
        self.attempt = attempt
        self._own_attempt = own_attempt
        self._loop_log = loop_log
        self._decisions = folder.decisions if folder else None
        self._tracker = tracker if rank == 0 else NullTracker()
        self._journal = Journal(folder.journal, attempt) if folder and rank == 0 else None
        self._audit: AuditLog | None = None
        if folder and is_audited:
            self._audit = AuditLog(folder.audit_of_rank(attempt, rank))
        self._learning = LearningLog()
        self._has_warned_of_bounds = False
        self.loss_log: LossLog | None = None
        if folder and keeps_losses:
            self.loss_log = LossLog(folder.losses_of_rank(attempt, rank))

    def run_edits(self) -> list[RunEdit]:
        """Return the edits of the run, oldest first."""
        return read_run_edits(self._decisions)

    def decisions(self) -> list[MixtureDecision]:
        """Return the decisions about the run's mixture, oldest first."""
        return read_decisions(self._decisions)

    def record_decision(self, decision: MixtureDecision) -> None:
        """Record a decision about the mixture; it holds from now on, also after a crash."""
        if self._decisions and self._journal:
            # First the decisions file, which is synced to disk: the journal only shows it.
            append_line(self._decisions, decision.to_dict())
            self._journal.write(decision.to_dict())

    def record_start(self, setup: AttemptSetup) -> None:
        """Record that the attempt begins to serve."""
        if self._journal:
            self._journal.write_start(setup)

    def log_attempt(self, source: Source, comm: Communicator, first_step: int) -> None:
        """Log the start of the attempt."""
        if self._loop_log:
            plane = source.config.dataplane
            self._loop_log.log_attempt(
                {
                    "step": first_step,
                    "num_ranks": comm.size,
                    "hostname": comm.hostname,
                    "vocab_size": source.tokenizer.vocab_size if source.tokenizer else 0,
                    "seq_len": plane.seq_len,
                    "global_batch_size": plane.global_batch_size,
                    "lanes": lanes_in_use(plane),
                    "domains": source.names,
                }
            )

    def log_hosts(self, hosts: Sequence[str], first_step: int) -> None:
        """Log the node of every rank, as runs of ranks that share one."""
        runs = [[host, len(list(ranks))] for host, ranks in itertools.groupby(hosts)]
        self._tracker.log("hosts", {"step": first_step, "hosts": runs})

    def record_plan(self, plan: ChunkPlan) -> None:
        """Record a plan that all ranks have received."""
        if self._journal:
            self._journal.write_plan(plan)

    def record_batch(self, batch: Batch, data_wait_s: float) -> None:
        """Record that a batch was handed to the trainer after a wait."""
        if self._loop_log:
            self._loop_log.add_batch(batch.step, data_wait_s)
        if self._audit and batch.digests is not None:
            self._audit.write_batch(batch.step, batch.positions, batch.digests)

    def log_chunk(
        self, plan: ChunkPlan, source: Source, plan_s: float, broadcast_s: float, learning: LearningEvent
    ) -> None:
        """Log the mixture of a chunk whose first batch is served now, and what it took to plan and broadcast it.

        Args:
            plan: the plan of the chunk.
            source: what is served.
            plan_s: seconds that planning took.
            broadcast_s: seconds that the broadcast took.
            learning: what a mixing algorithm has learned.
        """
        # Metrics count training steps, plans count data steps.
        step = source.stream_version.step_at(plan.first_step)
        # Without a tracker, and on other ranks than 0, the event is not recorded.
        if not isinstance(self._tracker, NullTracker):
            self._tracker.log("mixture", self._mixture_event(step, plan, source) | self._learning.fields(learning))
        self._report_problem(step, learning)
        self._report_bounds(source, learning)
        self._tracker.log("comm", {"step": step, "plan_s": plan_s, "broadcast_s": broadcast_s})

    def _mixture_event(self, step: int, plan: ChunkPlan, source: Source) -> dict[str, Any]:
        """Return what `mixture.jsonl` holds of a plan."""
        # Sequences of each domain before the chunk, as a share of all, and as passes over the domain.
        served = plan.cursors / max(int(plan.cursors.sum()), 1)
        items = source.stream_version.origins + plan.cursors * source.grid.stride
        return {
            "step": step,
            "chunk": plan.chunk,
            "domains": source.names,
            "weights": plan.weights / UNIT,
            "served": served,
            "cursors": plan.cursors,
            "epochs": items / np.maximum(source.lanes.epoch_items, 1),
        }

    def _report_bounds(self, source: Source, learning: LearningEvent) -> None:
        """Warn once about laws that the losses do not determine."""
        reached = learning.described.get("law_bounds")
        if reached is None or self._has_warned_of_bounds or self._journal is None or not (reached > 0).any():
            return
        self._has_warned_of_bounds = True
        names = [name for name, bits in zip(source.names, reached, strict=True) if bits > 0]
        logger.warning(
            "ADO: the laws of %s lie on a bound, so the losses do not determine them and their speeds may be wrong.\n"
            "  A longer mixture.algorithm.warmup gives the fit more losses. mixtera-hpc report lists all laws.",
            list_names(names, MAX_NAMES),
        )

    def _report_problem(self, step: int, learning: LearningEvent) -> None:
        """Warn and note in the journal that updates of the mixing algorithm have failed since the last chunk."""
        is_first = self._learning.num_problems == 0
        problem = self._learning.new_problem(learning)
        if problem is None or self._journal is None:
            return
        self._journal.write(
            {"kind": "mixing_problem", "step": step, "failed_updates": problem.count, "message": problem.message}
        )
        if is_first:
            logger.warning(
                "The mixing algorithm failed at step %d: %s\n"
                "  Training goes on with the weights before. The number of failed updates is in metrics/mixture.jsonl.",
                problem.step,
                problem.message,
            )

    def log_data_end(self, plan: ChunkPlan, source: Source) -> None:
        """Log where the data ends, and what does not fill a global batch or a sequence there."""
        cursors, left_over = source.planner.end_of_data(plan)
        self._tracker.log(
            "data_end",
            {
                "step": source.stream_version.step_at(plan.first_step + plan.num_steps),
                "unit": source.config.mixture.unit,
                "last_batch": source.planner.last_batch,
                "left_over": left_over,
                "left_over_tokens": source.left_over_tokens(cursors),
            },
        )

    def log_reduction(self, statistics: DomainStatistics, reduce_s: float | None) -> None:
        """Log the losses of a step, and the seconds of this rank's wait for their reduction, if there was one."""
        if reduce_s is not None:
            self._tracker.log("comm", {"step": statistics.step, "reduce_s": reduce_s})
        if self._loop_log:
            self._loop_log.add_statistics(statistics)

    def log_validation(self, statistics: DomainStatistics, mean_loss: float | None) -> None:
        """Log the losses of held-out samples."""
        if self._loop_log:
            self._loop_log.log_validation(statistics, mean_loss)

    def close(self, next_step: int | None, exit_code: int) -> None:
        """Close all files.

        Args:
            next_step: every step before it was consumed; None when the attempt did not end in order.
            exit_code: of the attempt.
        """
        if self._loop_log:
            self._loop_log.close()
        if self._own_attempt:
            self._own_attempt.end(exit_code)
        if self._journal:
            # Without this line readers assume that the attempt was killed, and served everything it had planned.
            if next_step is not None:
                self._journal.write_close(next_step)
            self._journal.close()
        if self._audit:
            self._audit.close()
        if self.loss_log:
            self.loss_log.close()
