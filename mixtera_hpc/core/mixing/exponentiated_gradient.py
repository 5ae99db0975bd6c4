"""Exponentiated gradient: multiply each weight by exp(eta · score), where the score is the excess loss of the domain.

DoReMi and Sheared-LLaMA use Group DRO in this form. They differ only in score, step size and smoothing, so one file
holds both. Price: O(domains) per step, no history. It compares with a loss per domain, from a reference run or a
scaling law. Sources: arXiv 2305.10429 (DoReMi), algorithm 1; arXiv 2310.06694 (Sheared-LLaMA), algorithm 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.bounds import project_to_bounds, weight_floor
from mixtera_hpc.core.mixing.parameters import CONFIG_KEY, check_origin, check_prior, check_range
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.errors import ConfigError

__all__ = ["ExponentiatedGradient", "ExponentiatedGradientState"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExponentiatedGradientState:
    """The state after `step` updates; arrays have shape (num_domains,)."""

    step: int
    weights: NDArray[np.float64]
    log_weight: NDArray[np.float64]
    """Not normalised: a domain without sequences in a step keeps its value."""
    average: NDArray[np.float64]
    """Mean of all weights so far, which DoReMi gives to the next run."""
    num_nonfinite: NDArray[np.int64]
    """Sequences so far whose loss was not finite."""


class ExponentiatedGradient:
    """The algorithm with its parameters; everything that changes is in `ExponentiatedGradientState`."""

    name: ClassVar[str] = "exponentiated-gradient"
    learned: ClassVar[tuple[str, ...]] = ("log_weight",)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Parameters of exponentiated gradient, with the defaults of DoReMi."""

        variant: Literal["doremi", "sheared-llama"] = "doremi"
        """The score: max(loss - reference, 0); or loss - reference, which also takes weight from domains below the
        reference."""
        eta: float = 1.0
        """Step size per nat."""
        smoothing: float | None = None
        """Share that is distributed evenly. Null means 0.001 for doremi and 0 for sheared-llama."""
        reference_losses: tuple[float, ...] = ()
        """Loss of each domain to compare with, in nats, in the order of the domains. Empty compares with 0."""
        delta_min: float = 0.01
        """Smallest weight of a domain."""
        floor_share: float = 0.25
        """All floors together take at most this share: with many domains the smallest weight is this divided by their
        number."""

        def __post_init__(self) -> None:
            check_range("eta", self.eta, 0)
            for name in ("smoothed", "delta_min", "floor_share"):
                check_range(name.replace("smoothed", "smoothing"), getattr(self, name), 0, 1)

        @property
        def smoothed(self) -> float:
            """The share that is distributed evenly."""
            default = 1e-3 if self.variant == "doremi" else 0.0
            return default if self.smoothing is None else self.smoothing

    def __init__(self, config: Config) -> None:
        self.config = config

    def floor(self, num_domains: int) -> float:
        """Return the lower bound of every weight after the first update."""
        return weight_floor(num_domains, delta_min=self.config.delta_min, floor_share=self.config.floor_share)

    def start(self, prior: NDArray[np.float64]) -> ExponentiatedGradientState:
        """Return the initial state, with the mixture `prior`."""
        prior = check_prior(prior)
        num_references = len(self.config.reference_losses)
        if num_references not in (0, len(prior)):
            raise ConfigError(
                f"{CONFIG_KEY}.reference_losses has {num_references} numbers, but the mixture has {len(prior)} "
                "domains. Give one per domain, in the order of the mixture."
            )
        return ExponentiatedGradientState(
            step=0,
            weights=prior,
            log_weight=np.log(np.maximum(prior, np.finfo(np.float64).tiny)),  # Weight 0 gets a very small one.
            average=prior,
            num_nonfinite=np.zeros(len(prior), np.int64),
        )

    def update(
        self, state: ExponentiatedGradientState, statistics: DomainStatistics
    ) -> tuple[ExponentiatedGradientState, NDArray[np.float64]]:
        """Return the state after one more optimizer step, and the mixture; shape (num_domains,)."""
        size = len(state.weights)
        step = state.step + 1
        config = self.config

        # Excess loss in nats. Domains without sequences in this step are NaN here and masked below.
        score = statistics.loss_mean - np.asarray(config.reference_losses or 0.0)
        score = np.maximum(score, 0.0) if config.variant == "doremi" else score
        log_weight = state.log_weight + config.eta * np.where(statistics.observed, score, 0.0)

        # Back from logarithms, mixed with an equal share for every domain. Subtracting the maximum avoids overflow.
        sharp = np.exp(log_weight - log_weight.max())
        weights = (1 - config.smoothed) * sharp / sharp.sum() + config.smoothed / size
        weights = project_to_bounds(weights, self.floor(size))
        new_state = ExponentiatedGradientState(
            step=step,
            weights=weights,
            log_weight=log_weight,
            average=state.average + (weights - state.average) / step,
            num_nonfinite=state.num_nonfinite + statistics.num_nonfinite,
        )
        return new_state, weights

    def describe(self, state: ExponentiatedGradientState) -> dict[str, NDArray[Any]]:
        """Return the arrays that a report shows; shape (num_domains,) each."""
        return {
            "weight": state.weights,
            "average_weight": state.average,
            "log_weight": state.log_weight,
            "num_nonfinite": state.num_nonfinite,
        }

    def state_arrays(self, state: ExponentiatedGradientState) -> dict[str, NDArray[Any]]:
        """Return the state as flat arrays, for an npz file without pickle."""
        scalars = {"origin": np.array(self.name), "step": np.array(state.step)}
        return scalars | {name: getattr(state, name) for name in _PER_DOMAIN}

    def state_from_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> ExponentiatedGradientState:
        """Restore what `state_arrays` returned.

        Raises:
            ConfigError: another algorithm wrote the arrays.
        """
        check_origin(arrays, self.name)
        return ExponentiatedGradientState(step=int(arrays["step"]), **{name: arrays[name] for name in _PER_DOMAIN})


_PER_DOMAIN = ("weights", "log_weight", "average", "num_nonfinite")
