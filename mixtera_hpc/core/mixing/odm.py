"""Online Data Mixing: a bandit (EXP3) that serves more of the domains whose loss is high.

The reward of an observed domain is its loss divided by the weight that it was served with, so that rarely served
domains are not neglected. Rewards are averaged with decay and turned into weights by a softmax, whose sharpness and
exploration shrink during the run. The code that the authors released differs: the reward is exp(loss), is not divided
by the weight, and weights are proportional to rewards. Price: O(domains) per step, no history. Sources: arXiv
2312.02406, algorithm 1; the authors' released code (`group_update`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.bounds import project_to_bounds, weight_floor
from mixtera_hpc.core.mixing.parameters import check_origin, check_prior, check_range
from mixtera_hpc.core.statistics import DomainStatistics

__all__ = ["OnlineDataMixing", "OnlineDataMixingState"]

MAX_LOSS = 100.0
"""Larger losses count as this many nats in an exponential, which would overflow."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OnlineDataMixingState:
    """The state of the bandit after `step` updates; arrays have shape (num_domains,)."""

    step: int
    weights: NDArray[np.float64]
    reward: NDArray[np.float64]
    """R: decayed mean of loss / weight, nats; for `released`, of exp(loss)."""
    num_nonfinite: NDArray[np.int64]
    """Sequences so far whose loss was not finite."""


class OnlineDataMixing:
    """The algorithm with its parameters; everything that changes is in `OnlineDataMixingState`."""

    name: ClassVar[str] = "odm"
    learned: ClassVar[tuple[str, ...]] = ("reward",)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Parameters of online data mixing."""

        variant: Literal["paper", "released"] = "paper"
        """The algorithm of the paper, or that of the authors' released code."""
        decay: float = 0.9
        """Share of the old reward that remains after an observation."""
        delta_min: float = 0.01
        """Smallest weight of a domain."""
        floor_share: float = 0.25
        """All floors together take at most this share: with many domains the smallest weight is this divided by their
        number."""

        def __post_init__(self) -> None:
            for name in ("decay", "delta_min", "floor_share"):
                check_range(name, getattr(self, name), 0, 1)

    def __init__(self, config: Config) -> None:
        self.config = config

    def floor(self, num_domains: int) -> float:
        """Return the lower bound of every weight after the first update."""
        return weight_floor(num_domains, delta_min=self.config.delta_min, floor_share=self.config.floor_share)

    def start(self, prior: NDArray[np.float64]) -> OnlineDataMixingState:
        """Return the initial state; the mixture `prior` holds until the first update."""
        prior = check_prior(prior)
        return OnlineDataMixingState(
            step=0,
            weights=prior,
            reward=np.zeros(len(prior)),
            num_nonfinite=np.zeros(len(prior), np.int64),
        )

    def update(
        self, state: OnlineDataMixingState, statistics: DomainStatistics
    ) -> tuple[OnlineDataMixingState, NDArray[np.float64]]:
        """Return the state after one more optimizer step, and the mixture; shape (num_domains,)."""
        size = len(state.weights)
        step = state.step + 1
        exploration_before = _exploration(size, step - 1)
        exploration = _exploration(size, step)

        if self.config.variant == "released":
            observed_reward = np.exp(np.minimum(statistics.loss_mean, MAX_LOSS))
        else:
            # The weights of the bandit never fall below its exploration, but those of a prior may: bound the divisor.
            served = state.weights if statistics.weights is None else statistics.weights
            observed_reward = statistics.loss_mean / np.maximum(served, exploration_before)
        averaged = self.config.decay * state.reward + (1 - self.config.decay) * observed_reward
        reward = np.where(statistics.observed, averaged, state.reward)

        explored = (1 - size * exploration) * self._shares(reward, exploration_before) + exploration
        weights = project_to_bounds(explored, self.floor(size))
        new_state = OnlineDataMixingState(
            step=step,
            weights=weights,
            reward=reward,
            num_nonfinite=state.num_nonfinite + statistics.num_nonfinite,
        )
        return new_state, weights

    def _shares(self, reward: NDArray[np.float64], sharpness: float) -> NDArray[np.float64]:
        """Return the shares that follow from the rewards, sum 1."""
        if self.config.variant == "released":
            return reward / reward.sum() if reward.sum() > 0 else np.full(len(reward), 1 / len(reward))
        # Subtracting the maximum avoids overflow.
        sharp = np.exp(sharpness * (reward - reward.max()))
        shares: NDArray[np.float64] = sharp / sharp.sum()
        return shares

    def describe(self, state: OnlineDataMixingState) -> dict[str, NDArray[Any]]:
        """Return the arrays that a report shows; shape (num_domains,) each."""
        return {"weight": state.weights, "reward": state.reward, "num_nonfinite": state.num_nonfinite}

    def state_arrays(self, state: OnlineDataMixingState) -> dict[str, NDArray[Any]]:
        """Return the state as flat arrays, for an npz file without pickle."""
        return {
            "origin": np.array(self._origin),
            "step": np.array(state.step),
            "weights": state.weights,
            "reward": state.reward,
            "num_nonfinite": state.num_nonfinite,
        }

    def state_from_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> OnlineDataMixingState:
        """Restore what `state_arrays` returned.

        Raises:
            ConfigError: another algorithm wrote the arrays.
        """
        check_origin(arrays, self._origin)
        values = {name: arrays[name] for name in ("weights", "reward", "num_nonfinite")}
        return OnlineDataMixingState(step=int(arrays["step"]), **values)

    @property
    def _origin(self) -> str:
        return f"{self.name} variant={self.config.variant}"


def _exploration(num_domains: int, step: int) -> float:
    """Return the share that every domain gets independent of its reward; at step 0 the whole mixture."""
    decayed = np.sqrt(np.log(num_domains) / (num_domains * step)) if step else np.inf
    return float(min(1.0 / num_domains, decayed))
