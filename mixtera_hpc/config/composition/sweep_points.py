"""Expand comma lists and ranges in overrides, with Hydra's own grammar."""

import itertools
from collections.abc import Sequence

from mixtera_hpc.config.composition.override_words import is_text_key, quote_entries, sweep_values
from mixtera_hpc.errors import ConfigError

__all__ = ["expand", "swept_keys"]


def swept_keys(overrides: Sequence[str]) -> list[str]:
    """Return the keys of the overrides that list several values.

    Raises:
        ConfigError: see `expand`.
    """
    return [word.partition("=")[0].lstrip("+") for word in overrides if len(_values(word)) > 1]


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Return every combination of the listed values; the last override varies fastest.

    Raises:
        ConfigError: an override does not parse, or lists values that cannot be enumerated.
    """
    return [list(point) for point in itertools.product(*(_values(override) for override in overrides))]


def _values(override: str) -> list[str]:
    from hydra.core.override_parser.overrides_parser import OverridesParser  # Slow to import.
    from hydra.errors import HydraException

    key = override.partition("=")[0]
    try:
        is_sweep = OverridesParser.create().parse_override(quote_entries(override)).is_sweep_override()
    except HydraException as error:
        if is_text_key(key):
            return [override]
        raise ConfigError(
            f"{override!r} is not an override: {error}\n  Write key=value, or key=a,b,c to sweep."
        ) from None
    if not is_sweep:
        return [override]

    values = sweep_values(override)
    if not values:
        raise ConfigError(f"{override!r} cannot be multiplied out. List the values: {key}=a,b,c.")
    return [f"{key}={value}" for value in values]
