"""Encode categorical values as codes. Each distinct value is processed once, however many rows have it.

Values are text. A number or a truth value where a category is expected becomes its text (`7`, `true`). A list is a set
of values. Null and the empty list are the same: no value.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.properties import as_text

__all__ = ["Categories", "encode_categories", "map_categories"]

# The values of one row, sorted, each once. Empty for null.
ValueSet = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Categories:
    """A column of categorical values."""

    values: list[ValueSet]
    """The value set of every code. No two are equal."""
    code: NDArray[np.int32]
    """One code per row, shape (rows,)."""


def encode_categories(column: Sequence[Any]) -> Categories:
    """Encode the raw values of a column: None, scalars, or tuples of scalars.

    Raises:
        ValueError: a text cannot be encoded as UTF-8 (a lone surrogate). Only Python code can return such a text.
    """
    # The default of a missing key is the next unused code, so the dict numbers the values in order of appearance.
    codes: defaultdict[Any, int] = defaultdict(count().__next__)
    code = np.fromiter(map(codes.__getitem__, column), np.int32, len(column))
    if not all(map(_hashes_like_its_text, codes)):
        return _encode_by_text(column)
    return _merge_equal([_value_set(value) for value in codes], code)


def map_categories(column: Categories, change: Callable[[str], str | None]) -> Categories:
    """Apply `change` to every distinct value; a value for which it returns None is dropped."""
    changed = []
    for values in column.values:
        results = {change(value) for value in values}
        changed.append(tuple(sorted(result for result in results if result is not None)))
    return _merge_equal(changed, column.code)


def _hashes_like_its_text(value: Any) -> bool:
    """Return False if a dict may confuse `value` with another one: 1, 1.0 and True are equal, their texts are not."""
    parts = value if isinstance(value, tuple) else (value,)
    return all(isinstance(part, str) or part is None for part in parts)


def _encode_by_text(column: Iterable[Any]) -> Categories:
    """Encode a column whose raw values cannot be dict keys, converting every row to text first."""
    codes: defaultdict[ValueSet, int] = defaultdict(count().__next__)
    code = np.array([codes[_value_set(value)] for value in column], np.int32)
    return Categories(list(codes), code)


def _value_set(value: Any) -> ValueSet:
    """Convert a raw value to its value set.

    Raises:
        ValueError: a text cannot be encoded as UTF-8.
    """
    parts = value if isinstance(value, tuple) else (value,)
    texts = sorted({as_text(part) for part in parts if part is not None})
    # Values are stored as UTF-8: fail here, where the row is known, and not when the index is written.
    "".join(texts).encode()
    return tuple(texts)


def _merge_equal(values: list[ValueSet], code: NDArray[np.int32]) -> Categories:
    """Build the column, giving equal value sets one code: lists may differ only in order or repetition."""
    positions: dict[ValueSet, int] = {}
    # Old code → new code.
    new_code = np.array([positions.setdefault(value, len(positions)) for value in values], np.int32)
    if len(positions) == len(values):
        return Categories(values, code)
    return Categories(list(positions), new_code[code])
