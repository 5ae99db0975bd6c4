"""Compute properties of documents with Python functions, which `data.properties.NAME.function` names.

A function takes a list of texts and returns one value for each: a text or None for a category, a sequence of texts or
None for categories, a number or None for a number. It must depend on the texts alone, since any rank may see any of
them. Functions come from the configuration only: an index names those it was built with, but no name in a file is ever
imported.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixtera_hpc.config.schema import DataSetKeys
from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import Column, PropertyField
from mixtera_hpc.formats.category_codes import encode_categories
from mixtera_hpc.formats.user_functions import import_function, source_digest

__all__ = ["DocumentFunction", "DocumentFunctions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentFunction:
    """A function and the property that it computes."""

    field: PropertyField
    """The property; `path` is the import path of the function."""
    call: Callable[[list[str]], Sequence[Any]]
    source: str
    """Hex digest of the file that defines the function."""


@dataclass(frozen=True, slots=True)
class DocumentFunctions:
    """All computed properties of a data set."""

    all: tuple[DocumentFunction, ...] = ()
    """Sorted by property name."""

    @classmethod
    def of(cls, data: DataSetKeys) -> "DocumentFunctions":
        """Import the functions that the configuration of a data set names.

        Raises:
            ConfigError: one cannot be imported, or is not callable.
        """
        functions = []
        for name, spec in sorted(data.properties.items()):
            # Properties with a path are read by the formats.
            if spec.function:
                call = import_function(spec.function, f"data.properties.{name}.function")
                field = PropertyField(name=name, path=spec.function, kind=Kind(spec.kind))
                functions.append(DocumentFunction(field=field, call=call, source=source_digest(call)))
        return cls(tuple(functions))

    @property
    def fields(self) -> tuple[PropertyField, ...]:
        """Return the properties, sorted by name."""
        return tuple(function.field for function in self.all)

    @property
    def sources(self) -> tuple[str, ...]:
        """Return the digests that distinguish versions of the functions."""
        return tuple(function.source for function in self.all)

    def columns(self, documents: list[str] | None) -> dict[str, Column]:
        """Compute all properties of `documents`; property → column.

        Raises:
            DataError: rows have no documents, or a function did not return one value of its kind for each document.
        """
        if self.all and documents is None:
            raise DataError(
                f"data.properties.{self.all[0].field.name} is computed from documents, but these rows have no text."
            )
        return {function.field.name: _compute(function, documents or []) for function in self.all}


def _compute(function: DocumentFunction, documents: list[str]) -> Column:
    field = function.field
    values = _call(function, documents)
    # A shifted column would give every document the value of another.
    if len(values) != len(documents):
        raise DataError(
            f"{field.path} returned {len(values)} values for {len(documents)} documents; data.properties.{field.name} "
            "needs one for each."
        )
    try:
        if field.kind is Kind.NUMBER:
            # Raises for values that have no float64, such as sequences and huge integers.
            return np.array([np.nan if value is None else value for value in values], np.float64)
        return encode_categories([_as_category(value, field.kind) for value in values])
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{field.path} returned a value that is no {field.kind} of data.properties.{field.name}: {error}."
        ) from None


def _call(function: DocumentFunction, documents: list[str]) -> Sequence[Any]:
    """Call the user's function; a note on its exception names the property."""
    try:
        # A copy: the function may sort or change its list.
        values = function.call(list(documents))
        return values if hasattr(values, "__len__") else list(values)
    except Exception as error:
        error.add_note(f"raised by {function.field.path}, the function of data.properties.{function.field.name}")
        raise


def _as_category(value: Any, kind: Kind) -> Any:
    """Return a value as `encode_categories` takes it.

    Raises:
        TypeError: it is not a value of that kind.
    """
    # NumPy scalars become Python's, so that their text is the same.
    scalar = value.item() if isinstance(value, np.generic) else value
    if scalar is None or isinstance(scalar, bool | int | float | str):
        return scalar
    if kind is Kind.CATEGORIES and not isinstance(scalar, bytes | Mapping):
        return tuple(_as_category(part, Kind.CATEGORY) for part in scalar)
    raise TypeError(f"got {type(value).__name__} {value!r:.60}")
