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
from mixtera_hpc.formats.base import Column, PropertyField
from mixtera_hpc.formats.category_codes import encode_categories
from mixtera_hpc.formats.user_functions import import_function, source_digest

__all__ = ["DocumentFunction", "DocumentFunctions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentFunction:
    """One function and the property that it computes."""

    field: PropertyField
    """Its path is the function's name."""
    call: Callable[[list[str]], Sequence[Any]]
    source: str
    """Hex digest of the file it is written in."""


@dataclass(frozen=True, slots=True)
class DocumentFunctions:
    """The computed properties of a build."""

    all: tuple[DocumentFunction, ...] = ()
    """Sorted by the name of the property."""

    @classmethod
    def of(cls, data: DataConfig) -> "DocumentFunctions":
        """Import the functions that a configuration names.

        Raises:
            ConfigError: one cannot be imported, or cannot be called.
        """
        found = []
        for name, spec in sorted(data.properties.items()):
            if spec.function:
                call = import_function(spec.function, f"data.properties.{name}.function")
                field = PropertyField(name=name, path=spec.function, kind=Kind(spec.kind))
                found.append(DocumentFunction(field=field, call=call, source=source_digest(call)))
        return cls(tuple(found))

    @property
    def fields(self) -> tuple[PropertyField, ...]:
        """The properties, sorted by name."""
        return tuple(function.field for function in self.all)

    @property
    def sources(self) -> tuple[str, ...]:
        """What tells versions of the functions apart."""
        return tuple(function.source for function in self.all)

    def columns(self, documents: list[str] | None) -> dict[str, Column]:
        """Every property of `documents`, by name.

        Raises:
            DataError: rows have no documents, or a function returned something else than one value of its kind for each.
        """
        if self.all and documents is None:
            raise DataError(
                f"data.properties.{self.all[0].field.name} is computed from documents, but these rows hold none that is text."
            )
        return {function.field.name: _column(function, documents or []) for function in self.all}


def _column(function: DocumentFunction, documents: list[str]) -> Column:
    values, field = _called(function, documents), function.field
    if len(values) != len(documents):
        raise DataError(
            f"{field.path} returned {len(values)} values for {len(documents)} documents; data.properties.{field.name} needs "
            "one for each."
        )
    try:
        if field.kind is Kind.NUMBER:
            return np.array([np.nan if v is None else v for v in values], np.float64)
        return encode_categories([_categorical(v, field.kind) for v in values])
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{field.path} returned a value that is no {field.kind} of data.properties.{field.name}: {error}."
        ) from None


def _called(function: DocumentFunction, documents: list[str]) -> Sequence[Any]:
    try:
        values = function.call(list(documents))
        return values if hasattr(values, "__len__") else list(values)
    except Exception as error:  # It is the user's; whatever it raises is theirs to see.
        error.add_note(f"raised by {function.field.path}, the function of data.properties.{function.field.name}")
        raise


def _categorical(value: Any, kind: Kind) -> Any:
    scalar = value.item() if isinstance(value, np.generic) else value
    if scalar is None or isinstance(scalar, bool | int | float | str):
        return scalar
    if kind is Kind.CATEGORIES and not isinstance(scalar, bytes | Mapping):
        return tuple(_categorical(part, Kind.CATEGORY) for part in scalar)
    raise TypeError(f"got {type(value).__name__} {value!r:.60}")
