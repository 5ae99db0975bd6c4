"""Positions in token stores of the tokens of an index's documents.

Price: 8 bytes of a memory-mapped file per document that is read.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.stored.mapped_files import map_array
from mixtera_hpc.formats.registry import load_format

__all__ = ["StoreRows"]

Ints = NDArray[np.int64]


class StoreRows:
    """Finds documents in the token stores of a run. A store holds no special tokens."""

    def __init__(self, source: Source, file_of_block: NDArray[np.int32]) -> None:
        """Map the positions of all rows; nothing is read yet.

        Args:
            source: the data.
            file_of_block: the shard of each block; shape (num_blocks,). Changed in place: a block of text whose tokens
                are in a store gets the number of the store's file. These numbers follow those of the shards.
        """
        self._stores = source.index.token_stores
        self._first_rows: Ints = np.append(0, np.cumsum(source.blocks.rows, dtype=np.int64))
        self._starts = [map_array(Path(store.starts), np.dtype("<i8")) for store in self._stores]
        formats = source.index.shard_formats
        holds_text = {name: not load_format(name).holds_tokens for name in set(formats)}
        is_text = np.array([holds_text[name] for name in formats], np.bool_)[source.blocks.shard]
        self._num_shards = len(formats)
        for number, store in enumerate(self._stores):
            of_store = slice(store.first_block, store.last_block)
            file_of_block[of_store][is_text[of_store]] = self._num_shards + number

    def starts(self, documents: Documents, file: NDArray[np.int32]) -> Ints:
        """Return the first token, in the file of its store, of documents that stores hold; shape (n,)."""
        rows: Ints = self._first_rows[documents.block] + documents.row
        if len(self._stores) == 1:
            return self._starts_in(0, rows)
        starts = np.zeros(len(rows), np.int64)
        for number in range(len(self._stores)):
            chosen = np.flatnonzero(file == self._num_shards + number)
            starts[chosen] = self._starts_in(number, rows[chosen])
        return starts

    def _starts_in(self, number: int, rows: Ints) -> Ints:
        starts: Ints = self._starts[number][rows - self._first_rows[self._stores[number].first_block]]
        return starts
