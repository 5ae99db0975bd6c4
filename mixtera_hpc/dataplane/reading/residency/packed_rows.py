"""Rows of blocks as they stay in memory.

JSON stays as bytes of lines, which take a third less memory than objects. Rows with nested values stay as pickles: many
objects in memory would make Python's garbage collector stop the program for tens of milliseconds now and then. Rows of
few large values, such as images, stay objects: there are not many of them. Price: about 1 µs per row of 1 kB.
"""

import gc
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["PackBlock", "PackedRows", "Unpack", "num_bytes", "packed"]

LARGE_VALUE_BYTES = 8 << 10
"""Mean bytes of a value above which rows stay objects: a pickle would copy many bytes to save few objects."""
NUM_SAMPLED = 8
"""About the number of rows of a block whose values are counted for that."""

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


def packed(groups: Iterable[Sequence[Any]]) -> PackedRows:
    """Return decoded rows as they stay in memory: as pickles, if the garbage collector would visit them.

    Args:
        groups: the rows. The objects of at most two groups exist at a time: to free those of many rows at once would
            hold the interpreter's lock.
    """
    values: list[Any] = []
    is_pickled = False
    groups = iter(groups)
    for rows in groups:
        try:
            if not is_pickled and not _should_be_pickled(rows):
                values += rows
                continue
            pickles = _pickled(rows)
            if not is_pickled:
                # The rows before the first ones with nested values, too.
                values = _pickled(values)
                is_pickled = True
            values += pickles
        except (pickle.PicklingError, TypeError, AttributeError, RecursionError):
            # A value has no pickle: for example a calendar interval of Arrow, or hundreds of lists inside each other.
            earlier = _unpickled(values) if is_pickled else values
            return PackedRows([*earlier, *rows, *chain.from_iterable(groups)], None)
    return PackedRows(values, _unpickled if is_pickled else None)


def _should_be_pickled(rows: Sequence[Any]) -> bool:
    """Return True if the garbage collector visits the rows, and their values are not large."""
    # It does not visit texts. Most versions of Python also leave out dictionaries of texts and numbers.
    if not any(map(gc.is_tracked, rows)):
        return False
    sampled = rows[:: len(rows) // NUM_SAMPLED + 1]
    return sum(map(num_bytes, sampled)) <= LARGE_VALUE_BYTES * sum(map(_num_values, sampled))


def _pickled(rows: Sequence[Any]) -> list[bytes]:
    return [pickle.dumps(row, pickle.HIGHEST_PROTOCOL) for row in rows]


def _unpickled(values: Sequence[bytes]) -> list[Any]:
    unpickle = pickle.loads  # Of pickles that `packed` has made in this process.
    # A loop, so that another thread can get the interpreter's lock after each row.
    return [unpickle(value) for value in values]


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


def _num_values(value: Any) -> int:
    """Return the number of a row's values, with those inside of others."""
    if isinstance(value, Mapping):
        return 1 + sum(map(_num_values, value.values()))
    if isinstance(value, list):
        return 1 + sum(map(_num_values, value))
    return 1
