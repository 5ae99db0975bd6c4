"""The phases of a run, each with a mixture of its own: where they begin, and their shares of the run."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.batch_ramp import batch_schedule_of
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError

__all__ = ["TrainingPhases", "by_phase", "share_names"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPhases:
    """The phases of the proxies."""

    starts: tuple[int, ...]
    """First step of every phase, which is also the first step of a chunk."""
    shares: tuple[float, ...]
    """Share of the run's sequences that every phase has; sum 1."""

    @classmethod
    def of(cls, config: Config) -> "TrainingPhases":
        """Return the phases of `swarm.phases` in the steps of a configuration.

        Raises:
            ConfigError: a phase has no chunk of its own.
        """
        if len(config.swarm.phases) == 1:
            return cls(starts=(0,), shares=(1.0,))
        num_steps = config.training.num_steps
        chunk_steps = config.dataplane.chunk_steps
        # A mixture changes only between chunks, so a phase begins at the nearest one.
        begins = np.cumsum([0.0, *config.swarm.phases[:-1]]) * num_steps
        starts = (np.rint(begins / chunk_steps) * chunk_steps).astype(np.int64)
        ends = np.append(starts[1:], num_steps)
        if (starts >= ends).any():
            raise ConfigError(
                f"swarm.phases is {config.swarm.phases}, but in {num_steps} steps phase "
                f"{int(np.argmax(starts >= ends)) + 1} has no chunk of its own: mixtures change every {chunk_steps} "
                "steps (dataplane.chunk_steps).\n  Train longer proxies, lower dataplane.chunk_steps, or make the "
                "phase longer."
            )
        schedule = batch_schedule_of(config.dataplane)
        sequences = np.diff([schedule.sequences_before(step) for step in [*starts.tolist(), num_steps]])
        return cls(starts=tuple(starts.tolist()), shares=tuple((sequences / sequences.sum()).tolist()))


def share_names(names: Sequence[str], num_phases: int) -> list[str]:
    """Return the names of all shares of a mixture: those of the domains, once for every phase."""
    if num_phases == 1:
        return list(names)
    return [f"phase {phase}: {name}" for phase in range(1, num_phases + 1) for name in names]


def by_phase(shares: NDArray[np.float64], num_phases: int) -> NDArray[np.float64]:
    """Return shares of all phases, shape (…, P × K), with an axis for the phases; shape (…, P, K)."""
    return shares.reshape(*shares.shape[:-1], num_phases, shares.shape[-1] // num_phases)
