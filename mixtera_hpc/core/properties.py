"""What a sample is, in numbers: properties, their dictionaries, and combos.

Every distinct combination of categorical values is one **combo**; a sample stores the combo's position, so a predicate over
categorical properties is decided once per combo and never per sample.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ComboTable", "Kind", "Property", "as_text"]


def as_text(value: Any) -> str:
    """The text of a scalar where a category is expected: `true` and `false` as JSON writes them, all else as Python does."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


class Kind(StrEnum):
    """How a property takes values."""

    CATEGORY = "category"
    CATEGORIES = "categories"
    NUMBER = "number"


@dataclass(frozen=True, slots=True, kw_only=True)
class Property:
    """One named attribute of samples."""

    name: str
    kind: Kind
    values: tuple[str, ...] = ()
    """The dictionary: every value that occurs, sorted; a code is a position in it. Empty for numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComboTable:
    """The distinct combinations of categorical values, one row each.

    A property's values in combo c are `codes[name][indptr[name][c]:indptr[name][c + 1]]`, ascending positions in the property's
    dictionary; an empty slice is null.
    """

    num_combos: int
    properties: Mapping[str, Property]
    """The categorical properties, by name."""
    indptr: Mapping[str, NDArray[np.int64]]
    """Per property, shape (num_combos + 1,)."""
    codes: Mapping[str, NDArray[np.int32]]
    """Per property, shape (indptr[-1],)."""
    bad: int = -1
    """The combo of rows that cannot be read, without any value: no query selects them. -1 when there are none."""

    def any_of(self, name: str, codes: Iterable[int]) -> NDArray[np.bool_]:
        """Which combos have at least one of `codes` in property `name`; shape (num_combos,)."""
        hit = np.isin(self.codes[name], np.fromiter(codes, np.int32))
        rows = np.repeat(np.arange(self.num_combos), np.diff(self.indptr[name]))
        return np.bincount(rows[hit], minlength=self.num_combos) > 0

    def is_null(self, name: str) -> NDArray[np.bool_]:
        """Which combos have no value in property `name`; shape (num_combos,)."""
        return np.diff(self.indptr[name]) == 0

    def values(self, name: str, combo: int) -> tuple[str, ...]:
        """The values of property `name` in `combo`."""
        start, stop = self.indptr[name][combo : combo + 2]
        dictionary = self.properties[name].values
        return tuple(dictionary[c] for c in self.codes[name][start:stop])
