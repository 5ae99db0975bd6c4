"""Batches of the samples that training never sees: the same ones every time, each at most once.

They come in natural proportions, but with a quota of every domain, so that each of 1,000 domains has a loss.

Every rank plans for itself, because the index is all that this takes: nothing is broadcast, nothing journalled. Price:
one more open of the index, at the start, and two small collectives per validation.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.statistics import NUM_BUFFER_ROWS, DomainStatistics, statistics_from_buffer
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import Batch, BatchSlice, positions_of, step_of
from mixtera_hpc.dataplane.reading.packing.agreed_micro_batches import agree_on_micro_batches
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.dataplane.resume.run_edits import subset_of_run
from mixtera_hpc.dataplane.steps.loss_parts import LossParts, PartLayout
from mixtera_hpc.dataplane.steps.step_losses import StepLosses
from mixtera_hpc.dataplane.validation_plan import ValidationPlan, warn_without_held_out
from mixtera_hpc.errors import CommError, ConfigError

__all__ = ["HeldOutBatches"]


class HeldOutBatches:
    """One rank's part of the validation of a run; `DataPlane.held_out` opens it.

    for batch in held_out.batches():
        held_out.record(batch, loss_per_token)
    statistics = held_out.reduce(step)
    """

    def __init__(
        self,
        config: Config,
        comm: Communicator,
        batch_slice: BatchSlice,
        *,
        folder: RunFolder | None = None,
        parts: PartLayout | None = None,
        log: Callable[[DomainStatistics, float | None], None] = lambda statistics, mean_loss: None,
    ) -> None:
        """Open what `config` holds out. **Collective.**

        Args:
            config: `query.holdout` says what is held out, `training.validate_steps` how many batches are served.
            comm: all ranks.
            batch_slice: what this rank gets of every global batch; ranks of one group have equal ones.
            folder: the folder of the run, which records what was dropped.
            parts: which part of every sequence this rank records; None if ranks record whole sequences.
            log: receives the statistics and the mean loss of every validation.

        Raises:
            MixtureError: less than one global batch is held out.
            ConfigError: the ranks cannot share the batches of a validation evenly.
        """
        global_batch_size = config.dataplane.global_batch_size
        _check_batch_is_shared(global_batch_size, batch_slice.num_groups)
        subset = subset_of_run(folder if comm.rank == 0 else None, "validation")
        source = open_source(config, comm, subset=subset)
        self.plan = ValidationPlan.of_source(source)
        """The sequences of each domain, and their batches."""
        if comm.rank == 0:
            warn_without_held_out(source.names, self.plan)
        # No process reads held-out samples, so the copy of the tables for processes is freed.
        self._source = replace(source, planner=self.plan.planner, memory=replace(source.memory, tables=None))
        self._comm = comm
        self._log = log
        self._parts = LossParts(parts) if parts is not None else None
        self._num_parts = 1 if parts is None else parts.num_parts
        self._slice = batch_slice
        self._local_batch_size = batch_slice.size_of(global_batch_size)
        self._losses: dict[int, StepLosses] = {}
        """Losses of the batches handed out since the last `reduce`, by their step."""
        self.num_domains = source.num_domains

    @property
    def num_batches(self) -> int:
        """Batches in each pass."""
        return self.plan.num_batches

    def batches(self) -> Iterator[Batch]:
        """Yield this rank's batches, from the first one on; their steps are -1, -2, and so on. **Collective.**

        A negative step never belongs to a batch of the training.
        """
        maker = BatchMaker(self._source, self._slice, audit=False, compare_every_read=True)
        self._losses.clear()
        try:
            for batch in maker.batches(self.plan.chunk, 0):
                agreed = agree_on_micro_batches(self._comm, self._source.config.dataplane, batch)
                held_out = replace(agreed, step=-1 - batch.step)
                self._losses[held_out.step] = StepLosses(held_out, self.num_domains, self._num_parts)
                yield held_out
        finally:
            maker.close()

    def record(
        self,
        batch: Batch | Mapping[str, Any],
        loss: Any,
        *,
        rows: slice = slice(None),
        tokens: slice | None = None,
        num_tokens: Any = None,
    ) -> None:
        """Add losses of a batch of `batches`; the arguments are those of `DataPlane.record`.

        Ranks without a loss need not call this. If ranks of one model-parallel group record the same losses, they count
        once.

        Raises:
            ValueError: the batch was not handed out since the last `reduce`, or the losses have another shape.
            CommError: the losses were recorded before.
        """
        losses = self._losses.get(step_of(batch))
        if losses is None:
            raise ValueError(
                f"record() of the held-out data was given step {step_of(batch)}, which is not among the batches since "
                "the last reduce(). Held-out batches have negative steps.\n"
                "  Give it a batch of batches(), and give batches of the training to DataPlane.record."
            )
        losses.add(loss, losses.rows_at(positions_of(batch), rows), tokens, num_tokens)

    def reduce(self, step: int) -> DomainStatistics:
        """Return the statistics of what was recorded since the last call, summed over all ranks. **Collective.**

        Args:
            step: training step that the statistics belong to.

        Raises:
            CommError: a batch was recorded in part, or not by the same number of data-parallel groups as others.
        """
        recorded = [number for number, losses in self._losses.items() if losses.has_losses]
        own = np.zeros((NUM_BUFFER_ROWS, self.num_domains), np.int64)
        is_partial = False
        if self._parts is None:
            for number in recorded:
                own += self._losses[number].total()
        else:
            # Peers that have handed out no batch take part, because the parts of all others pass through all of them.
            for number in range(-1, -1 - self.num_batches, -1):
                merged = self._parts.merge(self._losses.get(number), self._local_batch_size)
                own += merged.rows
                is_partial |= merged.is_partial
        self._losses.clear()
        if not self._is_counted(recorded, is_partial):
            own[...] = 0
        statistics = statistics_from_buffer(step, self._comm.Allreduce(own))
        self._log(statistics, self.mean_loss(statistics))
        return statistics

    def mean_loss(self, statistics: DomainStatistics) -> float | None:
        """Return the mean loss of a validation in natural proportions, nats per token; None without a loss."""
        return self.plan.mean_loss(statistics)

    def _is_counted(self, recorded: list[int], is_partial: bool) -> bool:
        """Return whether this rank's losses count: it is the first of its group that recorded any. **Collective.**"""
        group = self._slice.group
        own = np.array([group, len(recorded), _digest(recorded), is_partial], np.int64)
        by_rank = self._comm.Allgather(own)
        if by_rank[:, 3].any():
            ranks = np.flatnonzero(by_rank[:, 3])
            raise CommError(
                f"The held-out batches were recorded in part by the ranks {ranks.tolist()}: their parts are not every "
                "token of each sequence exactly once.\n"
                "  Call record(batch, loss, tokens=) on every rank along loss_parts, each with its own part."
            )
        groups, counts = by_rank[:, 0], by_rank[:, 1]
        has_recorded = counts > 0
        if not has_recorded.any():
            return False
        silent = np.flatnonzero(~np.isin(groups, groups[has_recorded]))
        first = int(np.argmax(has_recorded))
        others = np.flatnonzero(has_recorded & (by_rank[:, 1:3] != by_rank[first, 1:3]).any(axis=1))
        if len(silent) or len(others):
            raise CommError(
                "The held-out batches were recorded in part: "
                f"ranks {silent.tolist()} did not record, ranks {others.tolist()} recorded other batches than rank "
                f"{first}.\n  Call record() for the same batches in all data-parallel groups."
            )
        return int(np.argmax(has_recorded & (groups == group))) == self._comm.rank


def _check_batch_is_shared(global_batch_size: int, num_groups: int) -> None:
    """Raise ConfigError unless the groups of ranks can share the batches of a validation evenly."""
    # Training does not check this if it begins behind the first stage of a batch ramp.
    if global_batch_size % num_groups:
        raise ConfigError(
            f"dataplane.global_batch_size={global_batch_size} is the batch of every validation, also behind the first "
            f"stage of dataplane.batch_schedule, and {num_groups} data-parallel groups of ranks cannot share it evenly."
            "\n  Change the number of ranks, or do not validate: training.validate_every=0, or without held_out()."
        )


def _digest(steps: list[int]) -> int:
    content = np.array(steps, np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "little")
