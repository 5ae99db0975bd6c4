"""The borders of all windows of the epochs in use, in one array: one binary search finds the windows of any streams.

At most two epochs of a domain are in memory, one with an even and one with an odd number. Price: the order of an epoch
is computed once, O(blocks of the domain); adding an epoch copies the borders of all epochs in memory.
"""

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.order import EpochOrder
from mixtera_hpc.dataplane.reading.lookup.columns import concatenated_ranges, search
from mixtera_hpc.dataplane.reading.stream_layout import StreamLayout

__all__ = ["EPOCH_END", "NOT_IN_MEMORY", "EpochOrders", "WindowKey", "WindowSpans"]

Ints = NDArray[np.int64]
NOT_IN_MEMORY = -1
"""The number of a window that is not in the window table."""
EPOCH_END = -2
"""The number in place of a window behind the last one of an epoch."""
ORDERS_BETWEEN_PAUSES = 32
"""Orders of epochs that are computed, in about 0.5 ms, until other threads get a turn.

numpy gives the interpreter's lock up for a few microseconds at a time, and takes it again before a thread that waits
for it wakes up. Such a thread does not ask for its turn either, so it would wait for the orders of all domains.
"""
PAUSE_S = 50e-6
READS_AHEAD = 8
"""A window that is needed within so many reads of the same size is built together with those that are missing."""


class WindowKey(NamedTuple):
    """The identity of a window."""

    domain: int
    epoch: int
    number: int
    """Position in the epoch."""


@dataclass(frozen=True, slots=True)
class WindowSpans:
    """Parts of spans that lie in one window each; shape (n,) each."""

    cell: Ints
    """Number of the window among all borders."""
    begin: Ints
    """First item, counted from the start of the window."""
    end: Ints


class EpochOrders:
    """An index from domain, epoch and item to windows."""

    def __init__(self, layout: StreamLayout) -> None:
        """Order nothing yet."""
        self._layout = layout
        # Every (domain, parity of the epoch) has a range of keys of its own, in which its items are counted.
        sizes = np.repeat(layout.epoch_items() + 1, 2)
        self._first_key = np.cumsum(sizes) - sizes
        self._epoch = np.full(len(sizes), -1, np.int64)
        self._orders: dict[int, EpochOrder] = {}
        """2 × domain + parity → order of the epoch."""
        self._first_cell = np.zeros(len(sizes), np.int64)
        self._keys: Ints = np.zeros(0, np.int64)
        """The first item of every window and the end of every epoch, as keys; ascending."""
        self.window: Ints = np.zeros(0, np.int64)
        """Number in the window table of the window of each cell, or `NOT_IN_MEMORY`, or `EPOCH_END`."""

    def can_hold(self, domain: Ints, epoch: Ints) -> bool:
        """Return True if all these epochs can be in memory together."""
        slot = 2 * domain + (epoch & 1)
        if (self._epoch[slot] == epoch).all():
            return True
        chosen = np.full(len(self._epoch), -1, np.int64)
        chosen[slot] = epoch
        return bool((chosen[slot] == epoch).all())

    def find(self, domain: Ints, epoch: Ints, begin: Ints, end: Ints) -> WindowSpans:
        """Cut spans at the borders of windows; the parts follow in the order of the spans.

        Args:
            domain: of each span.
            epoch: of each span; see `can_hold`.
            begin: first item of each span, counted in the base order of the epoch.
            end: one past the last item.
        """
        slot = 2 * domain + (epoch & 1)
        is_missing = self._epoch[slot] != epoch
        if is_missing.any():
            self._add(slot[is_missing], epoch[is_missing])
        first_key = self._first_key[slot]
        begin = begin + first_key
        end = end + first_key
        cell = search(self._keys, begin, side="right") - 1
        # Nearly always each span lies in one window.
        is_cut = end > self._keys.take(cell + 1)
        if is_cut.any():
            count = np.ones_like(cell)
            count[is_cut] = np.searchsorted(self._keys, end[is_cut], side="left") - cell[is_cut]
            span = np.repeat(np.arange(len(cell)), count)
            cell = concatenated_ranges(cell, count)
            begin = np.maximum(begin[span], self._keys[cell])
            end = np.minimum(end[span], self._keys[cell + 1])
            # A span may cross a window without items.
            filled = np.flatnonzero(begin < end)
            cell = cell[filled]
            begin = begin[filled]
            end = end[filled]
        start = self._keys[cell]
        return WindowSpans(cell, begin - start, end - start)

    def missing(self, spans: WindowSpans) -> Ints:
        """Return the cells whose windows are not in memory, of spans and of what follows soon; spans have some."""
        missing = spans.cell[self.window[spans.cell] < 0]
        # The next window of the epoch, if what remains of this one is served within a few reads of this size.
        following = spans.cell + 1
        num_remaining = self._keys[following] - self._keys[spans.cell] - spans.end
        is_needed_soon = num_remaining < READS_AHEAD * (spans.end - spans.begin)
        soon = following[is_needed_soon & (self.window[following] == NOT_IN_MEMORY)]
        return np.unique(np.concatenate([missing, soon]))

    def windows_in_memory(self) -> Ints:
        """Return the numbers in the window table of all windows that can be asked for."""
        return self.window[self.window >= 0]

    def renumber(self, numbers: Ints) -> None:
        """Follow a change of the window table; `numbers` has the new number of each window, or `NOT_IN_MEMORY`."""
        in_table = np.flatnonzero(self.window >= 0)
        self.window[in_table] = numbers[self.window[in_table]]

    def window_keys(self, cells: Ints) -> list[tuple[WindowKey, EpochOrder]]:
        """Return the identity of the windows of some cells, and the order of their epochs."""
        # The slot of a cell is the last one that begins at the cell or before it.
        slots = np.array(list(self._orders), np.int64)
        own = slots[np.searchsorted(self._first_cell[slots], cells, side="right") - 1]
        numbers = cells - self._first_cell[own]
        places = zip(own.tolist(), self._epoch[own].tolist(), numbers.tolist(), strict=True)
        return [(WindowKey(slot // 2, epoch, number), self._orders[slot]) for slot, epoch, number in places]

    def order(self, domain: int, epoch: int) -> EpochOrder:
        """Return the order of an epoch."""
        slot = 2 * domain + (epoch & 1)
        if self._epoch[slot] != epoch:
            self._add(np.array([slot]), np.array([epoch]))
        return self._orders[slot]

    def _add(self, slots: Ints, epochs: Ints) -> None:
        """Order epochs, which replace those of the same parity."""
        windows = {slot: self.window[self._cells(slot)] for slot in self._orders}
        for number, (slot, epoch) in enumerate(set(zip(slots.tolist(), epochs.tolist(), strict=True)), 1):
            if number % ORDERS_BETWEEN_PAUSES == 0:
                time.sleep(PAUSE_S)
            order = self._layout.epoch_order(slot // 2, epoch)
            self._orders[slot] = order
            self._epoch[slot] = epoch
            windows[slot] = np.full(len(order.starts), NOT_IN_MEMORY, np.int64)
            windows[slot][-1] = EPOCH_END

        # Number all cells again, slot after slot. Slots ascend, and so do their keys.
        self._orders = {slot: self._orders[slot] for slot in sorted(self._orders)}
        lengths = np.array([len(order.starts) for order in self._orders.values()])
        active = np.array(list(self._orders), np.int64)
        self._first_cell[active] = np.cumsum(lengths) - lengths
        starts = np.concatenate([order.starts for order in self._orders.values()])
        self._keys = starts + np.repeat(self._first_key[active], lengths)
        self.window = np.concatenate([windows[slot] for slot in self._orders])

    def _cells(self, slot: int) -> slice:
        first = int(self._first_cell[slot])
        return slice(first, first + len(self._orders[slot].starts))
