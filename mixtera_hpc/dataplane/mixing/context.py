"""Facts on which a mixture depends besides its configuration: domains, their sizes, and the position of its chunks."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.domain_keys import DomainKey
from mixtera_hpc.core.slots.batch_schedule import BatchSchedule

__all__ = ["ChunkTimeline", "DomainSizes", "MixtureContext"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSizes:
    """The domains of a run and the data they have."""

    keys: tuple[DomainKey, ...]
    """The keys of the domains; the position is the domain_id."""
    sizes: NDArray[np.int64]
    """Items (tokens or samples) of one epoch of each domain; shape (K,)."""
    budget: int
    """Items of the whole run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTimeline:
    """Positions of the chunks of a mixture in the run.

    A mixture counts chunks from its own first one. For the mixture a run begins with, that is chunk 0 of the run; for a
    mixture that was requested at run time, it is the chunk in which that mixture took over.
    """

    chunk_steps: int
    batch_schedule: BatchSchedule
    items_per_sequence: int
    """Predicted tokens of a sequence; 1 for samples."""
    step: int = 0
    """First data step of the mixture's own chunk 0."""
    items: int = 0
    """Items served before that step; see `StreamVersion.items`."""

    def step_of(self, chunk: int) -> int:
        """Return the first data step of `chunk`."""
        return self.step + chunk * self.chunk_steps

    def items_before(self, chunk: int) -> int:
        """Return the number of items served before `chunk`."""
        return self.items_at(self.step_of(chunk))

    def items_at(self, step: int) -> int:
        """Return the number of items served before data step `step`."""
        return self.items + self.batch_schedule.slots(self.step, step) * self.items_per_sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureContext:
    """Facts on which the mixtures of a run depend; the same for every mixture that the run is served from."""

    domain_sizes: DomainSizes
    names: tuple[str, ...]
    """Names of the domains."""
    has_samples: NDArray[np.bool_]
    """True for domains that still have samples after `resume --drop`; shape (K,)."""
    timeline: ChunkTimeline
    feedback_lag: int
    """Chunks between the losses of a chunk and the first weights that may depend on them."""
