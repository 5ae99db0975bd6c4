"""From documents of an index to their places in token stores.

Price: 8 bytes of a memory-mapped file per document that is read.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.stored.mapped_files import map_array
from mixtera_hpc.dataplane.reading.unchanged.store_watch import StoreWatch
from mixtera_hpc.formats.registry import load_format

__all__ = ["StoreRows"]

Ints = NDArray[np.int64]


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

    def set_files(self, documents: Documents, num_shards: int, file: NDArray[np.int32]) -> None:
        """Set the file of the documents that a store holds; the files of stores have the numbers after the shards."""
        for number, chosen in enumerate(self._documents_of_stores(documents)):
            file[chosen] = num_shards + number

    def locate(self, documents: Documents, sizes: Ints, itemsize: Ints, start: Ints, length: Ints) -> None:
        """Set the place in the store of the documents that a store holds.

        Args:
            documents: of any block.
            sizes: bytes of the text of each document.
            itemsize: bytes of a token.
            start: first byte of each document in its file.
            length: bytes of each document. A store holds no special tokens.
        """
        for number, chosen in enumerate(self._documents_of_stores(documents)):
            block = documents.block[chosen]
            first_row = self._first_rows[self._stores[number].first_block]
            row = self._first_rows[block] - first_row + documents.row[chosen]
            start[chosen] = self._starts[number][row] * itemsize[chosen]
            length[chosen] = sizes[chosen]

    def _documents_of_stores(self, documents: Documents) -> Iterator[NDArray[np.intp]]:
        """Yield the documents that each store holds."""
        block = documents.block
        is_text = self._holds_text[self._source.blocks.shard[block]]
        for store in self._stores:
            yield np.flatnonzero(is_text & (block >= store.first_block) & (block < store.last_block))
