"""Rows of decoded blocks that other domains need soon.

Domains with the same speed do not stay at the same block of a lane, because their shares differ from block to block.
When a block is decoded for one of them, only the rows that the others have not reached yet stay in memory: rows that
were served, or that no domain selects, take no space. If they exceed the memory, those that are needed last are dropped
and decoded again later, which is optimal if the future is known (Belady 1966). Price: all wanted rows of a block are
decoded together, and about 5 µs per block and domain.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents, DomainStreams
from mixtera_hpc.dataplane.reading.lookup.epoch_orders import WindowKey
from mixtera_hpc.dataplane.reading.residency.packed_rows import PackBlock, PackedRows, num_bytes
from mixtera_hpc.dataplane.reading.residency.stream_progress import StreamProgress
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.stored.stored_rows import blocks_with_rows
from mixtera_hpc.dataplane.reading.stored.token_gather import blocks_with_tokens
from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.batching.json_problems import JSON_ERRORS
from mixtera_hpc.formats.decoded_sizes import decodes_blocks

__all__ = ["ALL_FIT", "RowsAhead", "decoded_blocks", "rows_ahead"]

Ints = NDArray[np.int64]
IsResident = Callable[[WindowKey], bool]

HORIZON_GROWTH = 1.05
"""Factor by which the horizon grows with every window that is loaded while memory is left."""
MIN_HORIZON = 1.0
"""Reads. A horizon of 0 would never grow again."""
ALL_FIT = 0.25
"""Share of the memory. Blocks that fit into it together stay decoded, so no rows are kept ahead."""
FREED_AT_ONCE = 0.05
"""Share of the memory that is freed when it is full."""


class _Group(NamedTuple):
    """The rows that one domain has in one block."""

    rows: Ints
    """Positions in the block; ascending."""
    packed: PackedRows
    num_bytes: int
    needed: float
    """Progress at which the domain needs them."""


class _WantedRows(NamedTuple):
    """Rows of a block that a domain needs soon."""

    domain: int
    rows: Ints
    needed: float


class RowsAhead:
    """Decoded rows that domains need later. One per reading thread."""

    def __init__(
        self, streams: DomainStreams, progress: StreamProgress, is_decoded: NDArray[np.bool_], pack_block: PackBlock
    ) -> None:
        """Keep nothing yet.

        Args:
            streams: looks up the samples of blocks.
            progress: predicts when a domain needs a block.
            is_decoded: mask of the blocks that are decoded as a whole; shape (num_blocks,).
            pack_block: decodes blocks.
        """
        self._streams = streams
        self._progress = progress
        self._is_decoded = is_decoded
        self._pack_block = pack_block
        self._groups: dict[tuple[int, int], _Group] = {}
        """(block, domain) → rows."""
        self._wanted: dict[int, list[_WantedRows]] = {}
        """Block of the window that is loaded → rows of other domains to keep."""
        self._horizon = np.inf
        """Rows that are needed after more reads than this are not kept."""
        self.num_bytes = 0
        """Bytes of all rows."""

    def enter(self, key: WindowKey, blocks: NDArray[np.int32], is_resident: IsResident) -> None:
        """Determine which rows of other domains to keep from the blocks of the window that is loaded next.

        Args:
            key: the window.
            blocks: its blocks, each once.
            is_resident: returns True if the rows of a window are in memory already.
        """
        self._wanted.clear()
        decoded = blocks[self._is_decoded[blocks]].tolist()
        missing = np.array([block for block in decoded if (block, key.domain) not in self._groups], np.int32)
        if key.number < 0 or not len(missing):
            return
        block, domain, rows = self._streams.samples_of(missing)
        # Each run is the samples of one domain in one block.
        is_first = np.ones(len(block), np.bool_)
        is_first[1:] = (block[1:] != block[:-1]) | (domain[1:] != domain[:-1])
        starts = np.flatnonzero(is_first)
        stops = np.append(starts[1:], len(block))
        for other in np.unique(domain).tolist():
            if other == key.domain or np.isnan(self._progress.current[other]):
                continue
            runs = np.flatnonzero(domain[starts] == other)
            for run, needed in self._needed_soon(key, other, block[starts[runs]], is_resident):
                own = rows[starts[runs[run]] : stops[runs[run]]]
                self._wanted.setdefault(int(block[starts[runs[run]]]), []).append(_WantedRows(other, own, needed))

    def _needed_soon(
        self, key: WindowKey, other: int, blocks: NDArray[np.int32], is_resident: IsResident
    ) -> Iterator[tuple[int, float]]:
        """Yield which blocks of a window another domain needs soon, and the progress at which it needs them."""
        windows, needed = self._progress.needed(other, blocks, key.epoch)
        is_near = self._progress.reads_until(np.full(len(blocks), other), needed) <= self._horizon
        epoch = self._progress.epoch_of(other, key.epoch)
        for place in np.flatnonzero(is_near & np.isfinite(needed)).tolist():
            is_here = (int(blocks[place]), other) in self._groups
            if not is_here and not is_resident(WindowKey(other, epoch, int(windows[place]))):
                yield place, float(needed[place])

    def pack(self, domain: int, block: int, rows: Ints) -> PackedRows:
        """Return rows of a domain in a block of the entered window, given their ascending positions in the block.

        Raises:
            DataError: the block cannot be decoded.
        """
        group = self._groups.pop((block, domain), None)
        if group is not None:
            self.num_bytes -= group.num_bytes
            places = np.minimum(np.searchsorted(group.rows, rows), len(group.rows) - 1)
            if (group.rows[places] == rows).all():
                return group.packed.take(places)
        wanted = self._wanted.pop(block, [])
        if not wanted:
            return self._pack_block(block, rows)
        # Decode all rows together, in ascending order, and find each domain's own among them.
        everything = np.concatenate([rows, *(of_domain.rows for of_domain in wanted)])
        order = np.argsort(everything)
        try:
            packed = self._pack_block(block, everything[order])
        except (DataError, ValueError, *JSON_ERRORS):
            # A row of another domain may be damaged. It is reported when that domain needs it.
            return self._pack_block(block, rows)
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        first = len(rows)
        for of_domain in wanted:
            stop = first + len(of_domain.rows)
            self._keep(block, of_domain, packed.take(places[first:stop]))
            first = stop
        return packed.take(places[: len(rows)])

    def limit(self, max_bytes: int) -> None:
        """Drop the rows that are needed last, until the others fit."""
        if not self._groups or self.num_bytes <= max_bytes:
            self._horizon *= HORIZON_GROWTH
            return
        keys = list(self._groups)
        needed = np.array([group.needed for group in self._groups.values()])
        reads = self._progress.reads_until(np.array([domain for _, domain in keys]), needed)
        for place in np.argsort(-reads).tolist():
            if self.num_bytes <= max_bytes * (1 - FREED_AT_ONCE):
                break
            self.num_bytes -= self._groups.pop(keys[place]).num_bytes
            self._horizon = max(float(reads[place]), MIN_HORIZON)

    def advance(self, documents: Documents) -> None:
        """Record the documents of a read, and drop rows that their domains have passed without reading them."""
        self._progress.advance(documents)
        passed = {domain: self._progress.passed(domain) for domain in {domain for _, domain in self._groups}}
        for key in [key for key, group in self._groups.items() if group.needed < passed[key[1]]]:
            self.num_bytes -= self._groups.pop(key).num_bytes

    def _keep(self, block: int, wanted: _WantedRows, packed: PackedRows) -> None:
        size = sum(map(num_bytes, packed.values))
        self._groups[block, wanted.domain] = _Group(wanted.rows, packed, size, wanted.needed)
        self.num_bytes += size


def decoded_blocks(source: Source) -> NDArray[np.bool_]:
    """Return the mask of the blocks that are decoded as a whole to read one row; shape (num_blocks,)."""
    is_decoded = np.array([decodes_blocks(name) for name in source.index.shard_formats], np.bool_)
    # Documents of a token store are copied one by one. Most frames of a row store have rows of one domain only.
    return is_decoded[source.blocks.shard] & ~blocks_with_tokens(source) & ~blocks_with_rows(source)


def rows_ahead(source: Source, streams: DomainStreams | None, pack_block: PackBlock) -> RowsAhead | None:
    """Return memory for rows that are needed later; None if it would not help."""
    # With single sequences in random order, a block may be needed at any time.
    if streams is None or source.layout.order.shuffle == "sequence":
        return None
    # Blocks that fit into the memory together are decoded once for all domains.
    blocks = source.blocks
    is_decoded = decoded_blocks(source)
    num_bytes = (blocks.length * source.layout.expansion[blocks.shard])[is_decoded].sum()
    if num_bytes <= source.cache_bytes * ALL_FIT:
        return None
    progress = StreamProgress(source.layout, source.lanes)
    return RowsAhead(streams, progress, is_decoded, pack_block)
