"""Continue streams that an edit cuts differently: shorter ones after a drop, other sequences after a change of seq_len.

What was served of the current epoch is not always its beginning, because sequences come from several lanes. From the
edit on, the stream of this epoch begins with the items that were served, and continues with all others in base order.
So every item of the epoch belongs to exactly one sequence, before or after the edit. Price: two integers per domain and
two per lane; for a drop also one window of sample columns per domain and lane.
"""

from dataclasses import replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.core.lanes import ServedPart
from mixtera_hpc.core.order import EpochOrder
from mixtera_hpc.dataplane.reading.packing.sequence_documents import SequenceDocuments
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.resume.stream_version import StreamVersion

__all__ = ["cut_streams", "with_sequence_length"]

Ints = NDArray[np.int64]


def with_sequence_length(position: PlannerState, before: Source, after: Source) -> PlannerState:
    """Return a position counted in sequences of another length: cursors round down, lags stay the same in tokens."""
    ratio = Fraction(before.grid.stride, after.grid.stride)
    cursors = [cursor * ratio.numerator // ratio.denominator for cursor in position.cursors.tolist()]
    lags = [lag * ratio.numerator // ratio.denominator for lag in position.lags.tolist()]
    # Every lag was rounded down. The largest takes what is missing, so that they still sum to 0.
    lags[int(np.argmax(lags))] -= sum(lags)
    return replace(position, cursors=np.array(cursors, np.int64), lags=np.array(lags, np.int64))


def cut_streams(version: StreamVersion, before: Source, after: Source, served: Ints, cursors: Ints) -> StreamVersion:
    """Return `version` with origins under which `cursors` mean, in the streams of `after`, what is not served yet.

    Args:
        version: steps and skips as the next attempt counts them.
        before: the data as they were served so far.
        after: the data as they will be served.
        served: sequences of `before` that were served of every domain; shape (K,).
        cursors: the same position as `after` counts it; shape (K,).
    """
    carrier = _ServedCarrier(before, after)
    begins = np.zeros(len(served), np.int64)
    parts = {}
    for domain, cursor in enumerate(served.tolist()):
        begins[domain], part = carrier.carry(domain, cursor)
        # What was served is often the beginning of the epoch: nothing has to be recorded then.
        if len(part.ranges) > 1 or (part.ranges and part.ranges[0][0] > 0):
            parts[domain] = part
    return replace(version, origins=begins - cursors * after.grid.stride, begins=begins, served=parts)


class _ServedCarrier:
    """The conversion of the served items of an epoch to the streams after an edit.

    The order of blocks and rows stays; after a drop the stream lacks the dropped rows. So an item of the base order
    corresponds to the number of items in front of it that were not dropped: whole windows, and the rows of one window.
    """

    def __init__(self, before: Source, after: Source) -> None:
        self._before = before
        self._after = after
        self._streams = before.streams()
        self._documents = SequenceDocuments(before, self._streams)
        self._read_blocks = after.samples.make_block_reader()
        # Positions are carried over in the order in which they were reached: that of the old seed.
        self._same_order = replace(after.layout, order=before.layout.order)
        self._is_shortened = before.subset != after.subset

    def carry(self, domain: int, cursor: int) -> tuple[int, ServedPart]:
        """Return where the stream of a domain continues after the edit, and what was served of that epoch."""
        old_items = int(self._before.layout.epoch_items()[domain])
        new_items = int(self._after.layout.epoch_items()[domain])
        if not old_items or not new_items:
            return 0, ServedPart(epoch=0, ranges=())
        epoch = self._before.span(domain, cursor, 1)[0] // old_items
        orders = self._before.layout.epoch_order(domain, epoch), self._same_order.epoch_order(domain, epoch)
        bounds = [
            (self._item_after(domain, epoch, orders, first), self._item_after(domain, epoch, orders, last))
            for first, last in self._served_ranges(domain, epoch, cursor)
        ]
        ranges = _merged_ranges(bounds)
        return epoch * new_items + sum(last - first for first, last in ranges), ServedPart(epoch=epoch, ranges=ranges)

    def _served_ranges(self, domain: int, epoch: int, cursor: int) -> tuple[tuple[int, int], ...]:
        """Return the items of the base order of `epoch` that were served before sequence `cursor`."""
        source = self._before
        items = int(source.layout.epoch_items()[domain])
        begin = epoch * items
        # What was served since the last edit, and what was served of the same epoch before it.
        in_stream = self._documents.served_items(domain, source.lanes.served_ranges(domain, cursor))
        if in_stream[0][0] > begin:
            in_stream.append((begin, in_stream[0][0]))
        spans = np.array([span for span in in_stream if span[0] < span[1]], np.int64).reshape(-1, 2)
        starts, stops = self._streams.base_items(domain, epoch, spans[:, 0], spans[:, 1])
        return _merged_ranges(list(zip(starts.tolist(), stops.tolist(), strict=True)))

    def _item_after(self, domain: int, epoch: int, orders: tuple[EpochOrder, EpochOrder], item: int) -> int:
        """Return the item of the base order after the edit that corresponds to `item` of the one before."""
        if not self._is_shortened:
            return item
        long_order, short_order = orders
        if item == long_order.starts[-1]:
            return int(short_order.starts[-1])
        window = long_order.window_at(item)
        item_in_window = item - int(long_order.starts[window])
        position = int(short_order.starts[window])
        if not item_in_window:
            return position

        # Rows of the window in front of the item: which of them are still served?
        passed = self._streams.window_documents(domain, epoch, window, item_in_window)
        blocks, block_number = np.unique(passed.block, return_inverse=True)
        rows = self._after.blocks.rows[blocks].astype(np.int64)
        first_row = np.cumsum(rows) - rows
        is_served = self._after.samples.is_not_dropped(self._read_blocks(blocks))[first_row[block_number] + passed.row]
        return position + int((passed.last - passed.first)[is_served].sum())


def _merged_ranges(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return ascending ranges with those that touch joined, and without empty ones."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(span for span in ranges if span[0] < span[1]):
        if merged and first == merged[-1][1]:
            merged[-1] = merged[-1][0], last
        else:
            merged.append((first, last))
    return tuple(merged)
