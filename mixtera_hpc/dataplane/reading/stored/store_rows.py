"""From documents of an index to their places in token stores.

Price: 8 bytes of a memory-mapped file per document that is read.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.stored.mapped_files import map_array
from mixtera_hpc.dataplane.reading.unchanged.store_watch import StoreWatch
from mixtera_hpc.formats.registry import load_format

__all__ = ["Places", "StoreRows"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Places:
    """Where documents lie in files; shape (n,) each."""

    file: Ints
    start: Ints
    """First byte in the file."""
    length: Ints
    """Bytes of the document."""
    may_have_added: NDArray[np.bool_]
    """Whether special tokens may be stored at the borders of the document."""

    def select(self, chosen: NDArray[np.bool_] | slice) -> "Places":
        """Return some of the places."""
        return Places(self.file[chosen], self.start[chosen], self.length[chosen], self.may_have_added[chosen])


class StoreRows:
    """Finds documents in the token stores of a run."""

    def __init__(self, source: Source) -> None:
        """Map the positions of all rows; nothing is read yet.

        Raises:
            DataError: a store has changed since rank 0 has checked it.
        """
        self._source = source
        self._stores = source.index.token_stores
        self._first_rows = np.concatenate([[0], np.cumsum(source.blocks.rows, dtype=np.int64)])
        self._watches = [StoreWatch(store) for store in self._stores]
        self._starts = [map_array(Path(store.starts), np.dtype("<i8")) for store in self._stores]
        formats = source.index.shard_formats
        holds_text = {name: not load_format(name).holds_tokens for name in set(formats)}
        self._holds_text = np.array([holds_text[name] for name in formats], np.bool_)

    def check_unchanged(self) -> None:
        """Raise DataError if a store was written again."""
        for watch in self._watches:
            watch.check()

    def locate(self, documents: Documents, num_shards: int, places: Places) -> None:
        """Set the places of the documents that a store holds.

        Args:
            documents: of any block.
            num_shards: number of the file of the first store.
            places: of all documents in their shards.
        """
        source = self._source
        block = documents.block
        is_text = self._holds_text[source.blocks.shard[block]]
        for number, (store, starts) in enumerate(zip(self._stores, self._starts, strict=True)):
            chosen = np.flatnonzero(is_text & (block >= store.first_block) & (block < store.last_block))
            own = block[chosen]
            row = self._first_rows[own] - self._first_rows[store.first_block] + documents.row[chosen]
            itemsize = np.dtype(store.dtype).itemsize
            places.file[chosen] = num_shards + number
            places.start[chosen] = starts[row] * itemsize
            places.length[chosen] = (documents.size[chosen] - source.layout.added_tokens(own)) * itemsize
            places.may_have_added[chosen] = False
