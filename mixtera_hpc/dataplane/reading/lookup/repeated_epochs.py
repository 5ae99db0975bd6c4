"""Domains so small that a sequence holds many of their epochs: many epochs are one window, built in one step.

A domain of two tokens at sequences of 32,768 repeats 16,384 times in each. Epoch by epoch that took 140 µs each. Here
consecutive epochs form a group of at least `GROUP_ITEMS` items, whose documents are permuted together. Price: about
1 µs per document of a group, and its memory in the window table.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.lanes import ServedPart
from mixtera_hpc.core.repeats.epoch_rows import epoch_rows, is_one_window
from mixtera_hpc.dataplane.reading.lookup.block_samples import BlockSamples, item_count_error
from mixtera_hpc.dataplane.reading.lookup.columns import concatenated_ranges
from mixtera_hpc.dataplane.reading.lookup.epoch_orders import WindowKey
from mixtera_hpc.dataplane.reading.lookup.window_table import WindowDocuments, WindowTable
from mixtera_hpc.dataplane.reading.stream_layout import StreamLayout

__all__ = ["RepeatedEpochs"]

Ints = NDArray[np.int64]

MAX_EPOCH_ITEMS = 4096
"""Items of an epoch of a small domain, at most."""

GROUP_ITEMS = 1 << 15
"""Items of a group of epochs, at least."""

SAMPLES_AT_ONCE = 1 << 21
"""Samples that are ordered together: a drop may leave few items of a domain with many samples."""

UNKNOWN = -1
"""The value for a domain whose size was not looked up yet."""

GROUP = -1
"""Number in the key of a window that is a group of epochs; the epoch in the key is the number of the group."""


class RepeatedEpochs:
    """The groups of epochs of small domains, built when they are needed."""

    def __init__(self, layout: StreamLayout, samples: BlockSamples, served: Mapping[int, ServedPart]) -> None:
        """Build nothing yet; see `DomainStreams` for the arguments."""
        self._layout = layout
        self._samples = samples
        self._epoch_items = layout.epoch_items()
        self._num_epochs = -(-GROUP_ITEMS // np.maximum(self._epoch_items, 1))
        """Epochs in a group of each domain."""
        may_be_small = (self._epoch_items > 0) & (self._epoch_items <= MAX_EPOCH_ITEMS)
        self._is_small = np.where(may_be_small, UNKNOWN, 0).astype(np.int8)
        # The epoch in which samples were dropped, or sequences cut anew, has an order of its own.
        self._first_epoch = np.zeros(len(self._epoch_items), np.int64)
        for domain, part in served.items():
            self._first_epoch[domain] = part.epoch + 1
        self._windows: dict[tuple[int, int], int] = {}
        """(domain, group) → number in the window table."""

    def holds(self, domain: Ints, starts: Ints, stops: Ints) -> NDArray[np.bool_]:
        """Return which spans are longer than an epoch of a small domain; shape of `domain`.

        Args:
            domain: of each span.
            starts: first item of each span.
            stops: one past the last item of each span.
        """
        is_long: NDArray[np.bool_] = stops - starts > self._epoch_items[domain]
        if not is_long.any():
            return is_long
        for unknown in np.unique(domain[self._is_small[domain] == UNKNOWN]).tolist():
            self._is_small[unknown] = is_one_window(self._layout.order, self._layout.block_bytes(unknown))
        is_small: NDArray[np.bool_] = self._is_small[domain] == 1
        return is_long & is_small & (starts >= self._first_epoch[domain] * self._epoch_items[domain])

    def windows_in_memory(self) -> Ints:
        """Return the numbers of all groups in the window table."""
        return np.array(list(self._windows.values()), np.int64)

    def renumber(self, numbers: Ints) -> None:
        """Follow a change of the window table; `numbers` has the new number of each window, -1 if it was dropped."""
        renumbered = {key: int(numbers[window]) for key, window in self._windows.items()}
        self._windows = {key: window for key, window in renumbered.items() if window >= 0}

    def parts(self, table: WindowTable, domain: Ints, starts: Ints, stops: Ints) -> tuple[Ints, Ints, Ints]:
        """Return window, first item in it and one past the last, of the parts of spans; build missing windows.

        Raises:
            DataError: the samples of a block do not add up to what the index counted for it.
        """
        # Repeat each span once for every group that it touches, and clip each copy to its own group.
        group_items = self._epoch_items[domain] * self._num_epochs[domain]
        first = starts // group_items
        count = (stops - 1) // group_items + 1 - first
        group = concatenated_ranges(first, count)
        domain, starts, stops, group_items = (np.repeat(v, count) for v in (domain, starts, stops, group_items))
        windows = [self._window(table, *key) for key in zip(domain.tolist(), group.tolist(), strict=True)]
        begin = np.maximum(starts - group * group_items, 0)
        return np.array(windows, np.int64), begin, np.minimum(stops - group * group_items, group_items)

    def _window(self, table: WindowTable, domain: int, group: int) -> int:
        """Return the number of the window of a group of epochs; build it if it is not in memory."""
        number = self._windows.get((domain, group))
        if number is None:
            number = len(table)
            self._build(table, domain, group)
            # Only now: a group that cannot be built must not be found by the next read.
            self._windows[domain, group] = number
        return number

    def _build(self, table: WindowTable, domain: int, group: int) -> None:
        blocks = self._layout.table.block[self._layout.entries(domain)]
        self._samples.load(blocks)
        first, stop = self._samples.locate(blocks, np.full(len(blocks), domain))
        count = stop - first
        position = concatenated_ranges(first, count)
        block = np.repeat(blocks, count)

        num_epochs = int(self._num_epochs[domain])
        epochs = np.arange(group * num_epochs, (group + 1) * num_epochs)
        columns = self._samples.columns
        rows = self._ordered(domain, epochs, blocks, count, position)
        chosen = position[rows]
        items = columns["items"][chosen] if self._layout.in_tokens else None
        num_items = len(chosen) if items is None else int(items.sum())
        expected = num_epochs * int(self._epoch_items[domain])
        if num_items != expected:
            raise item_count_error(domain, len(blocks), num_items // num_epochs, expected // num_epochs)
        table.append(
            [WindowKey(domain, group, GROUP)],
            np.array([len(chosen)]),
            WindowDocuments(
                block=block[rows],
                row=columns["row"][chosen],
                offset=columns["offset"][chosen],
                length=columns["length"][chosen],
                items=items,
            ),
        )

    def _ordered(self, domain: int, epochs: Ints, blocks: NDArray[np.int32], count: Ints, position: Ints) -> Ints:
        """Return the samples that are served of each epoch in turn, as numbers of `position`."""
        columns = self._samples.columns
        block_of_sample = np.repeat(np.arange(len(blocks)), count)
        parts = []
        at_once = max(SAMPLES_AT_ONCE // max(len(position), 1), 1)
        for first in range(0, len(epochs), at_once):
            own = epochs[first : first + at_once]
            rows = epoch_rows(self._layout.order, domain, own, block_of_sample, blocks).reshape(-1)
            if "is_served" in columns:
                # The permutation covers dropped samples too, so that a drop does not reorder the samples that remain.
                rows = rows[columns["is_served"][position[rows]]]
            parts.append(rows)
        return np.concatenate(parts)
