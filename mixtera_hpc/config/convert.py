"""Convert nested dicts to frozen dataclasses and back. All problems are listed at once."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

from mixtera_hpc.errors import ConfigError, did_you_mean

__all__ = ["NOT_GIVEN", "from_plain", "leaves", "missing_key", "raise_problems", "to_plain", "unknown_key"]

T = TypeVar("T")

NOT_GIVEN = "???"
"""OmegaConf's marker of a value that the user has to give."""

_OTHER_PLACES = {
    "training.checkpoint_every": "checkpoint.every_steps",
    "training.keep_checkpoints": "checkpoint.keep",
    "query.split": "--split of the verbs query and plan",
    "query.drop": "--drop of the verb resume",
}
"""Keys that do not exist but are looked for, and the place of their setting."""

_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def from_plain(cls: type[T], data: Mapping[str, Any], path: str = "") -> T:
    """Build the dataclass `cls` from nested dicts and lists.

    Args:
        cls: the dataclass.
        data: the values of its fields.
        path: dotted path of `data` inside the configuration, for messages.

    Raises:
        ConfigError: unknown keys (with near misses), missing keys and wrong types, all of them in one message.
    """
    problems: list[str] = []
    value = _dataclass(cls, data, path, problems)
    raise_problems(problems)
    return cast(T, value)


def raise_problems(problems: list[str]) -> None:
    """Raise one ConfigError that lists `problems`; do nothing if there are none."""
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError(f"{len(problems)} problems in the configuration:\n" + "\n".join(f"  - {p}" for p in problems))


def to_plain(value: Any) -> Any:
    """Convert a dataclass to nested dicts, lists and scalars for JSON and YAML; the inverse of `from_plain`."""
    if dataclasses.is_dataclass(value):
        return {spec.name: to_plain(getattr(value, spec.name)) for spec in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(part) for part in value]
    return value


def missing_key(path: str) -> str:
    """Return the message for a key that the user has to set."""
    return f"{path} is missing. Set it on the command line or in a config file."


def unknown_key(path: str, hint: str) -> str:
    """Return the message for a key that does not exist.

    Args:
        path: dotted path of the key.
        hint: near misses, as `did_you_mean` returns them.
    """
    if path in _OTHER_PLACES:
        hint = f" Use {_OTHER_PLACES[path]}."
    return f"{path} is not a known key.{hint}"


def _dataclass(cls: Any, data: Any, path: str, problems: list[str]) -> Any:
    """Build the dataclass `cls`; add to `problems` and return None if a field has no valid value."""
    # Some classes accept a short form, such as a text instead of a mapping.
    expand = getattr(cls, "from_short", None)
    data = expand(data) if expand else data
    if not isinstance(data, Mapping):
        problems.append(f"{path} is {data!r}, expected keys and values.")
        return None
    # Some classes have keys that are defaults of others.
    complete = getattr(cls, "complete", None)
    data = complete(data) if complete else data

    hints = typing.get_type_hints(cls)
    fields = {spec.name: spec for spec in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            problems.append(unknown_key(_join(path, key), did_you_mean(str(key), list(fields))))

    values: dict[str, Any] = {}
    num_before = len(problems)
    for name, spec in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], _join(path, name), problems)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            problems.append(missing_key(_join(path, name)))
    return None if len(problems) > num_before else cls(**values)


def _value(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    if value == NOT_GIVEN:
        problems.append(missing_key(path))
        return None
    if hint is Any:
        return value

    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _optional(hint, value, path, problems)
    if origin is Literal:
        return _choice(hint, value, path, problems)
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, path, problems)
    if origin is list:
        return _list(get_args(hint)[0], value, path, problems)
    if origin is dict:
        return _dict(get_args(hint)[1], value, path, problems)
    return _scalar(hint, value, path, problems)


def _optional(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    if value is None:
        return None
    # The configuration has no unions but `X | None`.
    inner = [option for option in get_args(hint) if option is not type(None)]
    return _value(inner[0], value, path, problems)


def _choice(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    options = [str(option) for option in get_args(hint)]
    if value not in get_args(hint):
        near = did_you_mean(str(value), options)
        # Without a near miss `did_you_mean` lists all options, which the message does already.
        suffix = near if near.startswith(" Did") else ""
        problems.append(f"{path} is {value!r}, expected one of {', '.join(options)}.{suffix}")
    return value


def _list(item: Any, value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, list | tuple):
        entries = "" if value is None else value
        is_quoted = isinstance(value, str) and value.startswith("[")
        cure = "Remove the quotes around the list" if is_quoted else f"Write {path}=[{entries}]"
        problems.append(f"{path} is {value!r}, expected a list. {cure}.")
        return None
    return [_value(item, part, f"{path}[{i}]", problems) for i, part in enumerate(value)]


def _dict(item: Any, value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{path} is {value!r}, expected keys and values.")
        return None
    return {str(key): _value(item, part, _join(path, key), problems) for key, part in value.items()}


def _scalar(hint: type, value: Any, path: str, problems: list[str]) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and is_number and math.isfinite(value):
        return float(value)
    if hint is str and is_number:
        problems.append(f"{path} is the {type(value).__name__} {value!r}, expected text. Put it in quotes.")
    elif isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{path} is {value!r}, expected a finite number.")
    elif not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        problems.append(f"{path} is {value!r}, expected {_TYPE_NAMES.get(hint, hint.__name__)}.")
    return value


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def leaves(plain: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and value of every leaf of nested mappings."""
    if isinstance(plain, Mapping) and plain:
        for key, value in plain.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, plain
