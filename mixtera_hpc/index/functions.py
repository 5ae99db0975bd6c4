"""Properties that a Python function computes from documents: `data.properties.NAME={function: my_pkg.my_fn, kind: category}`.

A function takes a list of texts and returns as many values: a text or None for a category, a sequence of texts or None for
categories, a number or None for a number. It must not depend on anything but the texts, since any rank may see any of them.
Functions come from the configuration only: an index names the ones it was made with, and nobody imports a name from a file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixtera_hpc.config.schema import DataConfig
from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.columns import encode
from mixtera_hpc.formats.format import Column, Field
from mixtera_hpc.formats.parser import describe_parser, load_parser

__all__ = ["DocumentFunction", "Functions"]

DocumentFunction = Callable[[list[str]], Sequence[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Functions:
    """The computed properties of a build."""

    fields: tuple[Field, ...] = ()
    """Sorted by name; the path is the function's name."""
    loaded: tuple[DocumentFunction, ...] = ()
    fingerprints: tuple[str, ...] = ()
    """Hex digest of the file that each is written in."""

    @classmethod
    def of(cls, data: DataConfig) -> "Functions":
        """Import the functions that a configuration names.

        Raises:
            ConfigError: one cannot be imported, or cannot be called.
        """
        named = [(n, spec.function, Kind(spec.kind)) for n, spec in sorted(data.properties.items()) if spec.function]
        keys = [f"data.properties.{name}.function" for name, _, _ in named]
        return cls(
            fields=tuple(Field(name=name, path=function, kind=kind) for name, function, kind in named),
            loaded=tuple(load_parser(function, key) for key, (_, function, _) in zip(keys, named, strict=True)),
            fingerprints=tuple(
                describe_parser(function, key).fingerprint for key, (_, function, _) in zip(keys, named, strict=True)
            ),
        )

    def columns(self, documents: list[str] | None) -> dict[str, Column]:
        """Every property of `documents`, by name.

        Raises:
            DataError: rows have no documents, or a function returned something else than one value of its kind for each.
        """
        if self.fields and documents is None:
            raise DataError(
                f"data.properties.{self.fields[0].name} is computed from documents, but these rows hold none that is text."
            )
        return {
            field.name: _column(field, fn, documents or []) for field, fn in zip(self.fields, self.loaded, strict=True)
        }


def _column(field: Field, function: DocumentFunction, documents: list[str]) -> Column:
    values = _called(field, function, documents)
    if len(values) != len(documents):
        raise DataError(
            f"{field.path} returned {len(values)} values for {len(documents)} documents; data.properties.{field.name} needs "
            "one for each."
        )
    try:
        if field.kind is Kind.NUMBER:
            return np.array([np.nan if v is None else v for v in values], np.float64)
        return encode([_categorical(v, field.kind) for v in values])
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{field.path} returned a value that is no {field.kind} of data.properties.{field.name}: {error}."
        ) from None


def _called(field: Field, function: DocumentFunction, documents: list[str]) -> Sequence[Any]:
    try:
        values = function(list(documents))
        return values if hasattr(values, "__len__") else list(values)
    except Exception as error:  # It is the user's; whatever it raises is theirs to see.
        error.add_note(f"raised by {field.path}, the function of data.properties.{field.name}")
        raise


def _categorical(value: Any, kind: Kind) -> Any:
    scalar = value.item() if isinstance(value, np.generic) else value
    if scalar is None or isinstance(scalar, bool | int | float | str):
        return scalar
    if kind is Kind.CATEGORIES and not isinstance(scalar, bytes | Mapping):
        return tuple(_categorical(part, Kind.CATEGORY) for part in scalar)
    raise TypeError(f"got {type(value).__name__} {value!r:.60}")
