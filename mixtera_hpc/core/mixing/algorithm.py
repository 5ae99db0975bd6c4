"""Mixing algorithms: how statistics of a step become the mixture of a later one.

A mixing algorithm is a pure function of values. It reads no clock, no file and no random numbers, and it never sees a rank:
the same statistics give the same weights on every machine that holds the state. Three are registered here; all of them pass
`mixtera_hpc.testing.mixing`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.ado import Ado
from mixtera_hpc.core.mixing.exponentiated_gradient import ExponentiatedGradient
from mixtera_hpc.core.mixing.odm import OnlineDataMixing
from mixtera_hpc.core.mixing.parameters import CONFIG_KEY, parse_parameters, valid_options
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.errors import ConfigError

__all__ = ["ALGORITHMS", "MixingAlgorithm", "MixingState", "make_algorithm"]


class MixingState(Protocol):
    """What an algorithm remembers: immutable, and everything there is to resume from."""

    @property
    def step(self) -> int:
        """Updates so far."""

    @property
    def weights(self) -> NDArray[np.float64]:
        """The mixture now; shape (num_domains,), sum 1."""


State = TypeVar("State", bound=MixingState)


class MixingAlgorithm(Protocol[State]):
    """Value in, value out: `start` once, then `update` after every optimizer step.

    A domain that no sequence of a step belongs to keeps what was learned of it. Losses that are not finite are left out
    and counted. Weights are finite, sum to 1 and stay at or above `floor` as soon as they have left the starting mixture.
    """

    @property
    def name(self) -> str:
        """What users write as `mixture.algorithm.name`."""

    @property
    def learned(self) -> tuple[str, ...]:
        """The entries of `describe` that only a domain's own losses change."""

    def floor(self, num_domains: int) -> float:
        """The smallest weight the algorithm gives a domain."""

    def start(self, prior: NDArray[np.float64]) -> State:
        """Begin with the mixture `prior`, shape (num_domains,).

        Raises:
            MixtureError: `prior` is not a distribution.
        """

    def update(self, state: State, statistics: DomainStatistics) -> tuple[State, NDArray[np.float64]]:
        """Take in one optimizer step; returns the new state and its weights, shape (num_domains,)."""

    def describe(self, state: State) -> dict[str, NDArray[Any]]:
        """What a report shows, `weight` and `num_nonfinite` among it; shape (num_domains,) each."""

    def state_arrays(self, state: State) -> dict[str, NDArray[Any]]:
        """The state as flat arrays of numbers and text, for an npz file without pickle."""

    def state_from_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> State:
        """The inverse of `state_arrays`, bit for bit.

        Raises:
            ConfigError: another algorithm wrote them.
        """


ALGORITHMS: Mapping[str, Any] = MappingProxyType({a.name: a for a in (Ado, ExponentiatedGradient, OnlineDataMixing)})
"""Name → class with a nested `Config`."""


def make_algorithm(name: str, parameters: Mapping[str, Any]) -> MixingAlgorithm[Any]:
    """The algorithm users call `name`, with `parameters` over its defaults.

    Raises:
        ConfigError: an unknown name or parameter, with near misses and the valid ones; a wrong type or range.
    """
    if name not in ALGORITHMS:
        raise ConfigError(
            f"{CONFIG_KEY}.name is {name!r}, which is no mixing algorithm.{valid_options(name, tuple(ALGORITHMS))}"
        )
    algorithm = ALGORITHMS[name]
    made: MixingAlgorithm[Any] = algorithm(parse_parameters(algorithm.Config, parameters))
    return made
