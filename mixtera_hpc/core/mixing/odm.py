"""Online Data Mixing: a bandit (EXP3) that serves more of the domains whose loss is high.

Each observed domain's reward is its loss divided by its weight, so that rarely served ones are not forgotten; rewards are
averaged with decay and turned into weights by a softmax whose sharpness and exploration shrink as the run goes on.
Price: O(domains) per step, no history.
Source: arXiv 2312.02406, algorithm 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.bounds import project_to_bounds, weight_floor
from mixtera_hpc.core.mixing.parameters import check_origin, check_prior, check_range
from mixtera_hpc.core.statistics import DomainStatistics

__all__ = ["OnlineDataMixing", "OnlineDataMixingState"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OnlineDataMixingState:
    """What the bandit knows after `step` updates; arrays have shape (num_domains,)."""

    step: int
    weights: NDArray[np.float64]
    reward: NDArray[np.float64]
    """R: decayed mean of loss / weight, nats."""
    num_nonfinite: NDArray[np.int64]
    """Sequences so far whose loss was not finite."""


class OnlineDataMixing:
    """The algorithm with its parameters; all memory is in `OnlineDataMixingState`."""

    name: ClassVar[str] = "odm"
    learned: ClassVar[tuple[str, ...]] = ("reward",)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Parameters of online data mixing."""

        decay: float = 0.9
        """How much of the old reward an observation leaves in place."""
        delta_min: float = 0.01
        """Smallest weight of a domain."""
        floor_share: float = 0.25
        """With many domains the smallest weight is this divided by their number, so that floors together take no more."""

        def __post_init__(self) -> None:
            for name in ("decay", "delta_min", "floor_share"):
                check_range(name, getattr(self, name), 0, 1)

    def __init__(self, config: Config) -> None:
        self.config = config

    def floor(self, num_domains: int) -> float:
        """What every weight stays above, once it has moved."""
        return weight_floor(num_domains, delta_min=self.config.delta_min, floor_share=self.config.floor_share)

    def start(self, prior: NDArray[np.float64]) -> OnlineDataMixingState:
        """Begin with the mixture `prior`, which the first update forgets."""
        prior = check_prior(prior)
        nothing = np.zeros(len(prior))
        return OnlineDataMixingState(step=0, weights=prior, reward=nothing, num_nonfinite=nothing.astype(np.int64))

    def update(
        self, state: OnlineDataMixingState, statistics: DomainStatistics
    ) -> tuple[OnlineDataMixingState, NDArray[np.float64]]:
        """Take in one optimizer step; returns the new state and the mixture, shape (num_domains,)."""
        size, step = len(state.weights), state.step + 1
        before, now = _exploration(size, step - 1), _exploration(size, step)
        # The bandit's own weights never fall below its exploration; a prior may.
        fresh = statistics.loss_mean / np.maximum(state.weights, before)
        averaged = self.config.decay * state.reward + (1 - self.config.decay) * fresh
        reward = np.where(statistics.observed, averaged, state.reward)
        sharp = np.exp(before * (reward - reward.max()))
        weights = project_to_bounds((1 - size * now) * sharp / sharp.sum() + now, self.floor(size))
        nonfinite = state.num_nonfinite + statistics.num_nonfinite
        return OnlineDataMixingState(step=step, weights=weights, reward=reward, num_nonfinite=nonfinite), weights

    def describe(self, state: OnlineDataMixingState) -> dict[str, NDArray[Any]]:
        """What a report shows of every domain; shape (num_domains,) each."""
        return {"weight": state.weights, "reward": state.reward, "num_nonfinite": state.num_nonfinite}

    def state_arrays(self, state: OnlineDataMixingState) -> dict[str, NDArray[Any]]:
        """The state as flat arrays, for an npz file without pickle."""
        return {
            "origin": np.array(self.name),
            "step": np.array(state.step),
            "weights": state.weights,
            "reward": state.reward,
            "num_nonfinite": state.num_nonfinite,
        }

    def state_from_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> OnlineDataMixingState:
        """The inverse of `state_arrays`.

        Raises:
            ConfigError: another algorithm wrote them.
        """
        check_origin(arrays, self.name)
        values = {name: arrays[name] for name in ("weights", "reward", "num_nonfinite")}
        return OnlineDataMixingState(step=int(arrays["step"]), **values)


def _exploration(num_domains: int, step: int) -> float:
    """The share every domain gets whatever its reward; all of it at step 0."""
    decayed = np.sqrt(np.log(num_domains) / (num_domains * step)) if step else np.inf
    return float(min(1.0 / num_domains, decayed))
