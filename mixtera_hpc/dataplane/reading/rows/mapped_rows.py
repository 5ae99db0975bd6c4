"""Rows of plain files as views of memory-mapped files: no system call and no copy per row.

A page fault would hold the interpreter's lock while a file system reads, and an I/O error in it would kill the process.
So the pages of a whole block are loaded by a call before a row of it is used. This is only done for blocks of whose
rows a good part is selected, and only as long as it pays: with each row that is served from loaded blocks, the reader
may load `1 / MIN_DENSITY` times its bytes. All other rows are left to positioned reads. If the loaded blocks exceed
their budget, the pages of those that were used longest ago are released. The kernel may map up to 2 MiB around a block
as well, and they may stay mapped; `MappedFiles.limit_memory` bounds the sum.

Price: about 0.3 µs per row with the decoder's copy, and 35 µs per block of 256 kB that is in the page cache. What is
read from the file system is at most the budget and `1 / MIN_DENSITY` times the bytes that are served.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.residency.open_shards import ShardPaths
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.stored.mapped_files import MAX_MAPPED_FILES, MappedFiles, map_array
from mixtera_hpc.dataplane.watchdog.progress import READ, ReadPlace
from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import RowDecoder
from mixtera_hpc.formats.file_memory import load_pages, release_pages

__all__ = ["MIN_DENSITY", "MappedRows"]

logger = logging.getLogger("mixtera_hpc")

MIN_DENSITY = 0.25
"""Least part of the rows of a block that this rank serves if the block is loaded as a whole."""
MAX_ROW_BYTES = 16 << 10
"""Average size of the rows of a block from which on a positioned read per row is no noticeable cost beside decoding.
Blocks of large rows would take long to load, for the first row of each."""
SMALL_BLOCK_BYTES = 128 << 10
"""Blocks up to this size are loaded for a single row where not all shards may be open: to open a file takes as long."""
MAX_SHARDS = MAX_MAPPED_FILES // 2
"""Shards that are mapped at the same time; a process has a limit of mappings, see `MAX_MAPPED_FILES`."""
FREED_AT_ONCE = 0.25
"""Part of the budget that is freed when it is exceeded."""

Ints = NDArray[np.int64]
ReadBytes = Callable[[int, int, int], bytes]
"""A function that reads bytes of a shard, given its number, the first byte and the number of bytes."""


class MappedPlaces(NamedTuple):
    """Rows in mapped memory; shape (n,) each."""

    memory: memoryview
    """The memory of all mapped files."""
    chosen: NDArray[np.intp]
    """Numbers of the rows among those requested; ascending."""
    first: Ints
    """First byte of each row in `memory`."""
    stop: Ints
    """One past its last byte; greater than the first."""

    def texts(self, decoder: RowDecoder, at_once: int) -> list[str]:
        """Return the texts of the rows, of which `at_once` are decoded together."""
        texts: list[str] = []
        first = self.first.tolist()
        stop = self.stop.tolist()
        for begin in range(0, len(first), at_once):
            group = slice(begin, begin + at_once)
            texts += decoder.documents([self.memory[a:b] for a, b in zip(first[group], stop[group], strict=True)])
        return texts


NOT_MAPPED = MappedPlaces(memoryview(b""), *(np.zeros(0, np.int64) for _ in range(3)))


class MappedRows:
    """Mapped shards, and the blocks whose pages are loaded. One per reading thread."""

    def __init__(self, source: Source, read_bytes: ReadBytes, *, window_share: float, max_open: int) -> None:
        """Map nothing yet.

        Args:
            source: the data.
            read_bytes: reads bytes of a shard into the page cache, where the kernel cannot load pages.
            window_share: part of the rows of each window that this rank serves; the others belong to other ranks.
            max_open: shards that may be open.
        """
        index = source.index
        self._blocks = source.blocks
        self._is_dense = _dense_blocks(source, window_share)
        self._is_small = np.zeros(0, np.bool_)
        """Blocks that are loaded in any case; empty if all shards may be open."""
        if len(index.shard_paths) > max_open:
            self._is_small = source.blocks.length <= SMALL_BLOCK_BYTES
        self._max_bytes = source.cache_bytes // 2
        self._credit = self._max_bytes
        """Bytes of blocks that may be loaded, at most the budget: grows with the bytes that are served from blocks."""
        self._read_bytes = read_bytes
        paths = ShardPaths(index.data_root, index.shard_paths)
        self._files = MappedFiles(len(index.shard_paths), partial(_map_shard, paths))
        self._num_mapped = 0
        self._is_usable = True
        """False where files cannot be mapped."""
        num_blocks = len(source.blocks.rows)
        self._is_loaded = np.zeros(num_blocks, np.bool_)
        self._last_use = np.zeros(num_blocks, np.int64)
        """Number of the call in which each block was used last."""
        self._num_calls = 0
        self.num_bytes = 0
        """Bytes of all blocks whose pages are loaded."""
        self.num_loads = 0
        """Number of blocks loaded so far."""

    def find(self, documents: Documents, shards: NDArray[np.int32], place: ReadPlace) -> MappedPlaces:
        """Return where rows lie in mapped memory, those whose pages are loaded.

        Args:
            documents: sorted by block and row.
            shards: the shard of each document.
            place: records which block is loaded.
        """
        block = documents.block
        if not self._is_usable:
            return NOT_MAPPED
        if self._files.limit_memory():
            self._forget_blocks()
        self._num_calls += 1
        self._last_use[block] = self._num_calls
        is_missing = ~self._is_loaded[block]
        if is_missing.any():
            self._load_for(block[is_missing], place)
        offset = documents.offset
        stop = offset + documents.length
        # An index that is wrong may name bytes outside of the block.
        is_inside = (offset >= 0) & (stop > offset) & (stop <= self._blocks.length[block])
        chosen = np.flatnonzero(self._is_loaded[block] & is_inside)
        if not len(chosen):
            return NOT_MAPPED
        first = offset[chosen]
        stop = stop[chosen]
        # Served bytes pay for the loads of later calls.
        self._credit = min(self._credit + int((stop - first).sum() / MIN_DENSITY), self._max_bytes)
        memory = self._files.memory(0)
        shift = memory.first[shards[chosen]] + self._blocks.offset[block[chosen]]
        return MappedPlaces(memory.tokens.data, chosen, shift + first, shift + stop)

    def close(self) -> None:
        """Forget all shards. They stay mapped as long as there are views of them."""
        self._files.close()
        self._num_mapped = 0
        self._forget_blocks()

    def _forget_blocks(self) -> None:
        """Record that no block is loaded."""
        self._is_loaded[:] = False
        self.num_bytes = 0

    def _load_for(self, blocks: NDArray[np.int32], place: ReadPlace) -> None:
        """Load those of some blocks, ascending, for which this pays."""
        is_wanted = self._is_dense[blocks]
        if len(self._is_small):
            is_wanted |= self._is_small[blocks]
        wanted = blocks[is_wanted]
        # Each block once: blocks ascend.
        numbers = wanted[np.flatnonzero(np.diff(wanted, prepend=-1))]
        cost = self._blocks.length[numbers]
        if len(self._is_small):
            cost = np.where(self._is_small[numbers], 0, cost)
        # As many of the first blocks as the credit pays for.
        numbers = numbers[np.cumsum(cost) <= self._credit]
        if len(numbers):
            self._credit -= int(cost[: len(numbers)].sum())
            self._load(numbers, place)

    def _load(self, numbers: NDArray[np.int32], place: ReadPlace) -> None:
        """Load as many of some blocks as fit into the budget."""
        size = self._blocks.length[numbers]
        room = self._make_room(int(size.sum()))
        numbers = numbers[: np.searchsorted(np.cumsum(size), room, side="right")]
        shards = self._blocks.shard[numbers]
        distinct = self._files.distinct(shards)
        if len(distinct) > MAX_SHARDS:
            numbers = numbers[shards < distinct[MAX_SHARDS]]
            shards = self._blocks.shard[numbers]
        try:
            self._map(distinct[:MAX_SHARDS], numbers, place)
        except DataError as error:
            self._is_usable = False
            logger.warning("Rows are not read from mapped files: %s", error)
            return
        is_inside, addresses = self._files.request(shards, self._blocks.offset[numbers], self._blocks.length[numbers])
        for number, address in zip(numbers[is_inside].tolist(), addresses, strict=True):
            self._load_one(number, address, place)

    def _load_one(self, number: int, address: int, place: ReadPlace) -> None:
        """Load a block; on an error, leave its rows to positioned reads, which name the damaged shard."""
        self._enter(number, place)
        columns = (self._blocks.shard, self._blocks.offset, self._blocks.length)
        shard, offset, size = (int(column[number]) for column in columns)
        try:
            if not load_pages(address, size):
                # Faults then find the pages in the page cache.
                self._read_bytes(shard, offset, size)
        except (OSError, EOFError):
            return
        self._is_loaded[number] = True
        self.num_bytes += size
        self.num_loads += 1

    def _map(self, shards: NDArray[np.intp], numbers: NDArray[np.int32], place: ReadPlace) -> None:
        """Map the shards of some blocks, each given once; forget all others if they would be too many."""
        new = shards[~self._files.is_mapped(shards)]
        if self._num_mapped + len(new) > MAX_SHARDS:
            self.close()
            new = shards
        for shard in new:
            # A file system that does not answer makes the opening of a file wait.
            self._enter(int(numbers[np.argmax(self._blocks.shard[numbers] == shard)]), place)
            self._files.map(shard[np.newaxis])
        self._files.map(shards)
        self._num_mapped += len(new)

    def _enter(self, number: int, place: ReadPlace) -> None:
        """Record that a block is read."""
        first_row = int(self._blocks.first_row[number])
        place.enter(READ, int(self._blocks.shard[number]), first_row, first_row + int(self._blocks.rows[number]) - 1)

    def _make_room(self, num_bytes: int) -> int:
        """Release the blocks that were used longest ago if `num_bytes` do not fit; return the bytes that fit."""
        if self.num_bytes + num_bytes > self._max_bytes:
            # Rows of this call may be views already.
            unused = np.flatnonzero(self._is_loaded & (self._last_use < self._num_calls))
            unused = unused[np.argsort(self._last_use[unused], kind="stable")]
            # More than necessary is released, so that the next calls need not do so again.
            excess = self.num_bytes + num_bytes - int(self._max_bytes * (1 - FREED_AT_ONCE))
            size = self._blocks.length[unused]
            chosen = unused[: np.searchsorted(np.cumsum(size), excess) + 1]
            first = self._files.addresses(self._blocks.shard[chosen]) + self._blocks.offset[chosen]
            for address, released in zip(first.tolist(), self._blocks.length[chosen].tolist(), strict=True):
                release_pages(address, released)
            self._is_loaded[chosen] = False
            self.num_bytes -= int(self._blocks.length[chosen].sum())
        return self._max_bytes - self.num_bytes


def _dense_blocks(source: Source, window_share: float) -> NDArray[np.bool_]:
    """Return the mask of the blocks of small rows of which this rank serves a good part; shape (num_blocks,)."""
    table = source.tables.domains
    num_rows = np.bincount(table.block, table.rows, len(source.blocks.rows))
    blocks = source.blocks
    is_dense: NDArray[np.bool_] = num_rows * window_share >= MIN_DENSITY * blocks.rows
    return is_dense & (blocks.length < MAX_ROW_BYTES * blocks.rows.astype(np.int64))


def _map_shard(paths: ShardPaths, number: int) -> NDArray[Any]:
    return map_array(paths.get(number), np.dtype(np.uint8))
