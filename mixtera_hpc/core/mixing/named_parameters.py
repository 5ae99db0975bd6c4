"""Parameters of mixing algorithms that have one value per domain: written by name, or taken from a file or a run.

An algorithm gets lists in the order of its domains. This module says which parameters may be written in another form,
and turns a mapping of domain names into a list. It reads no file.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mixtera_hpc.core.mixing.parameters import CONFIG_KEY
from mixtera_hpc.errors import ConfigError, did_you_mean

__all__ = ["FROM_RUN", "NAMED_PARAMETERS", "named_form", "resolve_named"]

NAMED_PARAMETERS = ("reference_losses", "graph")
"""Parameters that may be a mapping of domain names, or the path of a JSON file with one."""

FROM_RUN = "from_run"
"""Parameter that takes `reference_losses` from the losses of a run."""

Loader = Callable[[str, str], Any]
"""Function of a parameter's name and a path or run: returns what it holds."""


def named_form(parameters: Mapping[str, Any]) -> bool:
    """Return True if a parameter is written in another form than a list.

    Raises:
        ConfigError: the reference losses are given twice.
    """
    if FROM_RUN in parameters and parameters.get("reference_losses"):
        raise ConfigError(f"{CONFIG_KEY} has both from_run and reference_losses. Remove one of them.")
    return FROM_RUN in parameters or any(isinstance(parameters.get(n), str | Mapping) for n in NAMED_PARAMETERS)


def resolve_named(
    parameters: Mapping[str, Any], names: Sequence[str], mixed: Sequence[int], load: Loader
) -> dict[str, Any]:
    """Return the parameters with lists in the order of the mixed domains.

    Args:
        parameters: as written.
        names: names of all domains of the run.
        mixed: the domain_ids that the algorithm mixes.
        load: reads what `from_run`, or the path of a file, names.

    Raises:
        ConfigError: a domain has no value, or a name is unknown.
    """
    resolved = dict(parameters)
    if FROM_RUN in resolved:
        resolved["reference_losses"] = load(FROM_RUN, str(resolved.pop(FROM_RUN)))
    for parameter in NAMED_PARAMETERS:
        value = resolved.get(parameter)
        is_inline = isinstance(value, Mapping) and FROM_RUN not in parameters
        if isinstance(value, str):
            value = load(parameter, value)
        if isinstance(value, Mapping):
            if is_inline:
                _check_known(parameter, value, names)
            mixed_names = [names[domain] for domain in mixed]
            resolved[parameter] = (
                _graph(value, mixed_names) if parameter == "graph" else _list_by_name(parameter, value, mixed_names)
            )
        elif isinstance(value, list | tuple):
            resolved[parameter] = _of_mixed(value, len(names), mixed)
    return resolved


def _list_by_name(parameter: str, values: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """Return the values in the order of `names`; a domain is named in full (`source=web`), or by its value (`web`).

    Raises:
        ConfigError: a domain has no value.
    """
    keys = [_key_of(name, values) for name in names]
    missing = [name for name, key in zip(names, keys, strict=True) if key is None]
    if missing:
        raise ConfigError(
            f"{CONFIG_KEY}.{parameter} has no value for domain {missing[0]!r}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}.{did_you_mean(missing[0], list(values))}"
        )
    return [values[key] for key in keys if key is not None]


def _graph(values: Mapping[str, Any], names: Sequence[str]) -> list[list[float]]:
    """Return a matrix from `{trained: {helped: number}}`; a domain helps itself by 1 unless it says otherwise."""
    rows = []
    for i, name in enumerate(names):
        key = _key_of(name, values)
        row = values[key] if key is not None else {}
        if not isinstance(row, Mapping):
            raise ConfigError(f"{CONFIG_KEY}.graph[{name!r}] is {row!r}, expected domain names and numbers.")
        keys = [_key_of(other, row) for other in names]
        rows.append([float(row[k]) if k is not None else float(i == j) for j, k in enumerate(keys)])
    return rows


def _key_of(name: str, values: Mapping[str, Any]) -> str | None:
    """Return the key that names a domain: its name, or its value without the property."""
    if name in values:
        return name
    short = name.partition("=")[2] if name.count("=") == 1 else ""
    return short if short and short in values else None


def _check_known(parameter: str, values: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse a key that names no domain: it is a typing error."""
    known = {*names, *(name.partition("=")[2] for name in names if name.count("=") == 1)}
    if unknown := [key for key in values if str(key) not in known]:
        raise ConfigError(
            f"{CONFIG_KEY}.{parameter} names {unknown[0]!r}, which is not a domain."
            f"{did_you_mean(str(unknown[0]), list(names))}"
        )


def _of_mixed(value: Sequence[Any], num_domains: int, mixed: Sequence[int]) -> Sequence[Any]:
    """Return the part of a list, or of a list of lists, that belongs to the mixed domains."""
    if len(value) != num_domains or len(mixed) == num_domains:
        return value
    rows = [value[domain] for domain in mixed]
    return [_of_mixed(row, num_domains, mixed) if isinstance(row, list | tuple) else row for row in rows]
