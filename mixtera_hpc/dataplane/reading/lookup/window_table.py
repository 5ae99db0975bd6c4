"""The documents of all windows in memory, one window after the other, in one set of columns.

Any documents of any windows are gathered by one index array. Price: about 24 bytes of memory per document.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mixtera_hpc.dataplane.reading.lookup.columns import GrowingColumns, concatenated_ranges
from mixtera_hpc.dataplane.reading.lookup.epoch_orders import WindowKey
from mixtera_hpc.dataplane.reading.lookup.item_directory import ItemDirectory

__all__ = ["StreamWindow", "WindowDocuments", "WindowTable"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StreamWindow:
    """The documents of one window, in stream order; shape (n,) each."""

    key: WindowKey
    block: NDArray[np.int32]
    row: NDArray[np.int32]
    """Row inside the block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowDocuments:
    """Columns of documents of several windows, window by window; shape (n,) each."""

    block: NDArray[np.int32]
    row: NDArray[np.integer[Any]]
    offset: NDArray[np.integer[Any]]
    """First byte of the row inside its block."""
    length: NDArray[np.integer[Any]]
    """Bytes of the row."""
    items: Ints | None
    """Items of each document; None if each has one."""


class WindowTable:
    """Windows by number, in the order in which they were added."""

    def __init__(self, types: Mapping[str, DTypeLike], *, has_unit_items: bool) -> None:
        """Hold no windows yet.

        Args:
            types: type of the columns `row`, `offset` and `length`.
            has_unit_items: True if every document has one item.
        """
        self.types = types
        self.has_unit_items = has_unit_items
        stops: dict[str, DTypeLike] = {} if has_unit_items else {"stop": np.int64}
        # `stop` counts the items of all windows up to the end of a document, so that one search serves all.
        self._columns = GrowingColumns({"block": np.int32, **types, **stops})
        # Row 0 is no document, so that every document has a row before it, where its items begin.
        self._columns.append({name: np.zeros(1, np.int64) for name in ("block", *types, *stops)})
        self._windows = GrowingColumns({"first": np.int64, "first_item": np.int64, "last_use": np.int64})
        self._directory = ItemDirectory()
        self._keys: list[WindowKey] = []
        self._num_items = 0

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, number: int) -> StreamWindow:
        """Return a window by its number."""
        first = int(self._windows["first"][number])
        documents = slice(first, first + int(self._counts()[number]))
        row = self._columns["row"][documents].astype(np.int32)
        return StreamWindow(self._keys[number], self._columns["block"][documents], row)

    def key(self, number: int) -> WindowKey:
        """Return the identity of a window."""
        return self._keys[number]

    @property
    def num_rows(self) -> int:
        """One more than the highest number of a document."""
        return len(self._columns)

    def documents_of(self, windows: Ints) -> Ints:
        """Return the numbers of the documents of some windows."""
        return concatenated_ranges(self._windows["first"][windows], self._counts()[windows])

    def num_documents(self, windows: Ints) -> Ints:
        """Return the documents of some windows."""
        return self._counts()[windows]

    @property
    def row_bytes(self) -> int:
        """Bytes of a document in memory."""
        return self._columns.row_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of all documents in memory."""
        return len(self._columns) * self._columns.row_bytes

    def bytes_of(self, windows: Ints) -> int:
        """Return the bytes of the documents of some windows."""
        return int(self._counts()[windows].sum()) * self._columns.row_bytes

    def append(self, keys: list[WindowKey], counts: Ints, documents: WindowDocuments) -> None:
        """Add windows with so many documents each."""
        first = len(self._columns) + np.cumsum(counts) - counts
        columns: dict[str, NDArray[Any]] = {
            "block": documents.block,
            "row": documents.row,
            "offset": documents.offset,
            "length": documents.length,
        }
        first_item = first
        if documents.items is not None:
            # Items are counted through all windows: a window begins where the document before it ends.
            stop = self._num_items + np.cumsum(documents.items)
            columns["stop"] = stop
            before = np.append(self._num_items, stop)
            first_item = before[first - len(self._columns)]
            self._num_items = int(before[-1])
        self._columns.append(columns)
        self._windows.append({"first": first, "first_item": first_item, "last_use": np.zeros_like(first)})
        self._keys += keys

    def use(self, windows: Ints, time: int) -> None:
        """Record when windows were used last."""
        self._windows["last_use"][windows] = time

    def recently_used(self, max_bytes: int) -> Ints:
        """Return the windows used last that fit into a budget, and all that were used at the latest time; ascending."""
        last_use = self._windows["last_use"]
        newest_first = np.argsort(-last_use, kind="stable")
        num_bytes = np.cumsum(self._counts()[newest_first]) * self._columns.row_bytes
        is_chosen = (num_bytes <= max_bytes) | (last_use[newest_first] == last_use.max(initial=0))
        return np.sort(newest_first[is_chosen])

    def select(self, windows: Ints) -> "WindowTable":
        """Return a table of some of the windows, in this order."""
        counts = self._counts()[windows]
        chosen = concatenated_ranges(self._windows["first"][windows], counts)
        table = WindowTable(self.types, has_unit_items=self.has_unit_items)
        table.append(
            [self._keys[number] for number in windows.tolist()],
            counts,
            WindowDocuments(
                block=self._columns["block"][chosen],
                row=self._columns["row"][chosen],
                offset=self._columns["offset"][chosen],
                length=self._columns["length"][chosen],
                items=None if self.has_unit_items else self.items(chosen),
            ),
        )
        table._windows["last_use"][:] = self._windows["last_use"][windows]
        return table

    def cover(self, windows: Ints, begin: Ints, end: Ints) -> tuple[Ints, Ints]:
        """Return the first document that covers each span of items, and the number of documents.

        Args:
            windows: the window of each span.
            begin: first item of each span, counted from the start of the window.
            end: one past the last item; greater than `begin`.
        """
        first_item = self._windows["first_item"][windows]
        if self.has_unit_items:
            return first_item + begin, end - begin
        # The document that holds an item is the first one that ends behind it. One search finds those of both ends.
        items = np.concatenate([first_item + begin, first_item + end - 1])
        documents = self._directory.search(self._columns["stop"], items)
        first = documents[: len(begin)]
        return first, documents[len(begin) :] + 1 - first

    def items(self, documents: Ints) -> Ints:
        """Return the items of each document."""
        if self.has_unit_items:
            return np.ones(len(documents), np.int64)
        stops = self._columns["stop"]
        items: Ints = stops[documents] - stops[documents - 1]
        return items

    def item_stops(self, documents: Ints) -> Ints:
        """Return one past the last item of documents, counted through all windows, where documents have many items."""
        return self._columns["stop"].take(documents)

    def item_starts(self, windows: Ints) -> Ints:
        """Return the first item of windows, counted through all windows."""
        starts: Ints = self._windows["first_item"][windows]
        return starts

    def windows_of(self, documents: Ints) -> Ints:
        """Return the window of each document."""
        # A window without documents begins where the next one does.
        return np.searchsorted(self._windows["first"], documents, side="right") - 1

    def places(self, windows: Ints, documents: Ints) -> Ints:
        """Return the position of documents in their windows."""
        places: Ints = documents - self._windows["first"][windows]
        return places

    def values(self, column: str, documents: Ints, dtype: DTypeLike) -> NDArray[Any]:
        """Return a column of some documents."""
        return self._columns[column][documents].astype(dtype, copy=False)

    def _counts(self) -> Ints:
        return np.diff(self._windows["first"], append=len(self._columns))
