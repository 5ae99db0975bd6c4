"""Look up the documents at positions of the streams of domains.

A stream is the endless ordered sequence of one domain's items (tokens or samples), epoch after epoch. An epoch consists
of windows, groups of blocks inside which rows are shuffled. All positions of a read are looked up together, over all
domains and lanes. Price: about 0.15 ms per lookup of 2,048 documents. The first access to an epoch orders the domain's
blocks once, O(blocks). The first access to a window reads the sample columns of its blocks, if another domain or epoch
has not read them before, and builds the windows that are needed soon as well. Windows and columns are cached within
byte budgets.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.index_tables import SampleColumns
from mixtera_hpc.core.lanes import ServedPart, cut_spans
from mixtera_hpc.dataplane.reading.lookup.block_samples import BlockSamples, ReadBlocks
from mixtera_hpc.dataplane.reading.lookup.columns import concatenated_ranges
from mixtera_hpc.dataplane.reading.lookup.epoch_orders import NOT_IN_MEMORY, EpochOrders
from mixtera_hpc.dataplane.reading.lookup.repeated_epochs import RepeatedEpochs
from mixtera_hpc.dataplane.reading.lookup.shared_windows import SharedWindows
from mixtera_hpc.dataplane.reading.lookup.window_builder import build_windows
from mixtera_hpc.dataplane.reading.lookup.window_table import StreamWindow, WindowTable
from mixtera_hpc.dataplane.reading.stream_layout import StreamLayout

__all__ = ["Documents", "DomainStreams", "StreamWindow", "equal_runs"]

Ints = NDArray[np.int64]

WINDOW_CACHE_BYTES = 512 << 20
"""Windows that one reading thread keeps, at least those that were used last."""
MIN_TABLE_BYTES = 1 << 20
"""Largest window table, in bytes, that may keep the windows of past epochs whatever else it holds."""
SAMPLE_CACHE_BYTES = 128 << 20
"""Sample columns that a reading thread keeps: all domains return to the blocks they share."""


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Documents of one or several streams, in stream order; shape (n,) each. Any of them may be wanted only in part.

    The columns of the index are gathered when they are first used.
    """

    windows: WindowTable
    """The windows that these documents belong to, and others."""
    number: Ints
    """Position in `windows`."""
    first: Ints
    """First item of the document that is wanted."""
    last: Ints
    """One past the last item that is wanted."""
    part_sizes: Ints | None = None
    """Number of documents of each part in turn, if these are parts of windows: then they have consecutive numbers."""

    @cached_property
    def wanted(self) -> Ints:
        """Items of each document that are wanted."""
        return self.last - self.first

    @cached_property
    def wanted_stops(self) -> Ints:
        """Sum of the wanted items of each document and those before it."""
        return np.cumsum(self.wanted)

    @cached_property
    def block(self) -> NDArray[np.int32]:
        """Block of each document."""
        return self.windows.values("block", self.number, np.int32)

    @cached_property
    def row(self) -> NDArray[np.int32]:
        """Row inside the block."""
        return self.windows.values("row", self.number, np.int32)

    @cached_property
    def size(self) -> Ints:
        """All items of each document."""
        return self.windows.items(self.number)

    @cached_property
    def offset(self) -> Ints:
        """First byte of the row inside its block; meaningless for formats whose rows have no byte range."""
        return self.windows.values("offset", self.number, np.int64)

    @cached_property
    def length(self) -> Ints:
        """Bytes of the row."""
        return self.windows.values("length", self.number, np.int64)

    @cached_property
    def window(self) -> Ints:
        """Number of the window; the index into `windows`."""
        return self.windows.windows_of(self.number)

    @cached_property
    def place(self) -> Ints:
        """Position of the document in its window."""
        return self.windows.places(self.window, self.number)

    def select(self, chosen: NDArray[np.intp] | slice) -> "Documents":
        """Return some of the documents."""
        documents = Documents(
            windows=self.windows, number=self.number[chosen], first=self.first[chosen], last=self.last[chosen]
        )
        # Computed columns are small. To take them from the window table again would miss the processor's cache.
        for name in _COLUMNS & self.__dict__.keys():
            documents.__dict__[name] = self.__dict__[name][chosen]
        return documents


_COLUMNS = {"block", "row", "size", "offset", "length", "window", "place"}
"""Cached columns of `Documents`; the value of a document does not depend on the others."""


@dataclass(frozen=True, slots=True)
class _WindowParts:
    """Parts of spans that lie in one window each, in the order of the spans; shape (n,) each."""

    window: Ints
    """Number in the window table."""
    begin: Ints
    """First item, counted from the start of the window."""
    end: Ints

    def in_order(self, order: NDArray[np.intp], sizes: Ints) -> "_WindowParts":
        """Return the parts in the order of the spans that they belong to.

        Args:
            order: place of each span in the result; the parts follow each other in the order of these places.
            sizes: items of each span, which the parts add up to.
        """
        # A part belongs to the span that contains the first of its items, counted through all parts.
        first_items = np.cumsum(self.end - self.begin) - (self.end - self.begin)
        span = np.searchsorted(np.cumsum(sizes), first_items, side="right")
        chosen = np.argsort(order[span], kind="stable")
        return _WindowParts(self.window[chosen], self.begin[chosen], self.end[chosen])


class DomainStreams:
    """Looks up any position of any stream. Not thread-safe: one per reading thread."""

    def __init__(
        self,
        layout: StreamLayout,
        read_blocks: ReadBlocks,
        domain_of: Callable[[SampleColumns], NDArray[np.int32]],
        is_not_dropped: Callable[[SampleColumns], NDArray[np.bool_]] | None = None,
        served: Mapping[int, ServedPart] | None = None,
        shared: SharedWindows | None = None,
    ) -> None:
        """Use `Source.streams`.

        Args:
            layout: sizes and order of the streams.
            read_blocks: reads the samples of some blocks, one block after the other.
            domain_of: returns the domain of each sample. With the layout's seed it decides the order of the stream.
            is_not_dropped: returns which samples the streams still contain. The order of the others does not change.
            served: domain → the part of an epoch that its stream begins with after a drop; see `ServedPart`.
            shared: windows that other processes of the node have built; None if this one builds all.
        """
        self._layout = layout
        self._shared = shared
        self._served = served or {}
        self._served_domains = np.array(sorted(self._served), np.int64)
        self._epoch_items = layout.epoch_items()
        self._max_bytes = WINDOW_CACHE_BYTES
        self._limit = min(MIN_TABLE_BYTES, self._max_bytes)
        """Bytes of the window table from which on a lookup tries to drop windows."""
        sample_bytes = min(SAMPLE_CACHE_BYTES, WINDOW_CACHE_BYTES)
        self._samples = BlockSamples(layout, read_blocks, domain_of, is_not_dropped, sample_bytes)
        self._orders = EpochOrders(layout)
        self._repeated = RepeatedEpochs(layout, self._samples, self._served)
        types = {name: self._samples.columns[name].dtype for name in ("row", "offset", "length")}
        self._windows = WindowTable(types, has_unit_items=not layout.in_tokens)
        self._num_lookups = 0

    def documents(self, domain: int, start: int, stop: int) -> Documents:
        """Return the documents that cover the items [start, stop) of `domain`'s stream, in order.

        Raises:
            DataError: the samples of a block do not add up to what the index counted for it.
        """
        return self.documents_of(domain, np.array([start]), np.array([stop]))

    def documents_of(self, domain: int, starts: Ints, stops: Ints) -> Documents:
        """Return the documents of several spans of a stream, one span after the other."""
        return self.documents_of_spans(np.full(len(starts), domain), starts, stops)

    def documents_of_spans(self, domain: Ints, starts: Ints, stops: Ints) -> Documents:
        """Return the documents of spans of any streams, one span after the other.

        Args:
            domain: of each span.
            starts: first item of each span.
            stops: one past the last item of each span; greater than the first.
        """
        self._begin_lookup()
        is_repeated = self._repeated.holds(domain, starts, stops)
        if not is_repeated.any():
            return self._documents_in(self._parts_of_epochs(domain, starts, stops))
        # Look up the spans inside of single epochs, then the others, and put the parts of both back in order.
        order = np.argsort(is_repeated, kind="stable")
        parts = []
        for chosen, find in (
            (order[: -np.count_nonzero(is_repeated)], self._parts_of_epochs),
            (order[-np.count_nonzero(is_repeated) :], self._repeated_parts),
        ):
            if len(chosen):
                parts.append(find(domain[chosen], starts[chosen], stops[chosen]))
        return self._documents_in(_joined(parts).in_order(order, (stops - starts)[order]))

    def _parts_of_epochs(self, domain: Ints, starts: Ints, stops: Ints) -> _WindowParts:
        """Cut spans at the borders of epochs and windows."""
        domain, epoch, begin, end = self._cut_at_epochs(domain, starts, stops)
        if self._layout.order.repeats:
            # All epochs have the windows of the first one.
            epoch = np.zeros_like(epoch)
        if self._orders.can_hold(domain, epoch):
            return self._window_parts(domain, epoch, begin, end)
        # Spans of more than two epochs of a domain: one epoch after the other.
        key = domain * (int(epoch.max()) + 1) + epoch
        order = np.argsort(key, kind="stable")
        runs = [order[first:last] for first, last in equal_runs(key[order])]
        parts = [self._window_parts(domain[own], epoch[own], begin[own], end[own]) for own in runs]
        return _joined(parts).in_order(order, (end - begin)[order])

    def _repeated_parts(self, domain: Ints, starts: Ints, stops: Ints) -> _WindowParts:
        """Cut spans of small domains at the borders of groups of epochs."""
        window, begin, end = self._repeated.parts(self._windows, domain, starts, stops)
        self._windows.use(window, self._num_lookups)
        return _WindowParts(window, begin, end)

    def window_documents(self, domain: int, epoch: int, number: int, stop: int | None = None) -> Documents:
        """Return the documents of a window in base order, those of its first `stop` items or all; it has some."""
        self._begin_lookup()
        epoch = 0 if self._layout.order.repeats else epoch
        start, end = self._orders.order(domain, epoch).starts[number : number + 2].tolist()
        stop = end if stop is None else start + stop
        spans = (np.array([value]) for value in (domain, epoch, start, stop))
        return self._documents_in(self._window_parts(*spans))

    def samples_of(self, blocks: NDArray[np.int32]) -> tuple[NDArray[np.int32], Ints, Ints]:
        """Return block, domain and row of all samples of some blocks, sorted by block and domain.

        Args:
            blocks: different blocks.
        """
        return self._samples.samples_of(blocks)

    def base_items(self, domain: int, epoch: int, starts: Ints, stops: Ints) -> tuple[Ints, Ints]:
        """Return spans of an epoch as spans of its base order, counted from the start of the epoch."""
        items = int(self._epoch_items[domain])
        return self._in_base_order(domain, epoch, starts - epoch * items, stops - epoch * items)

    def _in_base_order(self, domain: int, epoch: int, begin: Ints, end: Ints) -> tuple[Ints, Ints]:
        served = self._served.get(domain)
        if served is None or served.epoch != epoch:
            return begin, end
        # The epoch in which samples were dropped begins with what had been served of it.
        pieces = served.pieces(int(self._epoch_items[domain]))
        borders = np.append(0, np.cumsum(pieces[:, 1] - pieces[:, 0]))
        begin, end, piece = cut_spans(begin, end, borders)
        shift = pieces[piece, 0] - borders[piece]
        return begin + shift, end + shift

    def _begin_lookup(self) -> None:
        """Drop windows if there are too many: those of past epochs, or else those that were not used for longest.

        Otherwise the table would grow with every epoch, and it takes longer to write to fresh memory than to compute
        what is written. Windows of the last lookup stay if they can be asked for again.
        """
        self._num_lookups += 1
        num_bytes = self._windows.num_bytes
        if num_bytes <= self._limit:
            return
        chosen = np.union1d(self._orders.windows_in_memory(), self._repeated.windows_in_memory())
        chosen_bytes = self._windows.bytes_of(chosen)
        if num_bytes > self._max_bytes and 2 * chosen_bytes > self._max_bytes:
            # Without past epochs, there are still too many.
            chosen = self._windows.recently_used(self._max_bytes // 2)
        elif 2 * chosen_bytes > num_bytes:
            # Past epochs have less than half of the bytes, too few for a copy of the others.
            self._limit = min(2 * num_bytes, self._max_bytes)
            return
        numbers = np.full(len(self._windows), NOT_IN_MEMORY, np.int64)
        numbers[chosen] = np.arange(len(chosen))
        self._windows = self._windows.select(chosen)
        self._orders.renumber(numbers)
        self._repeated.renumber(numbers)
        self._limit = min(max(4 * chosen_bytes, MIN_TABLE_BYTES), self._max_bytes)

    def _cut_at_epochs(self, domain: Ints, starts: Ints, stops: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Return domain, epoch, and first and last item in the base order of the epoch, of the parts of spans."""
        items = self._epoch_items[domain]
        epoch = starts // items
        epoch_start = epoch * items
        begin = starts - epoch_start
        end = stops - epoch_start
        if (end > items).any():
            # Repeat each span once for every epoch that it touches, and clip each copy to its own epoch.
            count = (end - 1) // items + 1
            epoch = concatenated_ranges(epoch, count)
            domain, starts, stops, items = (np.repeat(values, count) for values in (domain, starts, stops, items))
            begin = np.maximum(starts - epoch * items, 0)
            end = np.minimum(stops - epoch * items, items)
        if not len(self._served_domains) or not np.isin(domain, self._served_domains).any():
            return domain, epoch, begin, end

        parts = []
        # One key per domain and epoch: spans that follow each other in one epoch are converted together.
        for first, last in equal_runs(domain * (int(epoch.max()) + 1) + epoch):
            own = int(domain[first]), int(epoch[first])
            begins, ends = self._in_base_order(*own, begin[first:last], end[first:last])
            parts.append((np.full(len(begins), own[0]), np.full(len(begins), own[1]), begins, ends))
        domain, epoch, begin, end = (np.concatenate(values) for values in zip(*parts, strict=True))
        return domain, epoch, begin, end

    def _window_parts(self, domain: Ints, epoch: Ints, begin: Ints, end: Ints) -> _WindowParts:
        """Cut spans of epochs at the borders of windows, and build the windows that are not in memory."""
        spans = self._orders.find(domain, epoch, begin, end)
        window = self._orders.window[spans.cell]
        if (window < 0).any():
            missing = self._orders.missing(spans)
            first = len(self._windows)
            keys = self._orders.window_keys(missing)
            order = build_windows(self._layout, self._samples, keys, self._windows, self._shared)
            self._orders.window[missing[order]] = np.arange(first, len(self._windows))
            self._windows.use(self._orders.window[missing], self._num_lookups)
            window = self._orders.window[spans.cell]
        self._windows.use(window, self._num_lookups)
        return _WindowParts(window, spans.begin, spans.end)

    def _documents_in(self, parts: _WindowParts) -> Documents:
        """Return the documents that cover each part in turn."""
        table = self._windows
        covered, count = table.cover(parts.window, parts.begin, parts.end)
        if table.has_unit_items:
            # Every document is wanted as a whole. Nearly always a part is one document.
            number = covered if (count == 1).all() else concatenated_ranges(covered, count)
            return Documents(windows=table, number=number, first=np.zeros_like(number), last=np.ones_like(number))
        number = concatenated_ranges(covered, count)
        # All documents are wanted as a whole, but the first and the last one of each part.
        last_of_part = count.cumsum() - 1
        first_of_part = last_of_part + 1 - count
        # Items are counted through all windows. The borders of documents become positions in their document.
        window_start = table.item_starts(parts.window)
        item_start = table.item_stops(covered - 1)
        stop = table.item_stops(number)
        last = stop.copy()
        last[1:] -= stop[:-1]
        last[first_of_part] = stop.take(first_of_part) - item_start
        last[last_of_part] -= stop.take(last_of_part) - (window_start + parts.end)
        first = np.zeros_like(last)
        first[first_of_part] = window_start + parts.begin - item_start
        documents = Documents(windows=table, number=number, first=first, last=last, part_sizes=count)
        # Documents without items (empty text and no special token) lie inside a span, but nothing is wanted of them.
        return documents.select(np.flatnonzero(first < last)) if (first >= last).any() else documents


def _joined(parts: Sequence[_WindowParts]) -> _WindowParts:
    """Return all parts, in order."""
    columns = (np.concatenate([getattr(part, name) for part in parts]) for name in ("window", "begin", "end"))
    return _WindowParts(*columns)


def equal_runs(values: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of each run of equal neighbours."""
    borders = np.flatnonzero(values[1:] != values[:-1]) + 1
    return pairwise([0, *borders.tolist(), len(values)])
