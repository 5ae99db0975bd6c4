"""A base class for mixing algorithms of a few lines: the state is a set of named arrays.

A subclass says what it learns from a step, and which weights follow. Counting, floors, saving and restoring are here.
`examples/mixing_algorithm.py` is a complete algorithm of your own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.bounds import project_to_bounds, weight_floor
from mixtera_hpc.core.mixing.parameters import StatisticsChoice, check_origin, check_prior
from mixtera_hpc.core.statistics import DomainStatistics

__all__ = ["ArrayState", "SimpleAlgorithm", "Values"]

Values = Mapping[str, NDArray[Any]]
"""Name → array; any shape. Those of shape (num_domains,) are reported."""

VALUE_PREFIX = "value_"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArrayState:
    """The state after `step` updates; arrays have shape (num_domains,) unless stated otherwise."""

    step: int
    prior: NDArray[np.float64]
    """The mixture that the run started with."""
    weights: NDArray[np.float64]
    """The present mixture."""
    num_nonfinite: NDArray[np.int64]
    """Sequences so far whose loss was not finite."""
    values: Values
    """The learned values; any shapes."""


class SimpleAlgorithm:
    """An algorithm whose subclass implements `learn`, and `begin` if it keeps values.

    A parameter `delta_min` of the subclass's `Config` replaces the floor of 0.01; a parameter `statistics` says which
    losses it learns from.
    """

    name: ClassVar[str] = "simple"
    learned: ClassVar[tuple[str, ...]] = ()
    """The values that change only with the losses of the same domain."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """No parameters."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def begin(self, prior: NDArray[np.float64]) -> Values:
        """Return the values that a run begins with."""
        return {}

    def learn(self, state: ArrayState, statistics: DomainStatistics) -> tuple[Values, NDArray[np.float64]]:
        """Return the values after one more step, and the requested weights, of any positive scale."""
        raise NotImplementedError

    @property
    def statistics(self) -> StatisticsChoice:
        """The losses that the algorithm learns from."""
        choice: StatisticsChoice = getattr(self.config, "statistics", "train")
        return choice

    def floor(self, num_domains: int) -> float:
        """Return the lower bound of every weight after the first update."""
        return weight_floor(
            num_domains,
            delta_min=getattr(self.config, "delta_min", 0.01),
            floor_share=getattr(self.config, "floor_share", 0.25),
        )

    def start(self, prior: NDArray[np.float64]) -> ArrayState:
        """Return the initial state, with the mixture `prior`."""
        prior = check_prior(prior)
        return ArrayState(
            step=0,
            prior=prior,
            weights=prior,
            num_nonfinite=np.zeros(len(prior), np.int64),
            values=self.begin(prior),
        )

    def update(self, state: ArrayState, statistics: DomainStatistics) -> tuple[ArrayState, NDArray[np.float64]]:
        """Return the state after one more step, and the mixture; shape (num_domains,)."""
        values, requested = self.learn(state, statistics)
        total = requested.sum()
        requested = requested / total if total > 0 else state.prior
        weights = project_to_bounds(requested, self.floor(len(requested)))
        new_state = ArrayState(
            step=state.step + 1,
            prior=state.prior,
            weights=weights,
            num_nonfinite=state.num_nonfinite + statistics.num_nonfinite,
            values=values,
        )
        return new_state, weights

    def describe(self, state: ArrayState) -> dict[str, NDArray[Any]]:
        """Return the arrays that a report shows; shape (num_domains,) each."""
        shown = {name: array for name, array in state.values.items() if array.shape == state.weights.shape}
        return {"weight": state.weights, "num_nonfinite": state.num_nonfinite, **shown}

    def state_arrays(self, state: ArrayState) -> dict[str, NDArray[Any]]:
        """Return the state as flat arrays, for an npz file without pickle."""
        return {
            "origin": np.array(self.name),
            "step": np.array(state.step),
            "prior": state.prior,
            "weights": state.weights,
            "num_nonfinite": state.num_nonfinite,
            **{f"{VALUE_PREFIX}{name}": array for name, array in state.values.items()},
        }

    def state_from_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> ArrayState:
        """Restore what `state_arrays` returned.

        Raises:
            ConfigError: another algorithm wrote the arrays.
        """
        check_origin(arrays, self.name)
        return ArrayState(
            step=int(arrays["step"]),
            **{name: arrays[name] for name in ("prior", "weights", "num_nonfinite")},
            values={k.removeprefix(VALUE_PREFIX): v for k, v in arrays.items() if k.startswith(VALUE_PREFIX)},
        )
