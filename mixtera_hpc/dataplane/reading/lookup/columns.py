"""Arrays that grow at their end, and ranges of positions in them."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["GrowingColumns", "concatenated_ranges", "narrow_type", "search"]

Ints = NDArray[np.int64]
MIN_CAPACITY = 1024
MIN_SORTED_SEARCH = 1 << 15
"""Number of values from which on `search` sorts the keys: sorting 2,048 keys takes 30 µs and saves as much."""


class GrowingColumns:
    """Columns of equal length. Appending costs O(1) per row on average."""

    def __init__(self, types: Mapping[str, DTypeLike]) -> None:
        """Hold no rows yet.

        Args:
            types: name → type of each column.
        """
        self._types = {name: np.dtype(dtype) for name, dtype in types.items()}
        self._arrays: dict[str, NDArray[Any]] = {}
        self._size = 0
        self._capacity = 0
        self.row_bytes = sum(dtype.itemsize for dtype in self._types.values())
        self._reserve(MIN_CAPACITY)

    def __len__(self) -> int:
        return self._size

    def __contains__(self, name: str) -> bool:
        return name in self._types

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return a column; a view that a later `append` does not change."""
        return self._arrays[name][: self._size]

    def append(self, columns: Mapping[str, NDArray[Any]]) -> None:
        """Append rows; `columns` has one array for every column, all of the same length."""
        stop = self._size + len(next(iter(columns.values())))
        if stop > self._capacity:
            # Memory that is not written yet takes no room, and copies take longer than what is appended.
            self._reserve(max(stop, self._capacity * 4))
        for name, values in columns.items():
            self._arrays[name][self._size : stop] = values
        self._size = stop

    def clear(self) -> None:
        """Remove all rows, and free their memory."""
        self._size = 0
        self._reserve(MIN_CAPACITY)

    def truncate(self, size: int) -> None:
        """Remove all rows from number `size` on."""
        self._size = size

    def _reserve(self, capacity: int) -> None:
        self._capacity = capacity
        for name, dtype in self._types.items():
            array = np.empty(capacity, dtype)
            if self._size:
                array[: self._size] = self._arrays[name][: self._size]
            self._arrays[name] = array


def concatenated_ranges(first: NDArray[np.integer[Any]], count: NDArray[np.integer[Any]]) -> Ints:
    """Return the numbers first[0], …, first[0] + count[0] - 1, first[1], … of all ranges."""
    ends = np.cumsum(count, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(first - (ends - count), count)


def search(values: Ints, keys: Ints, side: Literal["left", "right"]) -> Ints:
    """Return `np.searchsorted(values, keys, side)`, faster for many values and keys.

    Keys in ascending order are found faster, because their positions are near each other in memory.
    """
    if len(values) < MIN_SORTED_SEARCH:
        return np.searchsorted(values, keys, side=side)
    order = np.argsort(keys)
    positions = np.empty(len(keys), np.int64)
    positions[order] = np.searchsorted(values, keys[order], side=side)
    return positions


def narrow_type(maximum: int) -> np.dtype[Any]:
    """Return the narrowest unsigned integer type that holds `maximum`."""
    return np.min_scalar_type(maximum)
