"""Write the tokens of a unit's documents to their places in a store.

The tokens come from the scan that counted them, where it kept them, else the documents are read and tokenized. Price:
memory for `GROUP_TOKENS` tokens twice; a unit that can only be decoded as a whole is in memory as text too if it is
tokenized again.
"""

import os
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import BlockRef, ShardReader
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.seek_points import seek_folder_of
from mixtera_hpc.formats.composed_text import open_reader
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.read.verify import check_shard
from mixtera_hpc.index.token_store.store_layout import StoreLayout, StoreUnit
from mixtera_hpc.tokens.tokenizer import Tokenizer

__all__ = ["SpooledBlocks", "UnitWriter"]

GROUP_TOKENS = 1 << 22
"""Tokens that are sorted and written together."""

Ints = NDArray[np.int64]
Tokens = NDArray[np.unsignedinteger[Any]]


class SpooledBlocks(msgspec.Struct, frozen=True, kw_only=True):
    """Consecutive blocks whose tokens the scan has kept."""

    first_block: int
    last_block: int
    """One past the last block."""
    path: str
    start: int
    """Ids of the file before those of the first block."""


class UnitWriter:
    """The writer of units to the files of a store; one per rank."""

    def __init__(
        self,
        index: PropertyIndex,
        tokenizer: Tokenizer,
        layout: StoreLayout,
        dtype: np.dtype[Any],
        spooled: list[SpooledBlocks],
    ) -> None:
        """Open nothing yet.

        Args:
            index: the index.
            tokenizer: that of the index.
            layout: the places of all rows.
            dtype: type of the ids in the store and in the files of the scan.
            spooled: blocks whose tokens need not be made again.
        """
        self._index = index
        self._tokenizer = tokenizer
        self._layout = layout
        self._dtype = dtype
        self._spooled = spooled
        self._first_spooled = np.array([blocks.first_block for blocks in spooled], np.int64)
        histogram = index.tables.histogram
        self._tokens_before = np.concatenate([[0], np.cumsum(histogram.tokens, dtype=np.int64)])[histogram.indptr]
        """Tokens of all blocks before each block."""
        self._cache = BlockCache(seek_folders=[seek_folder_of(index.path)], max_block_bytes=sys.maxsize)
        self._paths = index.shard_paths()
        self._texts = index.shard_texts()

    def write(self, unit: StoreUnit, tokens_file: int, starts_file: int) -> int:
        """Write the tokens of one unit to two open files; return its rows.

        Raises:
            DataError: a document cannot be read, or has other tokens than the index counted.
            PropertyIndexError: the shard has changed since it was indexed.
        """
        samples = self._index.read_blocks(np.arange(unit.first_block, unit.last_block, dtype=np.int32))
        starts = self._layout.row_starts(unit, samples)
        is_good = samples.combo != self._index.tables.combos.bad
        counts = np.where(is_good, samples.tokens, 0)
        first_row = int(self._layout.first_rows[unit.first_block])

        group: list[Tokens] = []
        group_rows = slice(0, 0)
        for rows, tokens in self._segments(unit, is_good, counts, samples.length):
            group.append(tokens)
            group_rows = slice(group_rows.start, rows.stop)
            if sum(map(len, group)) >= GROUP_TOKENS:
                self._write_group(np.concatenate(group), starts[group_rows], counts[group_rows], tokens_file)
                group = []
                group_rows = slice(rows.stop, rows.stop)
        if group:
            self._write_group(np.concatenate(group), starts[group_rows], counts[group_rows], tokens_file)
        _write_all(starts_file, starts.data.cast("B"), 8 * first_row)
        # After the reads: documents that changed meanwhile may have as many tokens as before.
        shard = int(self._index.tables.blocks.shard[unit.first_block])
        check_shard(self._index, shard, self._paths[shard])
        return len(starts)

    def _segments(
        self, unit: StoreUnit, is_good: NDArray[np.bool_], counts: Ints, lengths: Ints
    ) -> Iterator[tuple[slice, Tokens]]:
        """Yield rows of the unit with their tokens, in order; a segment has at most about `GROUP_TOKENS` tokens."""
        first_row = int(self._layout.first_rows[unit.first_block])
        reader: ShardReader | None = None
        try:
            for block in range(unit.first_block, unit.last_block):
                begin, end = (self._layout.first_rows[block : block + 2] - first_row).tolist()
                tokens_before = np.concatenate([[0], np.cumsum(counts[begin:end])])
                spooled = self._spool_of(block)
                if spooled is None and reader is None:
                    reader = self._open(int(self._index.tables.blocks.shard[unit.first_block]))
                cuts = np.searchsorted(tokens_before, np.arange(GROUP_TOKENS, tokens_before[-1], GROUP_TOKENS))
                for low, high in pairwise([0, *dict.fromkeys(cuts.tolist()), end - begin]):
                    rows = slice(begin + low, begin + high)
                    if spooled is not None:
                        path, start = spooled
                        count = int(tokens_before[high] - tokens_before[low])
                        offset = (start + int(tokens_before[low])) * self._dtype.itemsize
                        yield rows, np.fromfile(path, self._dtype, count, offset=offset)
                    elif reader is not None:
                        chosen = low + np.flatnonzero(is_good[rows])
                        yield rows, self._encode(reader, block, chosen, counts[begin:end], lengths[begin:end])
        finally:
            if reader is not None:
                reader.close()

    def _spool_of(self, block: int) -> tuple[str, int] | None:
        """Return the file and the first id of a block's tokens; None if the scan has not kept them."""
        position = int(np.searchsorted(self._first_spooled, block, side="right")) - 1
        if position < 0 or block >= self._spooled[position].last_block:
            return None
        own = self._spooled[position]
        return own.path, own.start + int(self._tokens_before[block] - self._tokens_before[own.first_block])

    def _encode(self, reader: ShardReader, block: int, chosen: Ints, counts: Ints, lengths: Ints) -> Tokens:
        """Return the tokens of some rows of a block, given the tokens and bytes of all its rows."""
        texts = reader.documents(BlockRef.of(self._index.tables.blocks, block), lengths, chosen)
        tokens, offsets = self._tokenizer.encode_batch(texts)
        given = np.diff(offsets)
        wrong = np.flatnonzero(given != counts[chosen])
        if len(wrong):
            raise self._count_error(block, int(chosen[wrong[0]]), int(given[wrong[0]]))
        return tokens.astype(self._dtype)

    def _write_group(self, tokens: Tokens, starts: Ints, counts: Ints, tokens_file: int) -> None:
        """Write the tokens of consecutive rows to their places, given those and the tokens of each row."""
        firsts = np.cumsum(counts) - counts
        # The places of rows without tokens have no meaning.
        rows = np.flatnonzero(counts)
        rows = rows[np.argsort(starts[rows], kind="stable")]
        begins = starts[rows]
        # Documents whose places follow each other are written in one call.
        borders = np.flatnonzero(begins[1:] != (begins + counts[rows])[:-1]) + 1
        view = tokens.data
        places = zip(firsts[rows].tolist(), (firsts + counts)[rows].tolist(), strict=True)
        documents = [view[first:last] for first, last in places]
        for first, last in pairwise([0, *borders.tolist(), len(rows)]):
            if first < last:
                _write_all(tokens_file, b"".join(documents[first:last]), int(begins[first]) * self._dtype.itemsize)

    def _open(self, shard: int) -> ShardReader:
        file_format = load_format(self._index.tables.shards.format[shard])
        path = self._index.data_root / self._paths[shard]
        return open_reader(file_format, path, self._texts[shard], self._cache, self._tokenizer.chat)

    def _count_error(self, block: int, row: int, num_tokens: int) -> DataError:
        blocks = self._index.tables.blocks
        shard = self._paths[int(blocks.shard[block])]
        return DataError(
            f"{shard} row {int(blocks.first_row[block]) + row} has {num_tokens} tokens, which is not what the index "
            "counted: the file has changed.\n  Run mixtera-hpc index verify, and build the index again."
        )


def _write_all(descriptor: int, data: Any, offset: int) -> None:
    """Write all bytes at a position; one call may write only some of them."""
    view = memoryview(data)
    while len(view):
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written
