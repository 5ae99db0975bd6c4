"""Load what is needed of token files from the file system, before documents are copied from them.

A window serves the documents of a block in random order, so that most of a block is needed soon. At the first document,
the kernel would read around it: 128 KiB to 8 MiB, as the file system is set, most of which belongs to other windows.
So an access reads its own page only (`read_single_pages`), and before it the blocks of all documents of a read are
requested, all at the same time, and then loaded one after the other. An access that waits for the file system would
hold the interpreter's lock. Only the wanted tokens are loaded of large blocks, which hold long documents, and of much
data in the order of `shuffle=sequence`.
Price: about 10 µs per block of 128 kB in the page cache, and 3 µs per document or sequence where only these are loaded.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.stored.document_places import Places
from mixtera_hpc.dataplane.reading.stored.mapped_files import MAX_RESIDENT_BYTES, MappedFiles
from mixtera_hpc.formats.file_memory import load_pages
from mixtera_hpc.formats.shard_errors import shard_changed_error

__all__ = ["BlockLoads"]

MAX_BLOCK_BYTES = 1 << 20
"""Largest block that is loaded as a whole. With 256 rows per block, documents of others have 4 KiB or more."""
REPEAT_AFTER_S = 300
"""Time after which pages of a block may have left the page cache."""
_NEVER = np.iinfo(np.int64).max

Ints = NDArray[np.int64]


class BlockLoads:
    """The blocks of shards that were loaded. Not thread-safe."""

    def __init__(
        self,
        source: Source,
        is_in_shard: NDArray[np.bool_],
        files: MappedFiles,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Load nothing yet.

        Args:
            source: the data.
            is_in_shard: mask of the blocks that are read from their shard, and not from a store; shape (num_blocks,).
            files: the shards, by number.
            clock: returns seconds.
        """
        self._index = source.index
        self._blocks = source.blocks
        self._files = files
        self._clock = clock
        self._is_single = source.blocks.length > MAX_BLOCK_BYTES
        """Mask of the blocks of which only the wanted tokens are loaded."""
        # With `shuffle=sequence`, the sequences of a block are served at any time of the epoch.
        if source.layout.order.repeats and source.blocks.length.sum() > MAX_RESIDENT_BYTES:
            self._is_single[:] = True
        self._next_s = np.where(is_in_shard, 0, _NEVER)
        """Time from which on each block is loaded again."""

    def load(self, documents: Documents, places: Places) -> None:
        """Load the pages of documents in mapped shards, unless their block was loaded shortly before.

        Args:
            documents: in mapped files.
            places: of the documents.

        Raises:
            DataError: a shard is shorter than before, or cannot be read.
        """
        now_s = int(self._clock())
        due = np.flatnonzero(self._next_s[documents.block] <= now_s)
        if not len(due):
            return
        block = documents.block[due]
        is_single = self._is_single[block]
        if is_single.any():
            self._load_documents(documents.select(due[is_single]), places.select(due[is_single]))
        blocks = np.unique(block[~is_single])
        self._load(self._blocks.shard[blocks], self._blocks.offset[blocks], self._blocks.length[blocks])
        self._next_s[blocks] = now_s + REPEAT_AFTER_S

    def _load_documents(self, documents: Documents, places: Places) -> None:
        """Load the wanted tokens of documents, which may stand for those that follow them in their block."""
        item_size = self._files.item_sizes(places.file)
        first = (places.start + documents.first) * item_size
        # Some of the tokens may be special ones that are not stored.
        stop = np.minimum(first + documents.wanted * item_size, self._files.num_bytes(places.file))
        self._load(places.file, first, stop - first)

    def _load(self, shard: NDArray[np.integer[Any]], first: Ints, num_bytes: Ints) -> None:
        """Load bytes of mapped shards, given the first byte and their number."""
        is_inside, addresses = self._files.request(shard, first, num_bytes)
        for number, address, size in zip(
            shard[is_inside].tolist(), addresses, num_bytes[is_inside].tolist(), strict=True
        ):
            try:
                # If the kernel cannot do so, each access waits for its page.
                load_pages(address, size)
            except OSError:
                path = Path(self._index.data_root) / self._index.shard_paths[number]
                raise shard_changed_error(path, None, "it is shorter than before, or cannot be read") from None
