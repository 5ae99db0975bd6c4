"""Find the documents that hold items of the window table, faster than a binary search over all documents.

A binary search over 200,000 documents reads 18 places, of which the last ones are rarely in the processor's cache. The
directory has the first document of every cell of 2^n consecutive items. A search reads two of its entries, and then a
few places inside one cell, for all items together. Price: at most 2 bytes of memory per document.
"""

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.lookup.columns import GrowingColumns

__all__ = ["ItemDirectory"]

Ints = NDArray[np.int64]

MIN_DOCUMENTS = 1 << 14
"""Documents from which on a directory pays."""
DOCUMENTS_PER_CELL = 4
"""Documents of a cell on average, at least."""


class ItemDirectory:
    """The first document of every cell of items. Documents may be added, see `search`. Not thread-safe."""

    def __init__(self) -> None:
        """Hold no cells yet."""
        self._shift = 0
        """A cell has 2^shift items."""
        self._num_items = 0
        """Items of the documents so far."""
        self._cells = GrowingColumns({"first": np.int64})
        """Documents that end at or before the first item of each cell, for all cells and one behind the last."""

    def search(self, stops: Ints, items: Ints) -> Ints:
        """Return `np.searchsorted(stops, items, side="right")`.

        Args:
            stops: one past the last item of every document, ascending. Later calls may have more documents at the end.
            items: below the last one of `stops`.
        """
        if len(stops) < MIN_DOCUMENTS:
            return np.searchsorted(stops, items, side="right")
        if stops[-1] != self._num_items:
            self._extend(stops)
        first = self._cells["first"]
        cell = items >> self._shift
        document = first.take(cell)
        cell += 1
        most = int((first.take(cell) - document).max(initial=0))

        # A binary search inside all cells at the same time. `clip` reads the last document for places behind the end.
        for bit in reversed(range(most.bit_length())):
            is_before = stops.take(document + ((1 << bit) - 1), mode="clip") <= items
            document += is_before.astype(np.int64) << bit
        return document

    def _extend(self, stops: Ints) -> None:
        """Add the cells of documents that were added."""
        num_items = int(stops[-1])
        while (num_items >> self._shift) * DOCUMENTS_PER_CELL > len(stops):
            self._shift += 1
            # Two cells become one.
            whole = self._cells["first"][::2].copy()
            self._cells.clear()
            self._cells.append({"first": whole})
        # Documents that were added may end at or before the end of the last cell.
        known = min((self._num_items >> self._shift) + 1, len(self._cells))
        self._cells.truncate(known)
        begins = np.arange(known, (num_items >> self._shift) + 2) << self._shift
        self._cells.append({"first": np.searchsorted(stops, begins, side="right")})
        self._num_items = num_items
