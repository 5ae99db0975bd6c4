"""The keys of the schema by their dotted paths: used by overrides, messages and the documentation."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from mixtera_hpc.config.schema import Config

__all__ = [
    "SchemaKey",
    "groups",
    "has_short_form",
    "hint_of",
    "schema_keys",
    "takes_text",
    "takes_texts",
    "without_none",
]


@dataclass(frozen=True, slots=True)
class SchemaKey:
    """One key of the schema."""

    path: str
    """Dotted path, for example `query.holdout.fraction`."""
    hint: Any
    """Type of the value."""
    field: "dataclasses.Field[Any]"
    """The dataclass field."""
    owner: type
    """The dataclass that defines the field."""

    @property
    def is_group(self) -> bool:
        """True if the key has keys below it that are known in advance."""
        return dataclasses.is_dataclass(self.hint)


def schema_keys(cls: type = Config, path: str = "") -> Iterator[SchemaKey]:
    """Yield every key of the dataclass `cls`, groups before the keys below them."""
    hints = typing.get_type_hints(cls)
    for spec in dataclasses.fields(cls):
        key = SchemaKey(f"{path}.{spec.name}" if path else spec.name, hints[spec.name], spec, cls)
        yield key
        if key.is_group:
            yield from schema_keys(key.hint, key.path)


def groups() -> list[str]:
    """Return the names of the top-level groups."""
    return [spec.name for spec in dataclasses.fields(Config)]


def hint_of(path: str) -> Any:
    """Return the type of the value at a dotted path, also below open mappings; None if there is no such key.

    `data.properties.language.kind` is a key although the name `language` is the user's.
    """
    hint: Any = Config
    for name in path.split("."):
        hint = without_none(hint)
        if dataclasses.is_dataclass(hint):
            hint = typing.get_type_hints(hint).get(name)
        elif get_origin(hint) is dict:
            hint = get_args(hint)[1]
        elif hint is not Any:
            return None
    return hint


def takes_text(hint: Any) -> bool:
    """Return whether a value of type `hint` can be text: strings, choices, and mappings with a short form."""
    hint = without_none(hint)
    return hint is str or get_origin(hint) is Literal or has_short_form(hint)


def takes_texts(hint: Any) -> bool:
    """Return whether a value of type `hint` is a list of texts."""
    return bool(without_none(hint) == list[str])


def has_short_form(hint: Any) -> bool:
    """Return whether a value of type `hint` is a mapping for which a bare string can be short."""
    return hasattr(without_none(hint), "from_short")


def without_none(hint: Any) -> Any:
    """Return `T` for the type `T | None`, and every other type as it is."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    return next(part for part in get_args(hint) if part is not type(None))
