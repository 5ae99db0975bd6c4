"""Rows of blocks as they stay in memory: JSON lines as lines, which take a third less than objects."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["PackBlock", "PackedRows", "Unpack", "num_bytes"]

Unpack = Callable[[Sequence[Any]], Sequence[Any]]


class PackedRows(NamedTuple):
    """Rows of a block as they stay in memory."""

    values: Sequence[Any]
    unpack: Unpack | None
    """A function from some of the values to rows; raises ValueError or one of `JSON_ERRORS`. None: values are rows."""

    def take(self, places: NDArray[np.int64]) -> "PackedRows":
        """Return the rows at some places."""
        return PackedRows(list(map(self.values.__getitem__, places.tolist())), self.unpack)


PackBlock = Callable[[int, NDArray[np.int64]], PackedRows]
"""A function that decodes a block and returns rows of it for the memory, given their ascending positions."""


def num_bytes(value: Any) -> int:
    """Return about how much memory a row takes."""
    # Lines are by far the most frequent kind of rows.
    if type(value) is bytes:
        return sys.getsizeof(value)
    if isinstance(value, Mapping):
        return sys.getsizeof(value) + sum(map(num_bytes, value.values()))
    if isinstance(value, list):
        return sys.getsizeof(value) + sum(map(num_bytes, value))
    return sys.getsizeof(value)
