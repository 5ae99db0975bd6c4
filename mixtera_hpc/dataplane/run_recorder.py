"""Where a data plane writes down what it does: the journal and metric events on rank 0, the audit on every rank."""

import numpy as np

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.apportion import UNIT
from mixtera_hpc.core.planner import ChunkPlan
from mixtera_hpc.dataplane.journal import AttemptStart, AuditLog, Journal, append_line
from mixtera_hpc.dataplane.mixing.requests import MixtureDecision, read_decisions
from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.resume.run_edits import RunEdit, read_run_edits
from mixtera_hpc.track.tracker import NullTracker, Tracker

__all__ = ["RunRecorder"]


class RunRecorder:
    """Where a data plane writes: journal and metrics on rank 0, the audit on every rank. Nowhere without a folder."""

    def __init__(self, folder: RunFolder | None, attempt: int, rank: int, config: Config, tracker: Tracker) -> None:
        self.control = folder.control if folder else None
        self._decisions = folder.decisions if folder else None
        self._tracker = tracker if rank == 0 else NullTracker()
        self._journal = Journal(folder.journal, attempt) if folder and rank == 0 else None
        audit = folder.audit_of_rank(attempt, rank) if folder and config.dataplane.audit else None
        self._audit = AuditLog(audit) if audit and rank % config.dataplane.model_parallel_size == 0 else None

    def run_edits(self) -> list[RunEdit]:
        """What the run has been through."""
        return read_run_edits(self._decisions)

    def decisions(self) -> list[MixtureDecision]:
        """What was decided about its mixture."""
        return read_decisions(self._decisions)

    def record_decision(self, change: MixtureDecision) -> None:
        """Write a decision down; it holds from now on."""
        if self._decisions and self._journal:
            append_line(self._decisions, change.to_dict())
            self._journal.write(change.to_dict())

    def opened(self, opening: AttemptStart) -> None:
        if self._journal:
            self._journal.opened(opening)

    def planned(self, plan: ChunkPlan) -> None:
        if self._journal:
            self._journal.planned(plan)

    def consumed(self, batch: Batch) -> None:
        if self._audit and batch.digests is not None:
            self._audit.consumed(batch.step, batch.positions, batch.digests)

    def entered(self, plan: ChunkPlan, source: Source, plan_s: float, broadcast_s: float) -> None:
        """Tell the metrics what the chunk that begins is made of."""
        served = plan.cursors / max(int(plan.cursors.sum()), 1)
        items = np.maximum(source.layout.epoch_items(), 1)
        step = source.stream_version.step_at(plan.first_step)
        event = {
            "step": step,
            "chunk": plan.chunk,
            "domains": source.names,
            "weights": plan.weights / UNIT,
            "served": served,
            "cursors": plan.cursors,
            "epochs": (source.stream_version.origins + plan.cursors * source.grid.stride) / items,
        }
        self._tracker.log("mixture", event)
        self._tracker.log("comm", {"step": step, "plan_s": plan_s, "broadcast_s": broadcast_s})

    def reduced(self, step: int, reduce_s: float) -> None:
        self._tracker.log("comm", {"step": step, "reduce_s": reduce_s})

    def close(self, next_step: int | None) -> None:
        if self._journal:
            if next_step is not None:
                self._journal.closed(next_step)
            self._journal.close()
        if self._audit:
            self._audit.close()
