"""The progress of the domains, and the time at which each of them needs the rows of a block.

All lanes of a domain advance together, so its *progress* is one number: epochs served before, plus the part of every
lane that was served in this epoch. It is measured from the documents of each read. Price: about 3 µs per window of a
read, and about 20 µs per domain and decoded window.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.lanes import LaneOrder
from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.stream_layout import StreamLayout

__all__ = ["StreamProgress"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

PASSED = np.inf
"""Progress of a block that is not needed any more."""
SPEED_MEMORY = 0.8
"""Weight of earlier reads in the speed of a domain."""


@dataclass(frozen=True, slots=True)
class _Epoch:
    """The windows of one epoch of a domain."""

    starts: Ints
    """First item of every window, followed by the number of items in the epoch."""
    window_of_block: Ints
    """Window of each block in the domain's block list."""
    lanes_start: int
    """First item of the first lane."""
    lane_items: int
    """Items of a lane; 0 if the epoch has no whole lanes."""


class StreamProgress:
    """The progress and the speed of every domain. One per reading thread."""

    def __init__(self, layout: StreamLayout, lanes: LaneOrder) -> None:
        """Start without any progress."""
        self._layout = layout
        self._lanes = lanes
        self._epochs: dict[tuple[int, int], _Epoch] = {}
        rows, _ = layout.table.totals()
        self._rows = np.maximum(rows, 1)
        self._is_read = np.zeros(lanes.lanes, np.bool_)
        """Lanes that this process reads."""
        self.current: Floats = np.full(len(rows), np.nan)
        """Progress of each domain; NaN before its first document. Shape (K,)."""
        self.speed: Floats = np.zeros(len(rows))
        """Progress of each domain per read; shape (K,)."""

    def advance(self, documents: Documents) -> None:
        """Record the documents of a read."""
        windows, inverse = np.unique(documents.window, return_inverse=True)
        keys = [documents.windows.key(int(window)) for window in windows]
        domain = np.array([key.domain for key in keys])
        is_epoch = np.array([key.number >= 0 for key in keys])
        first = np.zeros(len(keys), np.int64)
        num_items = np.zeros(len(keys), np.int64)
        lanes_start = np.zeros(len(keys), np.int64)
        lane_items = np.zeros(len(keys), np.int64)
        for i, key in enumerate(keys):
            if key.number < 0:
                continue
            epoch = self._epoch(key.domain, key.epoch)
            first[i], stop = epoch.starts[key.number : key.number + 2]
            num_items[i] = stop - first[i]
            lanes_start[i] = epoch.lanes_start
            lane_items[i] = epoch.lane_items
        # The first item of each document, counted in lanes, as if all documents of a window had equally many items.
        items_per_document = num_items / documents.windows.num_documents(windows)
        item = first[inverse] + documents.place * items_per_document[inverse] - lanes_start[inverse]
        in_lanes = is_epoch[inverse] & (item >= 0) & (item < lane_items[inverse] * self._lanes.lanes)
        chosen = np.flatnonzero(in_lanes)
        # The lane of each document, and the part of this lane that comes before the document.
        lane, part = np.divmod(item[chosen] / lane_items[inverse[chosen]], 1)
        self._is_read[lane.astype(np.int64)] = True
        progress = np.array([key.epoch for key in keys])[inverse[chosen]] + part
        self._set_progress(domain[inverse[chosen]], progress)

    def _set_progress(self, domain: Ints, progress: Floats) -> None:
        """Record the progress of documents of a read."""
        num_lanes = np.count_nonzero(self._is_read) / self._lanes.lanes
        # Sorted by domain and, for each domain, by progress.
        order = np.lexsort((progress, domain))
        counts = np.bincount(domain, minlength=len(self.current))
        seen = np.flatnonzero(counts)
        ends = np.cumsum(counts[seen])
        # The median: documents on the border of two lanes have the progress of the wrong one.
        self.current[seen] = progress[order][ends - (counts[seen] + 1) // 2]
        speed = counts / self._rows / max(num_lanes, 1e-9)
        is_new = (self.speed == 0) | (counts == 0)
        recent = SPEED_MEMORY * self.speed + (1 - SPEED_MEMORY) * speed
        self.speed = np.where(is_new, np.maximum(speed, self.speed), recent)

    def reads_until(self, domain: Ints, needed: Floats) -> Floats:
        """Return the number of reads until each domain reaches the progress `needed`; 0 or less if it has passed it."""
        return (needed - self.current[domain]) / np.maximum(self.speed[domain], 1e-12)

    def needed(self, domain: int, blocks: NDArray[np.int32], epoch: int) -> tuple[Ints, Floats]:
        """Return the window of each block for a domain, and the progress at which it is needed.

        Args:
            domain: a domain with rows in all of the blocks, whose progress is known.
            blocks: any blocks.
            epoch: epoch of the domain for which the blocks are decoded.
        """
        epoch = self.epoch_of(domain, epoch)
        order = self._epoch(domain, epoch)
        if not order.lane_items:
            return np.zeros(len(blocks), np.int64), np.full(len(blocks), PASSED)
        place = np.searchsorted(self._layout.table.block[self._layout.entries(domain)], blocks)
        window = order.window_of_block[place]
        begin = (order.starts[window] - order.lanes_start) / order.lane_items
        end = (order.starts[window + 1] - order.lanes_start) / order.lane_items
        first_lane = np.floor(begin).astype(np.int64)
        # A window may lie on the border of two lanes.
        is_in_next = end > first_lane + 1
        passed = self.passed(domain)
        own = self._needed_in(first_lane, epoch + begin - first_lane, epoch + np.minimum(end - first_lane, 1), passed)
        following = self._needed_in(
            first_lane + 1, np.full(len(blocks), float(epoch)), epoch + np.minimum(end - first_lane - 1, 1), passed
        )
        return window, np.minimum(own, np.where(is_in_next, following, PASSED))

    def passed(self, domain: int) -> float:
        """Return the progress that `domain` had reached in all lanes two reads ago."""
        epoch = self._epoch(domain, int(self.current[domain]))
        # Lanes are served in turn, so some of them are a sequence behind.
        return float(self.current[domain] - 2 * self.speed[domain]) - self._lanes.grid.stride / max(epoch.lane_items, 1)

    def _needed_in(self, lane: Ints, begin: Floats, end: Floats, passed: float) -> Floats:
        """Return the progress at which the parts of lanes from `begin` to `end` are needed; shape of `lane`."""
        is_lane = (lane >= 0) & (lane < len(self._is_read))
        is_read = is_lane & self._is_read[np.where(is_lane, lane, 0)]
        return np.where(is_read & (end > passed), begin, PASSED)

    def epoch_of(self, domain: int, epoch: int) -> int:
        """Return the epoch in which `domain` needs blocks next that another domain needs in `epoch`."""
        # A domain at the end of its epoch needs the blocks of the next one.
        current = int(self.current[domain])
        return min(max(epoch, current), current + 1)

    def _epoch(self, domain: int, epoch: int) -> _Epoch:
        if (domain, epoch) not in self._epochs:
            for other in [key for key in self._epochs if key[0] == domain and key[1] < epoch - 1]:
                del self._epochs[other]
            self._epochs[domain, epoch] = self._make_epoch(domain, epoch)
        return self._epochs[domain, epoch]

    def _make_epoch(self, domain: int, epoch: int) -> _Epoch:
        order = self._layout.epoch_order(domain, epoch)
        # The window of each place in the order of the epoch, and from it the window of each block.
        window_of_place = np.repeat(np.arange(len(order.first_block) - 1), np.diff(order.first_block))
        window_of_block = np.empty_like(window_of_place)
        window_of_block[order.block_order] = window_of_place
        items = int(self._lanes.epoch_items[domain])
        origin = int(self._lanes.origins[domain])
        stride = self._lanes.grid.stride
        number = -((origin - epoch * items) // stride)  # The first sequence that begins in the epoch.
        first, count = (int(value[0]) for value in self._lanes.whole_sequences(domain, np.array([number])))
        start = origin + first * stride - epoch * items
        return _Epoch(order.starts, window_of_block, start, count // self._lanes.lanes * stride)
