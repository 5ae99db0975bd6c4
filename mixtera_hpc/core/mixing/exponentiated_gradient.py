"""Exponentiated gradient: multiply each weight by exp(eta · score), where the score says how far a domain is behind.

Group DRO as DoReMi and Sheared-LLaMA use it; they differ in score, step size and smoothing, so they are one file.
Price: O(domains) per step, no history; needs a loss per domain to compare with, from a reference run or a scaling law.
Sources: arXiv 2305.10429 (DoReMi), algorithm 1; arXiv 2310.06694 (Sheared-LLaMA), algorithm 1.
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
    """What is known after `step` updates; arrays have shape (num_domains,)."""

    step: int
    weights: NDArray[np.float64]
    log_weight: NDArray[np.float64]
    """Not normalised: a domain that is absent keeps its number."""
    average: NDArray[np.float64]
    """Mean of all weights so far: what DoReMi hands to the next run."""
    num_nonfinite: NDArray[np.int64]
    """Sequences so far whose loss was not finite."""


class ExponentiatedGradient:
    """The algorithm with its parameters; all memory is in `ExponentiatedGradientState`."""

    name: ClassVar[str] = "exponentiated-gradient"
    learned: ClassVar[tuple[str, ...]] = ("log_weight",)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Parameters of exponentiated gradient, with DoReMi's defaults."""

        variant: Literal["doremi", "sheared-llama"] = "doremi"
        """The score: max(loss - reference, 0), or loss - reference, which also takes weight from domains that are ahead."""
        eta: float = 1.0
        """Step size per nat."""
        smoothing: float | None = None
        """Share handed out evenly; null is 0.001 for doremi, 0 for sheared-llama."""
        reference_losses: tuple[float, ...] = ()
        """Nats per domain to compare with, in the order of the domains; empty compares with 0."""
        delta_min: float = 0.01
        """Smallest weight of a domain."""
        floor_share: float = 0.25
        """With many domains the smallest weight is this divided by their number, so that floors together take no more."""

        def __post_init__(self) -> None:
            check_range("eta", self.eta, 0)
            for name in ("smoothed", "delta_min", "floor_share"):
                check_range(name.replace("smoothed", "smoothing"), getattr(self, name), 0, 1)

        @property
        def smoothed(self) -> float:
            default = 1e-3 if self.variant == "doremi" else 0.0
            return default if self.smoothing is None else self.smoothing

    def __init__(self, config: Config) -> None:
        self.config = config

    def floor(self, num_domains: int) -> float:
        """What every weight stays above, once it has moved."""
        return weight_floor(num_domains, delta_min=self.config.delta_min, floor_share=self.config.floor_share)

    def start(self, prior: NDArray[np.float64]) -> ExponentiatedGradientState:
        """Begin with the mixture `prior`."""
        prior, given = check_prior(prior), len(self.config.reference_losses)
        if given not in (0, len(prior)):
            raise ConfigError(
                f"{CONFIG_KEY}.reference_losses has {given} numbers, but the mixture has {len(prior)} domains. "
                f"Give one per domain, in the mixture's order."
            )
        log_weight = np.log(np.maximum(prior, np.finfo(np.float64).tiny))
        nothing = np.zeros(len(prior), np.int64)
        return ExponentiatedGradientState(
            step=0, weights=prior, log_weight=log_weight, average=prior, num_nonfinite=nothing
        )

    def update(
        self, state: ExponentiatedGradientState, statistics: DomainStatistics
    ) -> tuple[ExponentiatedGradientState, NDArray[np.float64]]:
        """Take in one optimizer step; returns the new state and the mixture, shape (num_domains,)."""
        size, step, config = len(state.weights), state.step + 1, self.config
        score = statistics.loss_mean - np.asarray(config.reference_losses or 0.0)
        score = np.maximum(score, 0.0) if config.variant == "doremi" else score
        log_weight = state.log_weight + config.eta * np.where(statistics.observed, score, 0.0)
        sharp = np.exp(log_weight - log_weight.max())
        weights = (1 - config.smoothed) * sharp / sharp.sum() + config.smoothed / size
        weights = project_to_bounds(weights, self.floor(size))
        state = ExponentiatedGradientState(
            step=step,
            weights=weights,
            log_weight=log_weight,
            average=state.average + (weights - state.average) / step,
            num_nonfinite=state.num_nonfinite + statistics.num_nonfinite,
        )
        return state, weights

    def describe(self, state: ExponentiatedGradientState) -> dict[str, NDArray[Any]]:
        """What a report shows of every domain; shape (num_domains,) each."""
        return {
            "weight": state.weights,
            "average_weight": state.average,
            "log_weight": state.log_weight,
            "num_nonfinite": state.num_nonfinite,
        }

    def state_arrays(self, state: ExponentiatedGradientState) -> dict[str, NDArray[Any]]:
        """The state as flat arrays, for an npz file without pickle."""
        scalars = {"origin": np.array(self.name), "step": np.array(state.step)}
        return scalars | {name: getattr(state, name) for name in _PER_DOMAIN}

    def state_from_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> ExponentiatedGradientState:
        """The inverse of `state_arrays`.

        Raises:
            ConfigError: another algorithm wrote them.
        """
        check_origin(arrays, self.name)
        return ExponentiatedGradientState(step=int(arrays["step"]), **{name: arrays[name] for name in _PER_DOMAIN})


_PER_DOMAIN = ("weights", "log_weight", "average", "num_nonfinite")
