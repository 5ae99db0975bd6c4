"""Mixing algorithms: compute the mixture of a later step from the statistics of earlier ones.

A mixing algorithm is a pure function of values. It reads no clock, no file and no random numbers, and does not know
about ranks: the same statistics give the same weights on every machine that has the state. This file registers the
algorithms of this package; all of them pass the checks of `mixtera_hpc.testing.mixing`. An algorithm of the user's is
named by its import path (`examples/mixing_algorithm.py`).
"""

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.ado import Ado
from mixtera_hpc.core.mixing.aioli import Aioli
from mixtera_hpc.core.mixing.exponentiated_gradient import ExponentiatedGradient
from mixtera_hpc.core.mixing.loss_proportional import LossProportional
from mixtera_hpc.core.mixing.odm import OnlineDataMixing
from mixtera_hpc.core.mixing.parameters import CONFIG_KEY, StatisticsChoice, parse_parameters, valid_options
from mixtera_hpc.core.mixing.skill_it import SkillIt
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.errors import USER_CODE_ERRORS, ConfigError, did_you_mean

__all__ = ["ALGORITHMS", "MixingAlgorithm", "MixingState", "learns_from", "make_algorithm"]


class MixingState(Protocol):
    """The state of an algorithm: immutable, and sufficient to resume from."""

    @property
    def step(self) -> int:
        """Number of updates so far."""

    @property
    def weights(self) -> NDArray[np.float64]:
        """The present mixture; shape (num_domains,), sum 1."""


State = TypeVar("State", bound=MixingState)


class MixingAlgorithm(Protocol[State]):
    """A pure state machine: call `start` once, then `update` after every optimizer step.

    A domain without sequences in a step keeps its learned values. Losses that are not finite are ignored and counted.
    Weights are finite and sum to 1. Once they have left the initial mixture, they are at least `floor`.
    """

    @property
    def name(self) -> str:
        """The value of `mixture.algorithm.name`."""

    @property
    def learned(self) -> tuple[str, ...]:
        """The entries of `describe` that change only with the losses of the same domain."""

    def floor(self, num_domains: int) -> float:
        """Return the smallest weight that the algorithm gives a domain."""

    def start(self, prior: NDArray[np.float64]) -> State:
        """Return the initial state, with the mixture `prior`; shape (num_domains,).

        Raises:
            MixtureError: `prior` is not a distribution.
        """

    def update(self, state: State, statistics: DomainStatistics) -> tuple[State, NDArray[np.float64]]:
        """Return the state after one more optimizer step, and its weights; shape (num_domains,)."""

    def describe(self, state: State) -> dict[str, NDArray[Any]]:
        """Return the arrays that a report shows, with `weight` and `num_nonfinite`; shape (num_domains,) each."""

    def state_arrays(self, state: State) -> dict[str, NDArray[Any]]:
        """Return the state as flat arrays of numbers and text, for an npz file without pickle."""

    def state_from_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> State:
        """Restore what `state_arrays` returned, bit for bit.

        Raises:
            ConfigError: another algorithm wrote the arrays.
        """


ALGORITHMS: Mapping[str, Any] = MappingProxyType(
    {a.name: a for a in (Ado, Aioli, ExponentiatedGradient, LossProportional, OnlineDataMixing, SkillIt)}
)
"""Name → class with a nested `Config`."""

REQUIRED_NAMES = ("Config", "describe", "floor", "start", "state_arrays", "state_from_arrays", "update")
"""Attributes and methods that a class of the user's must have."""


def make_algorithm(name: str, parameters: Mapping[str, Any]) -> MixingAlgorithm[Any]:
    """Build the algorithm called `name`, with `parameters` in place of its defaults.

    Args:
        name: a key of `ALGORITHMS`, or the import path of a class, such as `my_package.MyAlgorithm`.
        parameters: values of the fields of its `Config`.

    Raises:
        ConfigError: an unknown name or parameter, with near misses and the valid ones; a wrong type or range.
    """
    algorithm = _import_algorithm(name) if "." in name else ALGORITHMS.get(name)
    if algorithm is None:
        raise ConfigError(
            f"{CONFIG_KEY}.name is {name!r}, which is not a mixing algorithm.{valid_options(name, tuple(ALGORITHMS))}"
        )
    made: MixingAlgorithm[Any] = algorithm(parse_parameters(algorithm.Config, parameters))
    return made


def learns_from(algorithm: MixingAlgorithm[Any]) -> StatisticsChoice:
    """Return which losses an algorithm learns from; those of training steps unless it says otherwise."""
    choice: StatisticsChoice = getattr(algorithm, "statistics", "train")
    return choice


def _import_algorithm(path: str) -> Any:
    """Import the class `package.module.Class`.

    Raises:
        ConfigError: it cannot be imported, or is not a mixing algorithm.
    """
    module_name, _, class_name = path.rpartition(".")
    # Importing runs the user's code, which may raise anything.
    try:
        module = importlib.import_module(module_name)
    except USER_CODE_ERRORS as error:
        raise ConfigError(
            f"{CONFIG_KEY}.name is {path!r}, but {module_name} cannot be imported: {type(error).__name__}: {error}.\n"
            f"  Add its folder to PYTHONPATH, or choose one of: {', '.join(sorted(ALGORITHMS))}."
        ) from None
    algorithm = getattr(module, class_name, None)
    if algorithm is None:
        raise ConfigError(
            f"{CONFIG_KEY}.name is {path!r}, but {module_name} has no {class_name}."
            f"{did_you_mean(class_name, [name for name, value in vars(module).items() if isinstance(value, type)])}"
        )
    if missing := [name for name in REQUIRED_NAMES if not hasattr(algorithm, name)]:
        raise ConfigError(
            f"{CONFIG_KEY}.name is {path!r}, which has no {', '.join(missing)}.\n"
            "  Derive it from mixtera_hpc.core.mixing.simple_algorithm.SimpleAlgorithm, as "
            "examples/mixing_algorithm.py does."
        )
    return algorithm
