"""Parameters of mixing algorithms: convert the written values to a checked, frozen dataclass."""

import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import ConfigError, MixtureError, did_you_mean

__all__ = [
    "CONFIG_KEY",
    "StatisticsChoice",
    "check_origin",
    "check_prior",
    "check_range",
    "parse_parameters",
    "valid_options",
]

CONFIG_KEY = "mixture.algorithm"
"""Key of these parameters in the configuration."""

StatisticsChoice = Literal["train", "heldout"]
"""The losses that an algorithm learns from: those of training steps, or those of held-out samples."""

C = TypeVar("C")


def parse_parameters(config_class: type[C], parameters: Mapping[str, Any]) -> C:
    """Build `config_class`, a flat dataclass of numbers, choices and tuples of numbers, from a plain mapping.

    Raises:
        ConfigError: an unknown parameter, with near misses, or a value of the wrong type or out of range.
    """
    hints = get_type_hints(config_class)
    for name in parameters:
        if name not in hints:
            raise ConfigError(
                f"{CONFIG_KEY}.{name} is not a parameter of this algorithm.{valid_options(name, tuple(hints))}"
            )
    return config_class(
        **{name: _value(hints[name], value, f"{CONFIG_KEY}.{name}") for name, value in parameters.items()}
    )


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise `ConfigError` unless low <= value <= high."""
    if not low <= value <= high:
        bounds = f"between {low:g} and {high:g}" if np.isfinite(high) else f"at least {low:g}"
        raise ConfigError(f"{CONFIG_KEY}.{name} is {value!r}, expected a number {bounds}.")


def check_prior(prior: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the initial mixture as float64.

    Raises:
        MixtureError: it is not a finite distribution.
    """
    prior = np.array(prior, np.float64)
    if prior.ndim != 1 or not len(prior):
        raise MixtureError(f"The initial mixture has shape {prior.shape}, expected one weight per domain.")
    if not (np.isfinite(prior).all() and (prior >= 0).all() and abs(prior.sum() - 1) <= 1e-6):
        raise MixtureError(
            f"The initial mixture spans {prior.min():.6g} to {prior.max():.6g} and sums to {prior.sum():.6g}; "
            f"weights must be finite, at least 0 and sum to 1."
        )
    return prior


def check_origin(arrays: Mapping[str, NDArray[Any]], origin: str) -> None:
    """Refuse a saved state that another algorithm or variant wrote.

    Raises:
        ConfigError: names both.
    """
    written_by = str(arrays["origin"]) if "origin" in arrays else "something else"
    if written_by != origin:
        raise ConfigError(
            f"{CONFIG_KEY} is {origin}, but the saved mixing state was written by {written_by}. "
            f"Restore the old {CONFIG_KEY}, or start a new run."
        )


def valid_options(value: Any, valid: tuple[str, ...]) -> str:
    """Return the end of a message about a wrong name: near misses, then all valid names."""
    near = did_you_mean(str(value), valid)
    near = near if near.startswith(" Did") else ""
    return f"{near} Valid: {', '.join(sorted(valid))}."


def _value(hint: Any, value: Any, path: str) -> Any:
    """Return a written value as the type `hint`; refuse another type, naming `path`."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{path} is {value!r}.{valid_options(value, get_args(hint))}")
        return value
    # `int | None`: null is a value, everything else must have the other type.
    if get_origin(hint) in (Union, types.UnionType):
        inner = [kind for kind in get_args(hint) if kind is not type(None)]
        return None if value is None else _value(inner[0], value, path)
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(
                f"{path} is {value!r}, expected a list of numbers, one per domain. Write {path}=[{value}]."
            )
        return tuple(_value(get_args(hint)[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    # YAML writes 1 for 1.0, and `bool` is a subclass of `int`.
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{path} is {value!r}, expected {_TYPE_NAMES[hint]}.")
    return value


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
