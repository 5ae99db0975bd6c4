"""From positions in a domain's stream to documents.

A stream is the endless ordered sequence of one domain's items (tokens or samples), epoch after epoch. An epoch consists
of windows, groups of blocks inside which rows are shuffled. Price: the first access to an epoch orders the domain's
blocks once, O(blocks). The first access to a window reads the sample columns of its blocks in one go. Windows are
cached within a byte budget.
"""

from collections import ChainMap, OrderedDict
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.schema import Config, DataPlaneConfig
from mixtera_hpc.core.index_tables import DomainTable, SampleColumns
from mixtera_hpc.core.order import EpochOrder, ShuffleOrder
from mixtera_hpc.errors import DataError
from mixtera_hpc.tokens.tokenizer import Tokenizer

__all__ = ["Documents", "DomainStreams", "StreamLayout"]

Ints = NDArray[np.int64]

WINDOW_CACHE_BYTES = 512 << 20
"""Windows that one reading thread keeps, at least one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLayout:
    """How large the streams are and in which order their samples come; the same on every rank."""

    table: DomainTable
    order: ShuffleOrder
    num_specials: int
    """Special tokens added to every document, but not to conversations."""
    chat_blocks: NDArray[np.bool_] | None
    """Which blocks of the index hold conversations; None if no block does."""
    in_tokens: bool
    """Whether items are tokens; otherwise they are samples."""

    @classmethod
    def of_config(
        cls, config: Config, table: DomainTable, tokenizer: Tokenizer | None, chat_blocks: NDArray[np.bool_] | None
    ) -> "StreamLayout":
        """Return the layout of the streams of the domains in `table`."""
        plane = config.dataplane
        in_tokens = config.mixture.unit == "tokens"
        return cls(
            table=table,
            order=ShuffleOrder(seed=plane.seed, shuffle=plane.shuffle, window=plane.shuffle_window),
            num_specials=_num_specials(plane, tokenizer) if in_tokens else 0,
            chat_blocks=chat_blocks if in_tokens else None,
            in_tokens=in_tokens,
        )

    def entries(self, domain: int) -> slice:
        """Return where the blocks of `domain` are in the table."""
        return slice(int(self.table.indptr[domain]), int(self.table.indptr[domain + 1]))

    def added_tokens(self, blocks: NDArray[np.int32]) -> Ints:
        """Return the special tokens that are added to each document of these blocks; shape (len(blocks),)."""
        if self.chat_blocks is None:
            return np.full(len(blocks), self.num_specials)
        # A chat template writes all special tokens itself.
        return np.where(self.chat_blocks[blocks], 0, self.num_specials)

    def sizes(self, domain: int) -> Ints:
        """Return the items of `domain` in each of its blocks; shape (blocks of the domain,)."""
        entries = self.entries(domain)
        rows = self.table.rows[entries].astype(np.int64)
        if not self.in_tokens:
            return rows
        return self.table.tokens[entries] + self.added_tokens(self.table.block[entries]) * rows

    def epoch_items(self) -> Ints:
        """Return the items of one epoch of every domain; shape (K,)."""
        if self.chat_blocks is not None:
            return np.array([self.sizes(domain).sum() for domain in range(self.table.num_domains)], np.int64)
        rows, tokens = self.table.totals()
        # Every document is followed by its special tokens.
        return tokens + self.num_specials * rows if self.in_tokens else rows


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
    lengths: MutableMapping[int, Ints]
    """Block → bytes of each of its rows on disk. Holds the blocks of these documents, possibly others too."""

    @classmethod
    def join(cls, parts: Sequence["Documents"]) -> "Documents":
        """Return the documents of all `parts`, in order."""
        if len(parts) == 1:
            return parts[0]
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _PER_DOCUMENT}
        # Documents of one window share one mapping; of many windows each is chained once.
        distinct_lengths = {id(part.lengths): part.lengths for part in parts}
        return cls(**arrays, lengths=ChainMap(*distinct_lengths.values()))

    def select(self, chosen: NDArray[np.intp] | slice) -> "Documents":
        """Return some of the documents."""
        return Documents(**{name: getattr(self, name)[chosen] for name in _PER_DOCUMENT}, lengths=self.lengths)


_PER_DOCUMENT = ("block", "row", "first", "last", "size", "offset", "length")


@dataclass(frozen=True, slots=True)
class _StreamWindow:
    """The documents of one window, in stream order; n of them."""

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
        block_rows: NDArray[np.int32],
        read_blocks: Callable[[NDArray[np.int32]], SampleColumns],
        domain_of: Callable[[SampleColumns], NDArray[np.int32]],
        is_not_dropped: Callable[[SampleColumns], NDArray[np.bool_]] | None = None,
    ) -> None:
        """Use `Source.streams`.

        Args:
            block_rows: rows of every block of the index.
            read_blocks: reads the samples of some blocks, one block after the other.
            domain_of: returns the domain of each sample. With the layout's seed it decides the order of the stream.
            is_not_dropped: returns which samples the streams still contain. The order of the others does not change.
        """
        self._layout = layout
        self._block_rows = block_rows
        self._read_blocks = read_blocks
        self._domain_of = domain_of
        self._is_not_dropped = is_not_dropped
        self._epoch_items = layout.epoch_items()
        self._epochs: dict[int, tuple[int, EpochOrder]] = {}
        """Domain → its epoch that was used last."""
        self._windows: OrderedDict[tuple[int, int, int], _StreamWindow] = OrderedDict()
        """(domain, epoch, window) → window, the one used last at the end."""
        self._window_bytes = 0

    def epoch_of(self, domain: int, item: int) -> int:
        """Return the epoch that `item` of the stream lies in."""
        return item // int(self._epoch_items[domain])

    def documents(self, domain: int, start: int, stop: int) -> Documents:
        """Return the documents that cover the items [start, stop) of `domain`'s stream, in order.

        Raises:
            DataError: the samples of a block do not add up to what the index counted for it.
        """
        return self.documents_of(domain, [(start, stop)])

    def documents_of(self, domain: int, spans: Iterable[tuple[int, int]]) -> Documents:
        """Return the documents of several spans, one span after the other; cheapest when the spans ascend."""
        return Documents.join([_documents_in(*parts) for parts in self._split_by_window(domain, spans)])

    def _split_by_window(
        self, domain: int, spans: Iterable[tuple[int, int]]
    ) -> Iterator[tuple[_StreamWindow, list[int], list[int]]]:
        """Cut spans at the borders of windows; yield windows with where their parts begin and end, in their items."""
        epoch_items = int(self._epoch_items[domain])
        window: _StreamWindow | None = None
        window_start = window_stop = 0
        begins: list[int] = []
        ends: list[int] = []
        for start, stop in spans:
            while start < stop:
                if window is None or not window_start <= start < window_stop:
                    # Everything that is wanted of the previous window is known now.
                    if window is not None:
                        yield window, begins, ends
                    epoch, item = divmod(start, epoch_items)
                    order = self._epoch_order(domain, epoch)
                    number = order.window_at(item)
                    window = self._window(domain, epoch, number, order)
                    window_start = epoch * epoch_items + int(order.starts[number])
                    window_stop = epoch * epoch_items + int(order.starts[number + 1])
                    begins = []
                    ends = []
                end = min(stop, window_stop)
                begins.append(start - window_start)
                ends.append(end - window_start)
                start = end
        if window is not None:
            yield window, begins, ends

    def _epoch_order(self, domain: int, epoch: int) -> EpochOrder:
        # A stream stays in an epoch for long: the order of one epoch per domain is enough.
        cached = self._epochs.get(domain)
        if cached is None or cached[0] != epoch:
            cached = epoch, self._layout.order.epoch(domain, epoch, self._layout.sizes(domain))
            self._epochs[domain] = cached
        return cached[1]

    def _window(self, domain: int, epoch: int, number: int, order: EpochOrder) -> _StreamWindow:
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

    def _make_window(self, domain: int, epoch: int, number: int, order: EpochOrder) -> _StreamWindow:
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

        return _StreamWindow(
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


def _num_specials(plane: DataPlaneConfig, tokenizer: Tokenizer | None) -> int:
    """Return how many special tokens every document gets."""
    if tokenizer is None:
        return int(plane.add_eos)
    return len(tokenizer.added.before) + len(tokenizer.added.after)


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


def _documents_in(window: _StreamWindow, begins: list[int], ends: list[int]) -> Documents:
    """Return the documents that cover the items [begin, end) of a window, for every such span in turn."""
    begin = np.array(begins)
    end = np.array(ends)

    # First document of every span, and how many documents it touches.
    first_document = np.searchsorted(window.starts, begin, side="right") - 1
    count = np.searchsorted(window.starts, end, side="left") - first_document

    # One element per (span, document): the documents of a span are consecutive.
    span = np.repeat(np.arange(len(begin)), count)
    elements_before_span = np.cumsum(count) - count
    document = np.arange(len(span)) + (first_document - elements_before_span)[span]
    starts = window.starts[document]
    stops = window.starts[document + 1]

    # Documents without items (empty text and no special token) lie inside a span, but nothing is wanted of them.
    if (starts == stops).any():
        filled = np.flatnonzero(starts < stops)
        span = span[filled]
        document = document[filled]
        starts = starts[filled]
        stops = stops[filled]

    return Documents(
        block=window.block[document],
        row=window.row[document],
        first=np.maximum(begin[span] - starts, 0),
        last=np.minimum(stops, end[span]) - starts,
        size=stops - starts,
        offset=window.offset[document],
        length=window.length[document],
        lengths=window.lengths,
    )
