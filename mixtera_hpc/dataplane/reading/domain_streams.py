"""From positions in a domain's stream to documents.

Price: the first touch of an epoch orders the domain's blocks once, O(blocks); the first touch of a window reads the sample
columns of its blocks, all in one go. Both are kept while they are used; windows within a byte budget.
"""

from collections import ChainMap, OrderedDict
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.domains import DomainTable
from mixtera_hpc.core.index_tables import SampleColumns
from mixtera_hpc.core.order import EpochOrder, ShuffleOrder
from mixtera_hpc.errors import DataError

__all__ = ["Documents", "DomainStreams", "StreamLayout"]

Ints = NDArray[np.int64]

WINDOW_BUDGET_BYTES = 512 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLayout:
    """What streams are made of; the same on every rank."""

    table: DomainTable
    order: ShuffleOrder
    num_specials: int
    """Special tokens added to every document."""
    in_tokens: bool
    """Items are tokens; else samples."""

    def sizes(self, domain: int) -> Ints:
        """Items of `domain` in each of its blocks; shape (num_blocks of the domain,)."""
        entries = self.entries(domain)
        rows = self.table.rows[entries].astype(np.int64)
        return self.table.tokens[entries] + self.num_specials * rows if self.in_tokens else rows

    def entries(self, domain: int) -> slice:
        """Where `domain`'s blocks lie in the table."""
        return slice(int(self.table.indptr[domain]), int(self.table.indptr[domain + 1]))

    def epoch_items(self) -> Ints:
        """Items of one epoch of every domain; shape (K,)."""
        rows, tokens = self.table.totals()
        return tokens + self.num_specials * rows if self.in_tokens else rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """Consecutive documents of one domain's stream; n of them, the first and the last possibly in part."""

    block: NDArray[np.int32]
    """Shape (n,)."""
    row: NDArray[np.int32]
    """Row inside the block."""
    first: Ints
    """First item of the document that is wanted."""
    last: Ints
    """One past the last."""
    size: Ints
    """All items the document has."""
    offset: Ints
    """First byte of the row inside its block; nothing is meant where rows have no byte range."""
    length: Ints
    """Bytes of the row."""
    lengths: MutableMapping[int, Ints]
    """Block → bytes of each of its rows on disk; of these blocks, and perhaps of others."""

    @classmethod
    def join(cls, parts: Sequence["Documents"]) -> "Documents":
        """All documents of `parts`, in order."""
        if len(parts) == 1:
            return parts[0]
        arrays = {name: np.concatenate([getattr(p, name) for p in parts]) for name in _PER_DOCUMENT}
        return cls(**arrays, lengths=ChainMap(*({id(p.lengths): p.lengths for p in parts}.values())))

    def only(self, chosen: NDArray[np.intp] | slice) -> "Documents":
        """Some of the documents."""
        return Documents(**{name: getattr(self, name)[chosen] for name in _PER_DOCUMENT}, lengths=self.lengths)


_PER_DOCUMENT = ("block", "row", "first", "last", "size", "offset", "length")


@dataclass(frozen=True, slots=True)
class _Window:
    block: NDArray[np.int32]
    row: NDArray[np.int32]
    starts: Ints
    """First item of every document, the window's items at the end; shape (n + 1,)."""
    offset: Ints
    length: Ints
    lengths: dict[int, Ints]

    @property
    def num_bytes(self) -> int:
        arrays: list[NDArray[Any]] = [self.block, self.row, self.starts, self.offset, self.length]
        return sum(a.nbytes for a in [*arrays, *self.lengths.values()])


class DomainStreams:
    """Looks up any position of any stream. Not thread-safe: one per reading thread."""

    def __init__(
        self,
        layout: StreamLayout,
        block_rows: NDArray[np.int32],
        read_blocks: Callable[[NDArray[np.int32]], SampleColumns],
        domain_of: Callable[[SampleColumns], NDArray[np.int32]],
        kept: Callable[[SampleColumns], NDArray[np.bool_]] | None = None,
    ) -> None:
        """
        Args:
            block_rows: rows of every block of the index.
            read_blocks: reads the samples of some blocks, one block after the other.
            domain_of: the domain of each of these samples; decides, with the layout's seed, the order of the stream.
            kept: which samples are left in it; the others are passed over and leave the order of the rest as it is.
        """
        self._layout = layout
        self._block_rows = block_rows
        self._read_blocks = read_blocks
        self._domain_of = domain_of
        self._kept = kept
        self._epoch_items = layout.epoch_items()
        self._epochs: OrderedDict[int, tuple[int, EpochOrder]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int, int], _Window] = OrderedDict()
        self._window_bytes = 0

    def epoch_of(self, domain: int, item: int) -> int:
        """The epoch that `item` of the stream lies in."""
        return item // int(self._epoch_items[domain])

    def documents(self, domain: int, start: int, stop: int) -> Documents:
        """The documents that cover the items [start, stop) of `domain`'s stream, in order.

        Raises:
            DataError: the samples of a block do not add up to what the index counted for it.
        """
        return self.documents_of(domain, [(start, stop)])

    def documents_of(self, domain: int, spans: Iterable[tuple[int, int]]) -> Documents:
        """The same for several spans, one after the other; cheapest when they ascend."""
        return Documents.join([_slice(*place) for place in self._by_window(domain, spans)])

    def _by_window(
        self, domain: int, spans: Iterable[tuple[int, int]]
    ) -> Iterator[tuple[_Window, list[int], list[int]]]:
        """Windows, and what of the spans lies in each: where it begins and ends, in items of the window."""
        items, low, high = int(self._epoch_items[domain]), 0, 0
        window: _Window | None = None
        begins: list[int] = []
        ends: list[int] = []
        for start, stop in spans:
            while start < stop:
                if window is None or not low <= start < high:
                    if window is not None:
                        yield window, begins, ends
                    epoch, item = divmod(start, items)
                    order = self._epoch(domain, epoch)
                    number = order.window_at(item)
                    window, begins, ends = self._window(domain, epoch, number, order), [], []
                    low, high = (epoch * items + int(order.starts[n]) for n in (number, number + 1))
                end = min(stop, high)
                begins.append(start - low)
                ends.append(end - low)
                start = end
        if window is not None:
            yield window, begins, ends

    def _epoch(self, domain: int, epoch: int) -> EpochOrder:
        known = self._epochs.get(domain)
        if known is None or known[0] != epoch:
            known = epoch, self._layout.order.epoch(domain, epoch, self._layout.sizes(domain))
            self._epochs[domain] = known
        return known[1]

    def _window(self, domain: int, epoch: int, number: int, order: EpochOrder) -> _Window:
        key = (domain, epoch, number)
        if key in self._windows:
            self._windows.move_to_end(key)
            return self._windows[key]
        window = self._make_window(domain, epoch, number, order)
        self._windows[key] = window
        self._window_bytes += window.num_bytes
        while self._window_bytes > WINDOW_BUDGET_BYTES and len(self._windows) > 1:
            self._window_bytes -= self._windows.popitem(last=False)[1].num_bytes
        return window

    def _make_window(self, domain: int, epoch: int, number: int, order: EpochOrder) -> _Window:
        layout = self._layout
        blocks = layout.table.block[layout.entries(domain)][order.blocks_of(number)]
        columns = self._read_blocks(blocks)
        chosen = np.flatnonzero(self._domain_of(columns) == domain)
        items = columns.tokens[chosen] + layout.num_specials if layout.in_tokens else np.ones(len(chosen), np.int64)
        shuffled = layout.order.rows(domain, epoch, number, len(chosen))
        if self._kept is not None:
            shuffled = shuffled[self._kept(columns)[chosen][shuffled]]
        items = items[shuffled]
        expected = int(order.starts[number + 1] - order.starts[number])
        if int(items.sum()) != expected:
            raise DataError(
                f"The samples of {len(blocks)} blocks of domain {domain} hold {int(items.sum())} items, the index counted "
                f"{expected}: the index file is damaged.\n  Build it again with mixtera-hpc index build."
            )
        chosen = chosen[shuffled]
        at, row, offset = _places(self._block_rows[blocks], columns.length, chosen)
        return _Window(
            block=blocks[at],
            row=row,
            starts=np.concatenate([[0], np.cumsum(items)]),
            offset=offset,
            length=columns.length[chosen],
            lengths=_by_block(blocks, self._block_rows[blocks], columns.length),
        )


def _places(rows: NDArray[np.int32], length: Ints, chosen: Ints) -> tuple[Ints, NDArray[np.int32], Ints]:
    """Where chosen samples of consecutive blocks lie: which block, the row inside it, the byte inside it.

    Args:
        rows: of every block.
        length: bytes of every sample.
    """
    ends = np.cumsum(rows, dtype=np.int64)
    at = np.searchsorted(ends, chosen, side="right")
    first = (ends - rows)[at]
    starts = np.cumsum(length) - length
    return at, (chosen - first).astype(np.int32), starts[chosen] - starts[first]


def _by_block(blocks: NDArray[np.int32], rows: NDArray[np.int32], length: Ints) -> dict[int, Ints]:
    return dict(zip(blocks.tolist(), np.split(length, np.cumsum(rows)[:-1]), strict=True))


def _slice(window: _Window, begins: list[int], ends: list[int]) -> Documents:
    """The documents of a window that cover its items [begin, end), for every such span in turn."""
    begin, end = np.array(begins), np.array(ends)
    low = np.searchsorted(window.starts, begin, side="right") - 1
    count = np.searchsorted(window.starts, end, side="left") - low
    span = np.repeat(np.arange(len(begin)), count)
    chosen = np.arange(len(span)) + (low - np.cumsum(count) + count)[span]
    starts, stops = window.starts[chosen], window.starts[chosen + 1]
    if (starts == stops).any():
        filled = np.flatnonzero(starts < stops)
        span, chosen, starts, stops = span[filled], chosen[filled], starts[filled], stops[filled]
    return Documents(
        block=window.block[chosen],
        row=window.row[chosen],
        first=np.maximum(begin[span] - starts, 0),
        last=np.minimum(stops, end[span]) - starts,
        size=stops - starts,
        offset=window.offset[chosen],
        length=window.length[chosen],
        lengths=window.lengths,
    )
