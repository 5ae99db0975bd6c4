"""Properties of samples, the dictionaries of their values, and combos.

Every distinct combination of categorical values is one **combo**. A sample stores the position of its combo, so a
predicate over categorical properties is evaluated once per combo and never per sample.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ComboTable", "Kind", "Property", "as_text"]


def as_text(value: Any) -> str:
    """Return a scalar as a category value: `true` and `false` as in JSON, everything else as `str` writes it."""
    # `str` would write True and False.
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


class Kind(StrEnum):
    """The type of a property."""

    CATEGORY = "category"
    """One text per sample, or null."""
    CATEGORIES = "categories"
    """Any number of texts per sample."""
    NUMBER = "number"
    """One float per sample, or null."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Property:
    """One named attribute of samples."""

    name: str
    kind: Kind
    values: tuple[str, ...] = ()
    """The dictionary: every value that occurs, sorted. A code is a position in it. Empty for numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComboTable:
    """The distinct combinations of categorical values, one row each.

    The values of a property in combo c are `codes[name][indptr[name][c]:indptr[name][c + 1]]`: ascending positions in
    the property's dictionary. An empty slice is null.
    """

    num_combos: int
    properties: Mapping[str, Property]
    """The categorical properties, by name."""
    indptr: Mapping[str, NDArray[np.int64]]
    """Per property, shape (num_combos + 1,)."""
    codes: Mapping[str, NDArray[np.int32]]
    """Per property, shape (indptr[-1],)."""
    bad: int = -1
    """The combo of unreadable rows, which no query selects; -1 if there are none."""

    def any_of(self, name: str, codes: Iterable[int]) -> NDArray[np.bool_]:
        """Return which combos have at least one of `codes` in property `name`; shape (num_combos,)."""
        # A combo may have several codes in a property. Count the wanted ones of each.
        is_wanted = np.isin(self.codes[name], np.fromiter(codes, np.int32))
        combo_of_code = np.repeat(np.arange(self.num_combos), np.diff(self.indptr[name]))
        num_wanted = np.bincount(combo_of_code[is_wanted], minlength=self.num_combos)
        return np.asarray(num_wanted > 0)

    def is_null(self, name: str) -> NDArray[np.bool_]:
        """Return which combos have no value in property `name`; shape (num_combos,)."""
        # Null has no code.
        num_values = np.diff(self.indptr[name])
        return np.asarray(num_values == 0)

    def values(self, name: str, combo: int) -> tuple[str, ...]:
        """Return the values of property `name` in `combo`."""
        start, stop = self.indptr[name][combo : combo + 2]
        dictionary = self.properties[name].values
        return tuple(dictionary[c] for c in self.codes[name][start:stop])
