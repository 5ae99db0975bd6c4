"""Exponentiated gradient: multiply each weight by exp(eta · score), where the score is the excess loss of the domain.

w' = w · exp(eta · score) / sum, then w = (1 - c) · w' + c / K, and this smoothed w goes into the next step. So no
weight falls below about c / K, and a mixture turns round after the same number of steps, no matter for how long it
moved in one direction. A domain that is absent from a step keeps its last score; otherwise a domain that is hardly
sampled would never recover.

DoReMi and Sheared-LLaMA use Group DRO in this form. They differ in smoothing and in the losses they compare, so one
file holds both. Price: O(domains) per step, no history. Both need a reference loss per domain: without one, the
algorithm follows the domain with the highest loss, which is the noisiest one. Sources: arXiv 2305.10429 (DoReMi),
algorithm 1; arXiv 2310.06694 (Sheared-LLaMA), algorithm 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.bounds import project_to_bounds, weight_floor
from mixtera_hpc.core.mixing.parameters import CONFIG_KEY, StatisticsChoice, check_origin, check_prior, check_range
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.errors import ConfigError

__all__ = ["NO_REFERENCES", "ExponentiatedGradient", "ExponentiatedGradientState"]

SMOOTHING = {"doremi": 1e-3, "sheared-llama": 1e-4}
"""The smoothing of the published codes."""

NO_REFERENCES = (
    f"{CONFIG_KEY}.name=exponentiated-gradient compares the loss of every domain with that of a reference model, and "
    "there are no reference losses. Without them it serves the noisiest domain.\n"
    f"  Set {CONFIG_KEY}.from_run=RUN to take the losses of an earlier run, {CONFIG_KEY}.reference_losses=FILE.json "
    f'with {{"domain": nats}}, or {CONFIG_KEY}.reference_losses={{domain: nats}}.'
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExponentiatedGradientState:
    """The state after `step` updates; arrays have shape (num_domains,)."""

    step: int
    weights: NDArray[np.float64]
    """The mixture that is served: `smoothed`, with the floor."""
    smoothed: NDArray[np.float64]
    """w: the smoothed weights, which the next update multiplies."""
    score: NDArray[np.float64]
    """Excess loss when the domain was last observed, nats; 0 before."""
    average: NDArray[np.float64]
    """Mean of all weights so far, which DoReMi gives to the next run."""
    num_nonfinite: NDArray[np.int64]
    """Sequences so far whose loss was not finite."""


class ExponentiatedGradient:
    """The algorithm with its parameters; everything that changes is in `ExponentiatedGradientState`."""

    name: ClassVar[str] = "exponentiated-gradient"
    learned: ClassVar[tuple[str, ...]] = ("score",)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Parameters of exponentiated gradient, with the defaults of DoReMi."""

        variant: Literal["doremi", "sheared-llama"] = "doremi"
        """The source of the defaults of `smoothing` and `statistics`. The score is max(loss - reference, 0) in both."""
        eta: float = 1.0
        """Step size per nat."""
        smoothing: float | None = None
        """Share that is distributed evenly. Null means 0.001 for doremi and 0.0001 for sheared-llama."""
        reference_losses: tuple[float, ...] = ()
        """Loss of each domain to compare with, in nats: a list in the order of the domains, a mapping of domain names,
        or the path of a JSON file with such a mapping. Required, unless `from_run` is given."""
        statistics: StatisticsChoice | None = None
        """Learn from the losses of `train` steps, or from `heldout` losses. Null means train for doremi, heldout for
        sheared-llama."""
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
            return SMOOTHING[self.variant] if self.smoothing is None else self.smoothing

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def statistics(self) -> StatisticsChoice:
        """The losses that the algorithm learns from."""
        by_variant: StatisticsChoice = "train" if self.config.variant == "doremi" else "heldout"
        return self.config.statistics or by_variant

    def floor(self, num_domains: int) -> float:
        """Return the lower bound of every weight after the first update."""
        return weight_floor(num_domains, delta_min=self.config.delta_min, floor_share=self.config.floor_share)

    def start(self, prior: NDArray[np.float64]) -> ExponentiatedGradientState:
        """Return the initial state, with the mixture `prior`.

        Raises:
            ConfigError: there is not one reference loss per domain.
        """
        prior = check_prior(prior)
        num_references = len(self.config.reference_losses)
        if not num_references:
            raise ConfigError(NO_REFERENCES)
        if num_references != len(prior):
            raise ConfigError(
                f"{CONFIG_KEY}.reference_losses has {num_references} numbers, but the mixture has {len(prior)} "
                "domains. Give one per domain, in the order of the mixture."
            )
        return ExponentiatedGradientState(
            step=0,
            weights=prior,
            smoothed=prior,
            score=np.zeros(len(prior)),
            average=prior,
            num_nonfinite=np.zeros(len(prior), np.int64),
        )

    def update(
        self, state: ExponentiatedGradientState, statistics: DomainStatistics
    ) -> tuple[ExponentiatedGradientState, NDArray[np.float64]]:
        """Return the state after one more step, and the mixture; shape (num_domains,)."""
        size = len(state.weights)
        step = state.step + 1
        config = self.config

        # Excess loss in nats. A domain that is absent from this step keeps its last score.
        excess = np.maximum(statistics.loss_mean - np.asarray(config.reference_losses), 0.0)
        score = np.where(statistics.observed, excess, state.score)

        # Subtracting the maximum avoids overflow.
        exponent = config.eta * score
        raised = state.smoothed * np.exp(exponent - exponent.max())
        smoothed = (1 - config.smoothed) * raised / raised.sum() + config.smoothed / size
        weights = project_to_bounds(smoothed, self.floor(size))
        new_state = ExponentiatedGradientState(
            step=step,
            weights=weights,
            smoothed=smoothed,
            score=score,
            average=state.average + (weights - state.average) / step,
            num_nonfinite=state.num_nonfinite + statistics.num_nonfinite,
        )
        return new_state, weights

    def describe(self, state: ExponentiatedGradientState) -> dict[str, NDArray[Any]]:
        """Return the arrays that a report shows; shape (num_domains,) each."""
        return {
            "weight": state.weights,
            "average_weight": state.average,
            "score": state.score,
            "reference_loss": np.array(self.config.reference_losses),
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


_PER_DOMAIN = ("weights", "smoothed", "score", "average", "num_nonfinite")
