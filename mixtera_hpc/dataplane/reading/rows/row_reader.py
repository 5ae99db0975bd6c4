"""Read rows of shards of any format: raw samples, texts, or token ids.

Formats with byte ranges read only the rows. The others decode whole blocks, whose other rows stay in memory until they
are served. Rows of formats with a `RowDecoder` are read by one loop over all shards.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents, DomainStreams, equal_runs
from mixtera_hpc.dataplane.reading.residency.open_shards import max_open_shards
from mixtera_hpc.dataplane.reading.rows.block_rows import BlockRows
from mixtera_hpc.dataplane.reading.rows.mapped_rows import NOT_MAPPED, MappedRows
from mixtera_hpc.dataplane.reading.rows.open_readers import OpenReaders
from mixtera_hpc.dataplane.reading.rows.read_plan import ReadPlan
from mixtera_hpc.dataplane.reading.rows.read_rows import DecodeRows, EncodedRows, ReadableShard, ReadRows
from mixtera_hpc.dataplane.reading.rows.row_files import RowFiles
from mixtera_hpc.dataplane.reading.rows.shard_kinds import BLOCKS, FIRST_DECODER, ROWS, ShardKinds
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.unchanged.file_comparison import FileComparison
from mixtera_hpc.dataplane.watchdog.progress import READ, ReadPlace
from mixtera_hpc.formats.base import BlockRef, RowDecoder, ShardReader
from mixtera_hpc.formats.batching.json_problems import JSON_ERRORS
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.seek_points import seek_folder_of
from mixtera_hpc.formats.codecs.shared_blocks import SharedBlocks

__all__ = ["RowReader"]

logger = logging.getLogger("mixtera_hpc")

TEXTS_AT_ONCE = 32
"""Rows in one group of reads if their texts are decoded: their bytes are still in the second cache of a core."""


class RowReader:
    """Read rows from the shards of a source. One per reading thread."""

    def __init__(
        self,
        source: Source,
        comparison: FileComparison,
        streams: DomainStreams | None = None,
        window_share: float = 1.0,
    ) -> None:
        """Open nothing yet; shards are opened when they are needed.

        Args:
            source: the data.
            comparison: notices shards that change.
            streams: the streams whose documents are read; None if few are read.
            window_share: part of the rows of each window that are read.
        """
        self._source = source
        self._streams = streams
        self._window_share = window_share
        self._comparison = comparison
        self.place = ReadPlace()
        """The place of this reader in the data, for the watchdog."""
        index = source.index
        self._max_open_shards = max_open_shards()
        self._files = RowFiles(index.data_root, index.shard_paths, self._max_open_shards)
        self._kinds = ShardKinds(index.shard_formats, index.shard_texts)
        seek_folders = [seek_folder_of(path) for path in source.config.index.paths_to_read]
        largest_block = source.config.data.largest_block_bytes()
        memory = source.memory.blocks
        self._shared_blocks = SharedBlocks(memory.fd) if memory is not None else None
        self._cache = BlockCache(source.cache_bytes, seek_folders, largest_block, self._shared_blocks)
        self._readers = OpenReaders(source, comparison, self._cache, self._files, self._max_open_shards)
        self._block_rows = BlockRows(source, streams, self._cache, self._enter_block, self._are_decoded)

    def texts(self, documents: Documents) -> ReadRows:
        """Read rows that are sorted by block and row as texts, or as token ids if the format holds these."""
        reads = list(self._read(documents, raw=False))
        if len(reads) == 1:
            return reads[0]
        positions = np.concatenate([np.zeros(0, np.intp), *(read.positions for read in reads)])
        return ReadRows([text for read in reads for text in read.rows], positions)

    def samples(self, documents: Documents) -> list[ReadRows]:
        """Read raw samples that are sorted by block and row. Those that are decoded alike are read together."""
        return list(self._read(documents, raw=True))

    def _read(self, documents: Documents, *, raw: bool) -> Iterator[ReadRows]:
        """Read rows of all kinds."""
        shards = self._source.blocks.shard[documents.block]
        kinds = self._kinds_of(documents.block)
        if len(kinds) and (kinds == kinds[0]).all():
            yield from self._read_kind(int(kinds[0]), documents, shards, raw)
            return
        for kind in np.unique(kinds).tolist():
            own = np.flatnonzero(kinds == kind)
            for read in self._read_kind(kind, documents.select(own), shards[own], raw):
                yield read._replace(positions=own[read.positions])

    def decode(
        self,
        decode: DecodeRows,
        groups: Iterable[list[Any]],
        documents_of: Callable[[], Documents],
        *,
        raw: bool = True,
    ) -> list[Any]:
        """Decode rows to samples, or to texts.

        Args:
            decode: that of `EncodedRows`.
            groups: some rows, in groups that are decoded together.
            documents_of: returns their documents, in the same order.
            raw: True for samples, False for texts.

        Raises:
            DataError: the shard of a row is damaged or has changed.
        """
        samples: list[Any] = []
        try:
            for rows in groups:
                samples += decode(rows)
            return samples
        except (ValueError, *JSON_ERRORS) as error:
            documents = documents_of()
            shards = self._source.blocks.shard[documents.block]
            self._log_another_read(shards, error)
        # A change explains the error, if the last check compared nothing.
        self._comparison.compare()
        # The readers of the shards name the shard that is damaged, as for other rows.
        disk_order = np.lexsort((documents.row, documents.block))
        samples = self._read_from_shards(documents.select(disk_order), shards[disk_order], raw=raw)
        self._comparison.compare()
        return [samples[i] for i in np.argsort(disk_order).tolist()]

    def close(self) -> None:
        """Close every shard."""
        self._readers.close()
        self._files.close()
        if "_mapped" in self.__dict__ and self._mapped is not None:
            self._mapped.close()
        if self._shared_blocks is not None:
            self._shared_blocks.close()

    @cached_property
    def _mapped(self) -> MappedRows | None:
        """The mapped shards; None if few rows are read. Takes a pass over all blocks of the index."""
        if self._streams is None:
            return None
        limit = self._max_open_shards
        return MappedRows(self._source, self._files.read_bytes, window_share=self._window_share, max_open=limit)

    def _read_kind(self, kind: int, documents: Documents, shards: NDArray[np.int32], raw: bool) -> list[ReadRows]:
        """Read rows of shards of one kind."""
        if kind >= FIRST_DECODER:
            try:
                return [self._read_from_files(self._kinds.decoders[kind - FIRST_DECODER], documents, shards, raw)]
            except (OSError, EOFError, ValueError) as error:
                # The readers of the shards wait for the rest of short reads, and name the shard that is damaged.
                self._log_another_read(shards, error)
        if kind == BLOCKS:
            return list(self._read_resident(documents, raw))
        rows = self._read_from_shards(documents, shards, raw=raw)
        return [ReadRows(rows, np.arange(len(rows)))]

    def _read_resident(self, documents: Documents, raw: bool) -> Iterator[ReadRows]:
        """Read rows of blocks that are decoded as a whole. Raw samples stay packed, texts are decoded at once."""
        rows, unpacks = self._block_rows.resident(raw=raw).read(documents)
        distinct = dict.fromkeys(unpacks)
        for unpack in distinct:
            # Nearly always all shards have rows of the same kind.
            own = rows
            positions = np.arange(len(rows))
            if len(distinct) > 1:
                positions = np.flatnonzero([other is unpack for other in unpacks])
                own = [rows[position] for position in positions.tolist()]
            if unpack is None:
                yield ReadRows(own, positions)
            elif raw:
                yield ReadRows([], positions, EncodedRows.of(unpack, own))
            else:
                groups = EncodedRows.of(unpack, own).groups()
                yield ReadRows(self.decode(unpack, groups, partial(documents.select, positions), raw=False), positions)

    def _read_from_files(
        self, decoder: RowDecoder, documents: Documents, shards: NDArray[np.int32], raw: bool
    ) -> ReadRows:
        """Read rows of files with one decoder, from mapped memory or by positioned reads.

        Raw samples stay bytes. Texts are decoded at once, while they are in the cache.
        """
        self._comparison.use(shards)
        mapped = NOT_MAPPED if self._mapped is None else self._mapped.find(documents, shards, self.place)
        texts: list[Any] = []
        if len(mapped.chosen) and not raw:
            self._comparison.use_mapped(shards)
            texts = mapped.texts(decoder, TEXTS_AT_ONCE)
        # Rows in mapped memory, then all others.
        rows: list[Any] = []
        positions = mapped.chosen
        if len(positions) < len(shards):
            is_other = np.ones(len(shards), np.bool_)
            is_other[positions] = False
            others = np.flatnonzero(is_other)
            rows, own = self._read_positioned(decoder, documents.select(others), shards[others], raw)
            positions = np.concatenate([positions, others[own]])
        if not raw:
            return ReadRows(texts + rows, positions)
        encoded = EncodedRows(
            decode=decoder.payloads,
            memory=mapped.memory,
            own=rows,
            first=np.concatenate([mapped.first, np.arange(len(rows))]),
            stop=np.concatenate([mapped.stop, np.zeros(len(rows), np.int64)]),
            shards=distinct_shards(shards[mapped.chosen]),
        )
        return ReadRows([], positions, encoded)

    def _read_positioned(
        self, decoder: RowDecoder, documents: Documents, shards: NDArray[np.int32], raw: bool
    ) -> tuple[list[Any], NDArray[np.intp]]:
        """Return the bytes or the texts of rows, and their positions: those with a read of their own come first."""
        blocks = self._source.blocks
        starts = blocks.offset[documents.block] + documents.offset
        plan = ReadPlan(shards, starts, documents.length, blocks.first_row[documents.block] + documents.row)
        enter = partial(self.place.enter, READ)
        if raw:
            return self._files.read_raw(plan, enter), plan.positions
        # Rows with a read of their own, and rows that share reads.
        rows: tuple[list[Any], list[Any]] = [], []
        for is_shared, texts in self._files.read(plan, decoder.documents, enter, TEXTS_AT_ONCE):
            rows[is_shared].extend(texts)
        return rows[0] + rows[1], plan.positions

    def _log_another_read(self, shards: NDArray[np.int32], error: Exception) -> None:
        """Log that rows are read again, shard by shard: it is slow, and a network file system may be the cause."""
        first, last = (self._source.index.shard_paths[int(shard)] for shard in (shards[0], shards[-1]))
        place = first if first == last else f"{first} to {last}"
        cause = str(error) or "a read was short"
        logger.warning("Reading %d rows of %s again, one shard after the other: %s.", len(shards), place, cause)

    def _read_from_shards(self, documents: Documents, shards: NDArray[np.int32], *, raw: bool) -> list[Any]:
        """Read rows that are sorted by block and row, without keeping others."""
        starts = self._source.blocks.offset[documents.block] + documents.offset
        rows: list[Any] = []
        for first, last in equal_runs(shards) if len(shards) else ():
            self._enter_shard(documents, int(shards[first]), first, last - 1)
            shard = self._readers.get(int(shards[first]))
            of_shard = slice(first, last)
            if shard.range_reader is None:
                rows += self._read_by_block(shard, documents.select(of_shard), raw=raw)
            elif raw:
                rows += shard.range_reader.payloads_at(starts[of_shard], documents.length[of_shard])
            else:
                rows += shard.range_reader.documents_at(starts[of_shard], documents.length[of_shard])
        return rows

    def _enter_shard(self, documents: Documents, shard: int, first: int, last: int) -> None:
        """Record that rows of one shard are read, from document `first` to document `last`."""
        first_rows = self._source.blocks.first_row
        ends = [int(first_rows[documents.block[i]]) + int(documents.row[i]) for i in (first, last)]
        self.place.enter(READ, shard, *ends)

    def _kinds_of(self, blocks: NDArray[np.int32]) -> NDArray[np.int16]:
        """Return how the rows of each block are read; shape (n,)."""
        shards = self._source.blocks.shard[blocks]
        kinds = self._kinds.of(shards, partial(self._kind_of_opened, blocks, shards))
        # The other rows of a block are worth keeping, but not if it has only one.
        is_block = kinds == BLOCKS
        if is_block.any():
            kinds = np.where(is_block & (self._source.blocks.rows[blocks] == 1), ROWS, kinds)
        return kinds

    def _kind_of_opened(self, blocks: NDArray[np.int32], shards: NDArray[np.int32], number: int) -> int:
        """Open a shard, and return its kind."""
        of_shard = blocks[shards == number]
        first = self._source.blocks.first_row[of_shard]
        last = first + self._source.blocks.rows[of_shard] - 1
        self.place.enter(READ, number, int(first.min()), int(last.max()))
        shard = self._readers.get(number)
        is_decoded = shard.range_reader is None and shard.token_reader is None
        return BLOCKS if is_decoded else ROWS

    def _are_decoded(self, blocks: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return which blocks are decoded as a whole; shape (n,)."""
        are_decoded: NDArray[np.bool_] = self._kinds_of(blocks) == BLOCKS
        return are_decoded

    def _enter_block(self, number: int) -> tuple[BlockRef, ShardReader]:
        """Record that a block is read, and return it with the reader of its shard."""
        block = BlockRef.of(self._source.blocks, number)
        shard = int(self._source.blocks.shard[number])
        first_row = int(self._source.blocks.first_row[number])
        self.place.enter(READ, shard, first_row, first_row + block.rows - 1)
        return block, self._readers.get(shard).reader

    def _read_by_block(self, shard: ReadableShard, documents: Documents, *, raw: bool) -> Iterator[Any]:
        """Read rows of a format without byte ranges, those of one block together."""
        for first, last in equal_runs(documents.block):
            number = int(documents.block[first])
            block = BlockRef.of(self._source.blocks, number)
            # Lengths of other rows are not needed.
            lengths = np.zeros(block.rows, np.int64)
            lengths[documents.row[first:last]] = documents.length[first:last]
            # A row may occur twice, when two sequences need it.
            rows, position = np.unique(documents.row[first:last].astype(np.int64), return_inverse=True)
            results: Sequence[Any]
            if raw:
                results = shard.reader.payloads(block, lengths, rows)
            elif shard.token_reader is not None:
                results = shard.token_reader.tokens(block, rows)
            else:
                results = shard.reader.documents(block, lengths, rows)
            yield from (results[i] for i in position.tolist())


def distinct_shards(shards: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return each shard once, of shards in ascending order."""
    return shards[np.flatnonzero(np.diff(shards, prepend=-1))]
