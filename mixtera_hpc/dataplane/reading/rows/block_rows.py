"""Rows of blocks that are decoded as a whole: the other rows of a block stay in memory until they are served."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import DomainStreams
from mixtera_hpc.dataplane.reading.residency.packed_rows import PackedRows, packed
from mixtera_hpc.dataplane.reading.residency.resident_rows import ResidentRows
from mixtera_hpc.dataplane.reading.residency.rows_ahead import rows_ahead
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.formats.base import BlockRef, GroupReader, ShardReader
from mixtera_hpc.formats.batching.json_payloads import decode_payloads
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.readers.compressed_jsonl import CompressedJsonlReader

__all__ = ["BlockRows"]


class BlockRows:
    """The rows in memory of one reading thread; raw samples and texts are kept apart."""

    def __init__(
        self,
        source: Source,
        streams: DomainStreams | None,
        cache: BlockCache,
        enter_block: Callable[[int], tuple[BlockRef, ShardReader]],
        are_decoded: Callable[[NDArray[np.int32]], NDArray[np.bool_]],
    ) -> None:
        """Keep nothing yet.

        Args:
            source: the data.
            streams: the streams whose documents are read; None if few are read.
            cache: decoded blocks, which get the memory that rows do not take.
            enter_block: returns a block, given its number, and the reader of its shard.
            are_decoded: returns which blocks are decoded as a whole.
        """
        self._source = source
        self._streams = streams
        self._cache = cache
        self._enter_block = enter_block
        self._are_decoded = are_decoded
        self._resident: dict[bool, ResidentRows] = {}
        """Rows of windows in use: raw samples (True), and texts (False)."""

    def resident(self, *, raw: bool) -> ResidentRows:
        """Return the rows in memory: those of raw samples, or of texts."""
        if raw not in self._resident:
            pack_block = partial(self._pack_block, raw)
            ahead = rows_ahead(self._source, self._streams, pack_block)
            decode_block = partial(self._decode_block, raw)
            max_bytes = self._source.cache_bytes
            self._resident[raw] = ResidentRows(max_bytes, decode_block, pack_block, self._are_decoded, ahead)
        self._limit_blocks()
        return self._resident[raw]

    def _limit_blocks(self) -> None:
        """Leave the memory that rows do not take to decoded blocks."""
        rows_bytes = sum(rows.num_bytes for rows in self._resident.values())
        self._cache.max_bytes = max(self._source.cache_bytes - rows_bytes, 0)

    def _decode_block(self, raw: bool, number: int, rows: NDArray[np.int64]) -> Sequence[Any]:
        """Decode a block and return the named rows; the lengths of rows have no meaning here."""
        block, reader = self._enter_block(number)
        lengths = np.zeros(block.rows, np.int64)
        return reader.payloads(block, lengths, rows) if raw else reader.documents(block, lengths, rows)

    def _pack_block(self, raw: bool, number: int, rows: NDArray[np.int64]) -> PackedRows:
        """Decode a block and return the named rows as they stay in memory."""
        self._limit_blocks()
        block, reader = self._enter_block(number)
        if isinstance(reader, CompressedJsonlReader):
            return PackedRows(reader.lines(block, rows), decode_payloads if raw else reader.unpack_documents)
        if raw and isinstance(reader, GroupReader):
            return packed(reader.payload_groups(block, rows))
        return packed([self._decode_block(raw, number, rows)])
