"""Categorical values as codes: every distinct value is looked at once, however many rows have it.

Values are text. Numbers and truth values that stand where a category is expected become their text (`7`, `true`); a list is
a set of values; null and the empty list are the same, no value.
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

Values = tuple[str, ...]
"""The values of one row, sorted, each once; empty for null."""


@dataclass(frozen=True, slots=True)
class Categories:
    """A column of categorical values."""

    values: list[Values]
    """What the codes stand for; no two are equal."""
    code: NDArray[np.int32]
    """Shape (rows,)."""


def encode_categories(column: Sequence[Any]) -> Categories:
    """Code the raw values of a column: None, scalars, or tuples of scalars.

    Raises:
        ValueError: a text has no UTF-8 (half of a surrogate pair), which Python code may return and no file can hold.
    """
    codes: defaultdict[Any, int] = defaultdict(count().__next__)
    code = np.fromiter(map(codes.__getitem__, column), np.int32, len(column))
    if not all(map(_is_plain, codes)):
        return _encode_slowly(column)
    return _merge_equal([_canonical(v) for v in codes], code)


def map_categories(column: Categories, change: Callable[[str], str | None]) -> Categories:
    """Put every value through `change`, once per distinct value; None drops it."""
    changed = [tuple(sorted({c for v in values if (c := change(v)) is not None})) for values in column.values]
    return _merge_equal(changed, column.code)


def _is_plain(value: Any) -> bool:
    """Whether hashing tells `value` from every other: 1, 1.0 and True are equal, their texts are not."""
    parts = value if isinstance(value, tuple) else (value,)
    return all(isinstance(v, str) or v is None for v in parts)


def _encode_slowly(column: Iterable[Any]) -> Categories:
    codes: defaultdict[Values, int] = defaultdict(count().__next__)
    code = np.array([codes[_canonical(v)] for v in column], np.int32)
    return Categories(list(codes), code)


def _canonical(value: Any) -> Values:
    parts = value if isinstance(value, tuple) else (value,)
    texts = sorted({as_text(v) for v in parts if v is not None})
    "".join(texts).encode()
    return tuple(texts)


def _merge_equal(values: list[Values], code: NDArray[np.int32]) -> Categories:
    """Lists that differ only in order or repetition are one value."""
    position: dict[Values, int] = {}
    target = np.array([position.setdefault(v, len(position)) for v in values], np.int32)
    if len(position) == len(values):
        return Categories(values, code)
    return Categories(list(position), target[code])
