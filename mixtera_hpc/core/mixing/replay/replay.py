"""Run a mixing algorithm on a trace of losses, step by step, without chunks and without a lag."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.algorithm import MixingAlgorithm, learns_from
from mixtera_hpc.core.mixing.mixed_domains import MixedDomains
from mixtera_hpc.core.mixing.replay.loss_trace import LossTrace
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.errors import ConfigError

__all__ = ["ReplayedMixture", "replay_trace"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplayedMixture:
    """The mixtures that an algorithm would have requested."""

    mixture: NDArray[np.float64]
    """After every step; shape (T, K)."""
    refit_steps: NDArray[np.int64]
    """Steps in which laws were fitted; shape (R,), empty for algorithms without laws."""
    speed: NDArray[np.float64]
    """Fall of the loss after each refit, nats per sequence of any domain; shape (R, K)."""

    def arrays(self, trace: LossTrace) -> dict[str, NDArray[Any]]:
        """Return the arrays of an npz file."""
        return {
            "names": np.array(trace.names),
            "mixture": self.mixture,
            "refit_steps": self.refit_steps,
            "speed": self.speed,
        }


def replay_trace(algorithm: MixingAlgorithm[Any], trace: LossTrace) -> ReplayedMixture:
    """Return the mixture after every step of a trace.

    Raises:
        ConfigError: the algorithm learns from held-out losses, and the trace has none.
    """
    domains = MixedDomains.of(trace.prior)
    state = algorithm.start(trace.prior[domains.ids] / trace.prior[domains.ids].sum())
    mixture = np.empty(trace.loss_mean.shape)
    weights = trace.prior
    refit_steps: list[int] = []
    speeds: list[NDArray[np.float64]] = []
    for step, updates in enumerate(_updates(algorithm, trace)):
        for statistics in updates:
            before = getattr(state, "laws", None)
            state, mixed = algorithm.update(state, domains.restrict(statistics))
            weights = domains.scatter(mixed, 0.0)
            laws = getattr(state, "laws", None)
            if laws is not None and before is not None and laws.theta is not before.theta:
                refit_steps.append(step)
                speeds.append(domains.scatter(algorithm.describe(state)["speed"], np.nan))
        mixture[step] = weights
    return ReplayedMixture(
        mixture=mixture,
        refit_steps=np.array(refit_steps, np.int64),
        speed=np.array(speeds, np.float64).reshape(len(speeds), len(trace.prior)),
    )


def _updates(algorithm: MixingAlgorithm[Any], trace: LossTrace) -> Iterator[list[DomainStatistics]]:
    """Yield the statistics that the algorithm learns from in each step."""
    if learns_from(algorithm) == "train":
        yield from ([statistics] if statistics.num_sequences.any() else [] for statistics in trace.steps())
        return
    validations = list(trace.validations())
    if not validations:
        raise ConfigError(
            f"{algorithm.name} learns from held-out losses, and the trace has none.\n"
            "  Set algorithm.statistics=train, or export a run that validates."
        )
    begin = 0
    for step in range(len(trace.loss_mean)):
        due = [held_out for held_out in validations if held_out.step == step]
        if trace.weights is not None and due and step > begin:
            mean = trace.weights[begin:step].mean(axis=0)
            due = [replace(held_out, weights=mean) for held_out in due]
        begin = step if due else begin
        yield due
