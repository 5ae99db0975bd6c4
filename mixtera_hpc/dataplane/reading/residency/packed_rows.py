"""Rows of blocks as they stay in memory: JSON as bytes of lines, which take a third less memory than objects."""

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
    """Converts values to rows; raises ValueError or one of `JSON_ERRORS`. None if the values are the rows."""

    def take(self, places: NDArray[np.int64]) -> "PackedRows":
        """Return the rows at some places."""
        return PackedRows(list(map(self.values.__getitem__, places.tolist())), self.unpack)


PackBlock = Callable[[int, NDArray[np.int64]], PackedRows]
"""Decodes a block and returns the rows at these ascending positions, as they stay in memory."""


def num_bytes(value: Any) -> int:
    """Return the approximate memory of a row."""
    # Most rows are lines.
    if type(value) is bytes:
        return sys.getsizeof(value)
    if isinstance(value, Mapping):
        return sys.getsizeof(value) + sum(map(num_bytes, value.values()))
    if isinstance(value, list):
        return sys.getsizeof(value) + sum(map(num_bytes, value))
    return sys.getsizeof(value)
