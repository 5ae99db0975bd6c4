"""Rows of windows in use, for formats that decode whole blocks (compressed files, Parquet).

When a domain enters a window, every block of the window is decoded, and the rows of this domain stay in memory until
they are served. So do the rows that other domains of the same speed need soon (`rows_ahead`). A domain that moves at
another speed decodes each block once more. Rows of JSON lines stay in memory as lines, and rows with nested values as
pickles, see `packed_rows`. They are returned packed, and become objects when their batch is made.

If the windows in use do not fit into the budget, only the rows of each window that are served next are kept, and the
window is decoded again for the others: with a budget of half of what is needed, about twice. Price: a dictionary lookup
per window and read, and two list operations per row.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents, StreamWindow, equal_runs
from mixtera_hpc.dataplane.reading.lookup.epoch_orders import WindowKey
from mixtera_hpc.dataplane.reading.residency.packed_rows import PackBlock, PackedRows, Unpack, num_bytes
from mixtera_hpc.dataplane.reading.residency.rows_ahead import RowsAhead
from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.batching.json_problems import JSON_ERRORS

__all__ = ["MAX_ROW_SHARE", "ReadBlock", "ResidentRows"]

ReadBlock = Callable[[int, NDArray[np.int64]], Sequence[Any]]
"""Decodes a block and returns the named rows of it, given their ascending positions."""
AreRead = Callable[[NDArray[np.int32]], NDArray[np.bool_]]
"""Returns which blocks are decoded as a whole, given their numbers; shape (n,)."""
MAX_ROW_SHARE = 0.75
"""Largest part of the memory of a process for rows of windows in use; rows for later windows have the rest."""
MIN_SHARE = 1 / 64
"""Least share of a window's rows that is kept."""
GROWTH = 1.01
"""Growth of this share with every window that is loaded while all fit."""
MAX_EVICTED = 4096
"""Number of evicted windows with unserved rows that are remembered."""


class _WindowRows:
    """The rows of a part of a window that were not served yet."""

    def __init__(self, start: int, rows: list[Any], unpacks: list[Unpack | None]) -> None:
        self.start = start
        self.rows = rows
        """The rows; None in place of those that were served, and of those that are not read by blocks."""
        self._unpacks = unpacks
        """The function that unpacks each row."""
        own = [row for row in rows if row is not None]
        self.num_remaining = len(own)
        self.num_bytes = sum(map(num_bytes, own))

    def get(self, positions: list[int]) -> tuple[list[Any], list[Unpack | None]] | None:
        """Return the rows at these positions of the window, packed, and how to unpack each; None if one is not here."""
        start = self.start
        if min(positions) < start or max(positions) >= start + len(self.rows):
            return None
        rows = [self.rows[position - start] for position in positions]
        if any(row is None for row in rows):
            return None
        return rows, [self._unpacks[position - start] for position in positions]

    def drop(self, positions: list[int]) -> int:
        """Free rows that were served, and return their bytes."""
        freed = 0
        for position in positions:
            row = self.rows[position - self.start]
            if row is not None:
                freed += num_bytes(row)
                self.num_remaining -= 1
                self.rows[position - self.start] = None
        self.num_bytes -= freed
        return freed


class ResidentRows:
    """Serves rows of blocks that are decoded as a whole. One per reading thread."""

    def __init__(
        self,
        max_bytes: int,
        read_block: ReadBlock,
        pack_block: PackBlock,
        are_read: AreRead,
        ahead: RowsAhead | None = None,
    ) -> None:
        """Keep nothing yet.

        Args:
            max_bytes: budget for all rows.
            read_block: decodes blocks.
            pack_block: the same, for rows that stay in memory.
            are_read: returns which blocks of a window are decoded as a whole; the rows of the others are not kept.
            ahead: rows that other domains need later; None to keep none.
        """
        self._max_bytes = max_bytes
        self._max_window_bytes = int(max_bytes * MAX_ROW_SHARE)
        self._ahead = ahead
        self._read_block = read_block
        self._pack_block = pack_block
        self._are_read = are_read
        self._windows: OrderedDict[WindowKey, _WindowRows] = OrderedDict()
        """Key of the window → its rows, the one used last at the end."""
        self._num_bytes = 0
        self._share = 1.0
        """Share of a window's rows that is kept when it is decoded."""
        self._evicted: OrderedDict[WindowKey, int] = OrderedDict()
        """Key of an evicted window → number of windows that had been loaded then."""
        self._num_loads = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows in memory."""
        return self._num_bytes + (0 if self._ahead is None else self._ahead.num_bytes)

    def read(self, documents: Documents) -> tuple[list[Any], list[Unpack | None]]:
        """Return the rows of `documents` as they stay in memory, and how to unpack each of them.

        Raises:
            DataError: a block cannot be decoded.
        """
        if self._ahead is not None:
            self._ahead.advance(documents)
        rows: list[Any] = [None] * len(documents.block)
        unpacks: list[Unpack | None] = [None] * len(documents.block)
        by_window = np.argsort(documents.window, kind="stable")
        for first, last in equal_runs(documents.window[by_window]):
            chosen = by_window[first:last]
            window = documents.windows[int(documents.window[chosen[0]])]
            own = self._read(window, documents.place[chosen].tolist())
            for number, row, unpack in zip(chosen.tolist(), *own, strict=True):
                rows[number] = row
                unpacks[number] = unpack
        return rows, unpacks

    def _read(self, window: StreamWindow, positions: list[int]) -> tuple[list[Any], list[Unpack | None]]:
        """Return the rows at some positions of a window, and how to unpack them."""
        held = self._windows.get(window.key)
        rows = held.get(positions) if held is not None else None
        if held is None or rows is None:
            try:
                held = self._load(window, min(positions), max(positions) + 1)
                rows = held.get(positions)
            except (DataError, ValueError, *JSON_ERRORS):
                rows = None
        if held is None or rows is None:
            # A row is damaged. One that is needed later is reported then.
            return _read_rows(window, np.array(positions), self._read_block), [None] * len(positions)
        self._windows.move_to_end(window.key)
        self._num_bytes -= held.drop(positions)
        if not held.num_remaining:
            del self._windows[window.key]
        return rows

    def _load(self, window: StreamWindow, first: int, stop: int) -> _WindowRows:
        """Decode the blocks of a window and keep its rows from `first` on, at least up to `stop`."""
        self._remove(window.key)
        self._num_loads += 1
        if self._evicted.pop(window.key, -self._num_loads) + len(self._windows) >= self._num_loads - 1:
            # Evicted a moment ago: the windows in use do not fit, so less of each is kept.
            self._share = max(self._share / 2, MIN_SHARE)
        else:
            self._share = min(self._share * GROWTH, 1.0)
        num_rows = len(window.block)
        stop = min(max(stop, first + int(num_rows * self._share)), num_rows)
        held = _WindowRows(first, *self._packed_rows(window, np.arange(first, stop)))
        self._windows[window.key] = held
        self._num_bytes += held.num_bytes
        self._evict()
        if self._ahead is not None:
            self._ahead.limit(self._max_bytes - self._num_bytes)
        return held

    def _packed_rows(self, window: StreamWindow, positions: NDArray[np.int64]) -> tuple[list[Any], list[Unpack | None]]:
        """Return the rows at some positions of a window as they stay in memory, and how to unpack each of them.

        Those of blocks that are not read here are None.
        """
        unpack_of_block: dict[int, Unpack | None] = {}
        if self._ahead is not None:
            self._ahead.enter(window.key, np.unique(window.block[positions]), self._windows.__contains__)
        own = np.flatnonzero(self._are_read(window.block[positions]))

        def read(block: int, rows: NDArray[np.int64]) -> Sequence[Any]:
            packed = self._pack(window.key.domain, block, rows)
            unpack_of_block[block] = packed.unpack
            return packed.values

        values = _read_rows(window, positions[own], read)
        unpacks = list(map(unpack_of_block.__getitem__, window.block[positions[own]].tolist()))
        if len(own) == len(positions):
            return values, unpacks
        spread: list[Any] = [None] * len(positions)
        spread_unpacks: list[Unpack | None] = [None] * len(positions)
        for number, value, unpack in zip(own.tolist(), values, unpacks, strict=True):
            spread[number] = value
            spread_unpacks[number] = unpack
        return spread, spread_unpacks

    def _pack(self, domain: int, block: int, rows: NDArray[np.int64]) -> PackedRows:
        return self._pack_block(block, rows) if self._ahead is None else self._ahead.pack(domain, block, rows)

    def _evict(self) -> None:
        """Drop the windows that were not used for longest, until the others fit; the newest one stays."""
        while self._num_bytes > self._max_window_bytes and len(self._windows) > 1:
            key = next(iter(self._windows))
            self._remove(key)
            self._evicted[key] = self._num_loads
            if len(self._evicted) > MAX_EVICTED:
                self._evicted.popitem(last=False)

    def _remove(self, key: WindowKey) -> None:
        held = self._windows.pop(key, None)
        if held is not None:
            self._num_bytes -= held.num_bytes


def _read_rows(window: StreamWindow, positions: NDArray[np.int64], read_block: ReadBlock) -> list[Any]:
    """Return the rows at some positions of a window; every block is decoded once."""
    rows: list[Any] = [None] * len(positions)
    block = window.block[positions]
    row = window.row[positions]
    disk_order = np.lexsort((row, block))
    for first, last in equal_runs(block[disk_order]):
        chosen = disk_order[first:last]
        distinct, inverse = np.unique(row[chosen].astype(np.int64), return_inverse=True)
        values = read_block(int(block[chosen[0]]), distinct)
        for number, value in zip(chosen.tolist(), inverse.tolist(), strict=True):
            rows[number] = values[value]
    return rows
