"""From positions in a domain's stream to documents.

A stream is the endless ordered sequence of one domain's items (tokens or samples), epoch after epoch. An epoch consists
of windows, groups of blocks inside which rows are shuffled. Price: the first access to an epoch orders the domain's
blocks once, O(blocks). The first access to a window reads the sample columns of its blocks in one go. Windows are
cached within a byte budget.
"""

from collections import ChainMap, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.index_tables import SampleColumns
from mixtera_hpc.core.lanes import ServedPart, cut_spans
from mixtera_hpc.core.order import EpochOrder
from mixtera_hpc.dataplane.reading.stream_layout import StreamLayout
from mixtera_hpc.errors import DataError

__all__ = ["Documents", "DomainStreams", "StreamWindow", "equal_runs"]

Ints = NDArray[np.int64]

WINDOW_CACHE_BYTES = 512 << 20
"""Windows that one reading thread keeps, at least one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """Documents of one or several streams, in stream order; shape (n,) each. Any of them may be wanted only in part."""

    block: NDArray[np.int32]
    row: NDArray[np.int32]
    """Row inside the block."""
    first: Ints
    """First item of the document that is wanted."""
    last: Ints
    """One past the last item that is wanted."""
    size: Ints
    """All items of the document."""
    offset: Ints
    """First byte of the row inside its block; meaningless for formats whose rows have no byte range."""
    length: Ints
    """Bytes of the row."""
    window: Ints
    """Serial number of the window, a key of `windows`."""
    place: Ints
    """Position of the document in its window."""
    lengths: MutableMapping[int, Ints]
    """Block → bytes of each of its rows on disk. Holds the blocks of these documents, possibly others too."""
    windows: Mapping[int, "StreamWindow"]
    """The windows that these documents belong to, possibly others too."""

    @classmethod
    def join(cls, parts: Sequence["Documents"]) -> "Documents":
        """Return the documents of all `parts`, in order."""
        if len(parts) == 1:
            return parts[0]
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _PER_DOCUMENT}
        # Documents of one window share one mapping; of many windows each is chained once.
        distinct_lengths = {id(part.lengths): part.lengths for part in parts}
        windows = {number: window for part in parts for number, window in part.windows.items()}
        return cls(**arrays, lengths=ChainMap(*distinct_lengths.values()), windows=windows)

    def select(self, chosen: NDArray[np.intp] | slice) -> "Documents":
        """Return some of the documents."""
        arrays = {name: getattr(self, name)[chosen] for name in _PER_DOCUMENT}
        return Documents(**arrays, lengths=self.lengths, windows=self.windows)


_PER_DOCUMENT = ("block", "row", "first", "last", "size", "offset", "length", "window", "place")


@dataclass(frozen=True, slots=True)
class StreamWindow:
    """The documents of one window, in stream order; n of them."""

    serial: int
    """Number that no other window of these streams has, in the order in which windows are made."""
    key: tuple[int, int, int]
    """Domain, epoch, and number of the window in the epoch."""
    block: NDArray[np.int32]
    row: NDArray[np.int32]
    starts: Ints
    """First item of every document, counted in the window; the window's items at the end. Shape (n + 1,)."""
    offset: Ints
    length: Ints
    lengths: dict[int, Ints]
    """As in `Documents`."""

    @property
    def num_bytes(self) -> int:
        arrays: list[NDArray[Any]] = [self.block, self.row, self.starts, self.offset, self.length]
        return sum(array.nbytes for array in [*arrays, *self.lengths.values()])


class DomainStreams:
    """Looks up any position of any stream. Not thread-safe: one per reading thread."""

    def __init__(
        self,
        layout: StreamLayout,
        read_blocks: Callable[[NDArray[np.int32]], SampleColumns],
        domain_of: Callable[[SampleColumns], NDArray[np.int32]],
        is_not_dropped: Callable[[SampleColumns], NDArray[np.bool_]] | None = None,
        served: Mapping[int, ServedPart] | None = None,
    ) -> None:
        """Use `Source.streams`.

        Args:
            layout: sizes and order of the streams.
            read_blocks: reads the samples of some blocks, one block after the other.
            domain_of: returns the domain of each sample. With the layout's seed it decides the order of the stream.
            is_not_dropped: returns which samples the streams still contain. The order of the others does not change.
            served: domain → the part of an epoch that its stream begins with after a drop; see `ServedPart`.
        """
        self._layout = layout
        self._block_rows = layout.blocks.rows
        self._read_blocks = read_blocks
        self._domain_of = domain_of
        self._is_not_dropped = is_not_dropped
        self._served = served or {}
        self._epoch_items = layout.epoch_items()
        self._epochs: dict[int, tuple[int, EpochOrder]] = {}
        """Domain → its epoch that was used last."""
        self._windows: OrderedDict[tuple[int, int, int], StreamWindow] = OrderedDict()
        """(domain, epoch, window) → window, the one used last at the end."""
        self._window_bytes = 0
        self._serials = count()

    def epoch_of(self, domain: int, item: int) -> int:
        """Return the epoch that `item` of the stream lies in."""
        return item // int(self._epoch_items[domain])

    def documents(self, domain: int, start: int, stop: int) -> Documents:
        """Return the documents that cover the items [start, stop) of `domain`'s stream, in order.

        Raises:
            DataError: the samples of a block do not add up to what the index counted for it.
        """
        return self.documents_of(domain, np.array([start]), np.array([stop]))

    def documents_of(self, domain: int, starts: Ints, stops: Ints) -> Documents:
        """Return the documents of several spans, one span after the other; cheapest when the spans ascend."""
        return self.documents_of_domains([(domain, starts, stops)])

    def documents_of_domains(self, spans: Iterable[tuple[int, Ints, Ints]]) -> Documents:
        """Return the documents of (domain, starts, stops) of several domains, in this order; see `documents_of`."""
        return _documents_in([part for of_domain in spans for part in self._split_by_window(*of_domain)])

    def window_documents(self, domain: int, epoch: int, number: int, stop: int | None = None) -> Documents:
        """Return the documents of a window in base order, those of its first `stop` items or all; it has some."""
        window = self._window(domain, epoch, number, self._epoch_order(domain, epoch))
        return _documents_in([_WindowSpan(window, 0, int(window.starts[-1]) if stop is None else stop)])

    def _split_by_window(self, domain: int, starts: Ints, stops: Ints) -> list["_WindowSpan"]:
        """Cut spans at the borders of windows."""
        items = int(self._epoch_items[domain])
        first_epoch = int(starts.min()) // items
        last_epoch = (int(stops.max()) - 1) // items
        if first_epoch == last_epoch:
            return self._split_epoch(domain, first_epoch, starts, stops)
        starts, stops, cell = cut_spans(starts, stops, np.arange(first_epoch, last_epoch + 2) * items)
        parts = []
        for first, last in equal_runs(cell):
            parts += self._split_epoch(domain, first_epoch + int(cell[first]), starts[first:last], stops[first:last])
        return parts

    def _split_epoch(self, domain: int, epoch: int, starts: Ints, stops: Ints) -> list["_WindowSpan"]:
        """Cut spans that lie in one epoch at the borders of windows."""
        begins, ends = self.base_items(domain, epoch, starts, stops)
        order = self._epoch_order(domain, epoch)
        window = order.starts.searchsorted(begins, side="right") - 1
        # Nearly always each span lies in one window.
        if (ends > order.starts[window + 1]).any():
            begins, ends, window = cut_spans(begins, ends, order.starts)
        window_starts = order.starts[window]
        places = zip(window.tolist(), (begins - window_starts).tolist(), (ends - window_starts).tolist(), strict=True)
        return [_WindowSpan(self._window(domain, epoch, number, order), begin, end) for number, begin, end in places]

    def base_items(self, domain: int, epoch: int, starts: Ints, stops: Ints) -> tuple[Ints, Ints]:
        """Return spans of an epoch as spans of its base order, counted from the start of the epoch."""
        items = int(self._epoch_items[domain])
        starts = starts - epoch * items
        stops = stops - epoch * items
        served = self._served.get(domain)
        if served is None or served.epoch != epoch:
            return starts, stops
        # The epoch in which samples were dropped begins with what had been served of it.
        pieces = served.pieces(items)
        borders = np.append(0, np.cumsum(pieces[:, 1] - pieces[:, 0]))
        starts, stops, piece = cut_spans(starts, stops, borders)
        shift = pieces[piece, 0] - borders[piece]
        return starts + shift, stops + shift

    def _epoch_order(self, domain: int, epoch: int) -> EpochOrder:
        # A stream stays in an epoch for long: the order of one epoch per domain is enough.
        cached = self._epochs.get(domain)
        if cached is None or cached[0] != epoch:
            cached = epoch, self._layout.epoch_order(domain, epoch)
            self._epochs[domain] = cached
        return cached[1]

    def _window(self, domain: int, epoch: int, number: int, order: EpochOrder) -> StreamWindow:
        """Return a window from the cache, or make it and drop the windows that were not used for longest."""
        key = (domain, epoch, number)
        if key in self._windows:
            self._windows.move_to_end(key)
            return self._windows[key]

        window = self._make_window(domain, epoch, number, order)
        self._windows[key] = window
        self._window_bytes += window.num_bytes
        # The window in use stays, even if it alone exceeds the budget.
        while self._window_bytes > WINDOW_CACHE_BYTES and len(self._windows) > 1:
            _, oldest = self._windows.popitem(last=False)
            self._window_bytes -= oldest.num_bytes
        return window

    def _make_window(self, domain: int, epoch: int, number: int, order: EpochOrder) -> StreamWindow:
        layout = self._layout
        blocks = layout.table.block[layout.entries(domain)][order.blocks_of(number)]
        block_rows = self._block_rows[blocks]
        columns = self._read_blocks(blocks)
        # A block may hold samples of many domains.
        samples = np.flatnonzero(self._domain_of(columns) == domain)

        # The permutation covers dropped samples too, so that a drop does not reorder the samples that remain.
        shuffled = samples[layout.order.rows(domain, epoch, number, len(samples))]
        if self._is_not_dropped is not None:
            shuffled = shuffled[self._is_not_dropped(columns)[shuffled]]

        position, row, offset = _locate_samples(block_rows, columns.length, shuffled)
        if layout.in_tokens:
            items = columns.tokens[shuffled] + layout.added_tokens(blocks[position])
        else:
            items = np.ones(len(shuffled), np.int64)
        self._check_items(domain, len(blocks), int(items.sum()), int(order.starts[number + 1] - order.starts[number]))

        return StreamWindow(
            serial=next(self._serials),
            key=(domain, epoch, number),
            block=blocks[position],
            row=row,
            starts=np.concatenate([[0], np.cumsum(items)]),
            offset=offset,
            length=columns.length[shuffled],
            lengths=_lengths_by_block(blocks, block_rows, columns.length),
        )

    def _check_items(self, domain: int, num_blocks: int, actual: int, expected: int) -> None:
        if actual != expected:
            raise DataError(
                f"The samples of {num_blocks} blocks of domain {domain} hold {actual} items, the index counted "
                f"{expected}: the index file is damaged.\n  Build it again with mixtera-hpc index build."
            )


def _locate_samples(block_rows: NDArray[np.int32], length: Ints, samples: Ints) -> tuple[Ints, NDArray[np.int32], Ints]:
    """Return, for samples of consecutive blocks: position of their block, row in it, and first byte in it.

    Args:
        block_rows: rows of every block.
        length: bytes of every sample of all blocks.
        samples: positions of the samples, counted over all blocks.
    """
    ends = np.cumsum(block_rows, dtype=np.int64)
    position = np.searchsorted(ends, samples, side="right")
    first_of_block = (ends - block_rows)[position]
    byte_starts = np.cumsum(length) - length
    row = (samples - first_of_block).astype(np.int32)
    return position, row, byte_starts[samples] - byte_starts[first_of_block]


def _lengths_by_block(blocks: NDArray[np.int32], block_rows: NDArray[np.int32], length: Ints) -> dict[int, Ints]:
    # `lengths` are per row of each block, those of other domains included: readers need them to find a row.
    return dict(zip(blocks.tolist(), np.split(length, np.cumsum(block_rows)[:-1]), strict=True))


class _WindowSpan(NamedTuple):
    """The items [begin, end) of a window, counted in the window."""

    window: StreamWindow
    begin: int
    end: int


def _documents_in(spans: list[_WindowSpan]) -> Documents:
    """Return the documents that cover each span in turn."""
    # Documents of a span are neighbours in its window. The arrays are sliced span by span, in Python: with many
    # domains a span has few documents, and any numpy operation per domain would cost more.
    windows = {span.window.serial: span.window for span in spans}
    slices = []
    for window, begin, end in spans:
        first = int(window.starts.searchsorted(begin, side="right")) - 1
        slices.append(slice(first, int(window.starts.searchsorted(end, side="left"))))
    pairs = [(span.window, own) for span, own in zip(spans, slices, strict=True)]
    counts = np.array([own.stop - own.start for own in slices])

    starts = np.concatenate([window.starts[own] for window, own in pairs])
    stops = np.concatenate([window.starts[own.start + 1 : own.stop + 1] for window, own in pairs])
    first_places = np.array([own.start for own in slices])
    begins = np.array([span.begin for span in spans]).repeat(counts)
    ends = np.array([span.end for span in spans]).repeat(counts)
    distinct_lengths = {id(window.lengths): window.lengths for window in windows.values()}
    documents = Documents(
        block=np.concatenate([window.block[own] for window, own in pairs]),
        row=np.concatenate([window.row[own] for window, own in pairs]),
        first=np.maximum(begins - starts, 0),
        last=np.minimum(stops, ends) - starts,
        size=stops - starts,
        offset=np.concatenate([window.offset[own] for window, own in pairs]),
        length=np.concatenate([window.length[own] for window, own in pairs]),
        window=np.array([span.window.serial for span in spans]).repeat(counts),
        place=np.arange(len(starts)) + (first_places - (counts.cumsum() - counts)).repeat(counts),
        lengths=ChainMap(*distinct_lengths.values()),
        windows=windows,
    )
    # Documents without items (empty text and no special token) lie inside a span, but nothing is wanted of them.
    return documents.select(np.flatnonzero(starts < stops)) if (starts == stops).any() else documents


def equal_runs(values: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of each run of equal neighbours."""
    borders = np.flatnonzero(values[1:] != values[:-1]) + 1
    return pairwise([0, *borders.tolist(), len(values)])
