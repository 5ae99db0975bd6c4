"""The plan of a validation: how many held-out sequences of each domain are served, in how many batches.

One chunk covers the whole validation, so a single plan describes it.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.chunk_plan import ChunkPlan, PlannerState
from mixtera_hpc.core.measures.held_out_counts import held_out_counts
from mixtera_hpc.core.planner import Planner
from mixtera_hpc.core.slots.batch_schedule import BatchSchedule
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.dataplane.sample_subset import SampleSubset
from mixtera_hpc.errors import MixtureError, list_names

__all__ = ["MAX_NAMES", "ValidationPlan", "domains_without_held_out", "warn_without_held_out"]

MAX_NAMES = 5
"""Domain names listed in a message."""

logger = logging.getLogger("mixtera_hpc")


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationPlan:
    """The sequences of every validation of a run."""

    planner: Planner
    shares: NDArray[np.float64]
    """Natural proportions of the domains; shape (K,)."""
    weights: NDArray[np.float64]
    """Proportions that are served; shape (K,)."""
    has_quota: bool
    """True if small domains get more than their share."""

    @classmethod
    def of_source(cls, source: Source) -> "ValidationPlan":
        """Plan the validation of a source of held-out samples.

        Raises:
            MixtureError: less than one global batch is held out.
        """
        config = source.config
        global_batch_size = config.dataplane.global_batch_size
        capacity = _sequences_per_epoch(source)
        num_sequences = int(capacity.sum())
        num_batches = min(config.training.validate_steps, num_sequences // global_batch_size)
        if num_batches < 1:
            raise MixtureError(
                f"query.holdout.fraction={config.query.holdout.fraction:g} holds {num_sequences} sequences out, fewer "
                "than one global batch.\n"
                "  Raise it, or lower dataplane.seq_len or dataplane.global_batch_size."
            )

        # Proportional to size, among the domains that have at least one sequence.
        sizes = np.where(capacity > 0, source.layout.epoch_items(), 0)
        shares = sizes / max(sizes.sum(), 1)
        counts = held_out_counts(
            shares,
            capacity,
            batch_size=global_batch_size,
            num_batches=num_batches,
            quota=config.training.validate_min_sequences,
        )
        # All batches of a validation have the same size, also during a batch ramp.
        planner = replace(
            source.planner,
            capacity=capacity,
            batch_schedule=BatchSchedule.constant(global_batch_size),
            chunk_steps=num_batches if counts is None else int(counts.sum()) // global_batch_size,
            on_exhausted="redistribute",
        )
        weights = shares if counts is None else counts / counts.sum()
        return cls(planner=planner, shares=shares, weights=weights, has_quota=counts is not None)

    @property
    def num_batches(self) -> int:
        """Batches of a validation."""
        return self.planner.chunk_steps

    @property
    def chunk(self) -> ChunkPlan:
        """The plan of all batches."""
        return self.planner.decide(PlannerState.start(len(self.weights)), self.weights)

    def mean_loss(self, statistics: DomainStatistics) -> float | None:
        """Return the mean loss in natural proportions, nats per token; None without a loss."""
        observed = statistics.observed
        if not observed.any():
            return None
        if not self.has_quota:
            return float(statistics.loss_sum[observed].sum()) / int(statistics.num_tokens[observed].sum())
        # A quota serves more of small domains than their share.
        return float(np.average(statistics.loss_mean[observed], weights=self.shares[observed]))


def domains_without_held_out(config: Config, subset: SampleSubset) -> list[str]:
    """Return the domains whose held-out samples do not fill a sequence. Price: one open of the index.

    Args:
        config: the configuration of a run, which holds samples out.
        subset: the samples that it trains on.
    """
    source = open_source(config, Local(), subset=replace(subset, split="validation"), check=False)
    return _without_sequences(source.names, _sequences_per_epoch(source))


def warn_without_held_out(names: Sequence[str], plan: ValidationPlan) -> None:
    """Log the names of the domains whose held-out samples do not fill a sequence."""
    without = _without_sequences(names, plan.planner.capacity)
    if without:
        logger.warning(
            "No held-out loss of %s: their held-out samples do not fill a sequence. Raise query.holdout.fraction.",
            list_names(without, MAX_NAMES),
        )


def _sequences_per_epoch(source: Source) -> NDArray[np.int64]:
    """Return the sequences in one pass over each domain; shape (K,)."""
    sizes = source.layout.epoch_items()
    return source.grid.capacity(sizes, np.ones(len(sizes)))


def _without_sequences(names: Sequence[str], capacity: NDArray[np.int64]) -> list[str]:
    return [name for name, number in zip(names, capacity.tolist(), strict=True) if number == 0]
