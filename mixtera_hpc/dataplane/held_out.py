"""Batches of the samples that training never sees: the same ones every time, in natural proportions, each at most once.

Every rank plans for itself, because the index is all that this takes: nothing is broadcast, nothing journalled. Price:
one more open of the index, at the start.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.planner import PlannerState
from mixtera_hpc.core.statistics import DomainStatistics, accumulate_losses, statistics_from_buffer
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import Batch, BatchSlice
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.dataplane.resume.run_edits import subset_of_run
from mixtera_hpc.dataplane.step_losses import sequence_sums
from mixtera_hpc.errors import MixtureError

__all__ = ["HeldOutBatches"]


class HeldOutBatches:
    """One rank's part of the validation of a run."""

    def __init__(self, config: Config, comm: Communicator, folder: RunFolder | None = None) -> None:
        """Open what `config` holds out. **Collective.**

        Args:
            folder: the folder of the run, which records what was dropped.

        Raises:
            MixtureError: less than one global batch is held out.
        """
        plane = config.dataplane
        subset = subset_of_run(folder if comm.rank == 0 else None, "validation")
        source = open_source(config, comm, subset=subset)
        sizes = source.layout.epoch_items()
        # Sequences in one pass over each domain.
        capacity = source.grid.capacity(sizes, np.ones(len(sizes)))
        num_sequences = int(capacity.sum())
        steps = min(config.training.validate_steps, num_sequences // plane.global_batch_size)
        if steps < 1:
            raise MixtureError(
                f"query.holdout.fraction={config.query.holdout.fraction:g} holds {num_sequences} sequences out, fewer "
                "than one global batch.\n"
                "  Raise it, or lower dataplane.seq_len or dataplane.global_batch_size."
            )

        self._comm = comm
        # Weights proportional to size, among the domains that have at least one sequence.
        has_sequences = capacity > 0
        self._weights = np.where(has_sequences, sizes, 0) / max(sizes[has_sequences].sum(), 1)
        # One chunk covers all steps, so that a single plan describes the whole validation.
        self._planner = replace(source.planner, capacity=capacity, chunk_steps=steps, on_exhausted="redistribute")
        self._source = replace(source, planner=self._planner)
        self._slice = BatchSlice.of(plane, comm.rank, comm.size)
        self.num_domains = source.num_domains

    def batches(self) -> Iterator[Batch]:
        """Yield this rank's batches, from the first one on."""
        plan = self._planner.decide(PlannerState.start(self.num_domains), self._weights)
        maker = BatchMaker(self._source, self._slice, audit=False)
        try:
            yield from maker.batches(plan, 0)
        finally:
            maker.close()

    def sums(self, batch: Batch, loss_per_token: object, rows: slice = slice(None)) -> NDArray[np.int64]:
        """Return the statistics of some sequences of a batch, to be added up; shape (NUM_BUFFER_ROWS, num_domains)."""
        mask = batch.loss_mask[rows]
        losses = sequence_sums(loss_per_token, mask)()
        return accumulate_losses(batch.domain_ids[rows], losses, mask.sum(axis=1), self.num_domains)

    def reduce(self, step: int, sums: NDArray[np.int64]) -> DomainStatistics:
        """Add up the sums of all ranks, each sequence counted once. **Collective.**"""
        # Ranks of one group computed the losses of the same sequences.
        own = sums if self._slice.is_group_leader else np.zeros_like(sums)
        return statistics_from_buffer(step, self._comm.Allreduce(own))
