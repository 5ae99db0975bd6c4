"""Comma lists and ranges in overrides, multiplied out. Hydra's own grammar, so habits carry over."""

import itertools
from collections.abc import Sequence

from mixtera_hpc.config.compose import TEXT_KEYS
from mixtera_hpc.errors import ConfigError

__all__ = ["expand"]


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of the values listed; the last override varies fastest.

    Raises:
        ConfigError: an override that does not parse, or a sweep over values that cannot be listed.
    """
    return [list(point) for point in itertools.product(*(_values(override) for override in overrides))]


def _values(override: str) -> list[str]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        if override.partition("=")[0] in TEXT_KEYS:
            return [override]
        raise ConfigError(
            f"{override!r} is not an override: {error}\n  Write key=value, or key=a,b,c to sweep."
        ) from None
    if not parsed.is_sweep_override():
        return [override]
    if "glob(" in override or not parsed.is_discrete_sweep():
        raise ConfigError(f"{override!r} cannot be multiplied out. List the values: {parsed.get_key_element()}=a,b,c.")
    key = parsed.get_key_element()
    if key in TEXT_KEYS:  # Taken as typed: what Hydra would escape stays as it is.
        typed = zip(parsed.sweep_iterator(), parsed.sweep_string_iterator(), strict=True)
        return [f"{key}={value if type(value) is str else text}" for value, text in typed]
    return [f"{key}={text}" for text in parsed.sweep_string_iterator()]
