"""Let the file system read what is needed of token files, before documents are copied from them.

A window serves the documents of a block in random order, so that most of a block is needed soon. At the first document,
the kernel would read around it: 128 KiB to 8 MiB, as the file system is set, most of which belongs to other windows.
So an access reads its own page only (`read_single_pages`), and before it the blocks of all documents of a read are
requested, all at the same time. Of large blocks, which hold long documents, only the documents are requested.
Price: about 4 µs per block of 128 kB, and 1 µs per document of a large block.
"""

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.stored.mapped_files import MappedFiles
from mixtera_hpc.formats.file_memory import request_pages

__all__ = ["BlockRequests"]

MAX_BLOCK_BYTES = 1 << 20
"""Largest block that is requested as a whole. With 256 rows per block, documents of others have 4 KiB or more."""
REPEAT_AFTER_S = 300
"""Time after which pages of a block may have left the page cache."""
_NEVER = np.iinfo(np.int64).max

Ints = NDArray[np.int64]


class BlockRequests:
    """The blocks of shards that were requested. Not thread-safe."""

    def __init__(
        self,
        source: Source,
        is_in_shard: NDArray[np.bool_],
        files: MappedFiles,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Request nothing yet.

        Args:
            source: the data.
            is_in_shard: which blocks are read from their shard, and not from a store; shape (num_blocks,).
            files: the shards, by number.
            clock: returns seconds.
        """
        self._blocks = source.blocks
        self._files = files
        self._clock = clock
        self._is_large = source.blocks.length > MAX_BLOCK_BYTES
        self._next_s = np.where(is_in_shard, 0, _NEVER)
        """Time from which on each block is requested again."""

    def request(self, documents: Documents) -> None:
        """Request the pages of documents in mapped shards, unless their block was requested shortly before."""
        now_s = int(self._clock())
        due = np.flatnonzero(self._next_s[documents.block] <= now_s)
        if not len(due):
            return
        block = documents.block[due]
        is_large = self._is_large[block]
        if is_large.any():
            large = due[is_large]
            self._request(documents.block[large], documents.offset[large], documents.length[large])
        blocks = np.unique(block[~is_large])
        self._next_s[blocks] = now_s + REPEAT_AFTER_S
        self._request(blocks, np.zeros(len(blocks), np.int64), self._blocks.length[blocks])

    def _request(self, block: NDArray[np.int32], first: Ints, num_bytes: Ints) -> None:
        """Request bytes of blocks, given the first byte, counted in the block, and their number."""
        shard = self._blocks.shard[block]
        offset = self._blocks.offset[block] + first
        # A damaged index may name bytes that no file has.
        is_inside = (offset >= 0) & (num_bytes > 0) & (offset + num_bytes <= self._files.num_bytes(shard))
        address = (self._files.addresses(shard) + offset)[is_inside]
        for begin, size in zip(address.tolist(), num_bytes[is_inside].tolist(), strict=True):
            request_pages(begin, size)
