"""Nested dicts → frozen dataclasses, with every problem listed and none hidden behind the first."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

from mixtera_hpc.errors import ConfigError, did_you_mean

__all__ = ["from_plain", "raise_problems", "to_plain"]

T = TypeVar("T")


def from_plain(cls: type[T], data: Mapping[str, Any], path: str = "") -> T:
    """Build the dataclass `cls` from nested dicts and lists.

    Raises:
        ConfigError: unknown keys (with near misses), missing keys and wrong types, all of them in one message.
    """
    problems: list[str] = []
    value = _dataclass(cls, data, path, problems)
    raise_problems(problems)
    return cast(T, value)


def raise_problems(problems: list[str]) -> None:
    """Raise one ConfigError that lists `problems`; nothing when there are none."""
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError(f"{len(problems)} problems in the configuration:\n" + "\n".join(f"  - {p}" for p in problems))


def to_plain(value: Any) -> Any:
    """The inverse of `from_plain`: nested dicts, lists and scalars, fit for JSON and YAML."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    return value


def _dataclass(cls: Any, data: Any, path: str, problems: list[str]) -> Any:
    shorten = getattr(cls, "from_short", None)
    data = shorten(data) if shorten else data
    if not isinstance(data, Mapping):
        problems.append(f"{path} is {data!r}, expected keys and values.")
        return None
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            problems.append(f"{_join(path, key)} is not a known key.{did_you_mean(str(key), list(fields))}")
    values, before = {}, len(problems)
    for name, spec in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], _join(path, name), problems)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            problems.append(f"{_join(path, name)} is missing. Set it on the command line or in a config file.")
    return None if len(problems) > before else cls(**values)


def _value(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    if value == "???":
        problems.append(f"{path} is missing. Set it on the command line or in a config file.")
        return None
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _optional(hint, value, path, problems)
    if origin is Literal:
        if value not in get_args(hint):
            options = [str(a) for a in get_args(hint)]
            problems.append(f"{path} is {value!r}, expected one of {', '.join(options)}.{_near(value, options)}")
        return value
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, path, problems)
    if origin is list:
        return _list(get_args(hint)[0], value, path, problems)
    if origin is dict:
        return _dict(get_args(hint)[1], value, path, problems)
    return _scalar(hint, value, path, problems)


def _optional(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    inner = [a for a in get_args(hint) if a is not type(None)]
    return None if value is None else _value(inner[0], value, path, problems)


def _list(item: Any, value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, list | tuple):
        problems.append(f"{path} is {value!r}, expected a list. Write {path}=[{value}].")
        return None
    return [_value(item, v, f"{path}[{i}]", problems) for i, v in enumerate(value)]


def _dict(item: Any, value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{path} is {value!r}, expected keys and values.")
        return None
    return {str(k): _value(item, v, _join(path, k), problems) for k, v in value.items()}


def _scalar(hint: type, value: Any, path: str, problems: list[str]) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        problems.append(f"{path} is the {type(value).__name__} {value!r}, expected text. Put it in quotes.")
    elif isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{path} is {value!r}, expected a finite number.")
    elif not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        problems.append(f"{path} is {value!r}, expected {_NAMES.get(hint, hint.__name__)}.")
    return value


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _near(value: Any, options: list[str]) -> str:
    hint = did_you_mean(str(value), options)
    return hint if hint.startswith(" Did") else ""


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
