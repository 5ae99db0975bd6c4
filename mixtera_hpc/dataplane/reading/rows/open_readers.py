"""The readers of the shards that a reading thread has open."""

from collections import OrderedDict
from typing import cast

import numpy as np

from mixtera_hpc.dataplane.reading.residency.open_shards import ShardPaths
from mixtera_hpc.dataplane.reading.rows.read_rows import ReadableShard
from mixtera_hpc.dataplane.reading.rows.row_files import RowFiles
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.stored.stored_rows import ShardFormats
from mixtera_hpc.dataplane.reading.unchanged.file_comparison import FileComparison
from mixtera_hpc.formats.base import RangeReader, TokenReader
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.composed_text import open_reader
from mixtera_hpc.formats.registry import load_format

__all__ = ["OpenReaders"]


class OpenReaders:
    """Readers of single shards, at most half of what may be open; files that share a loop have the rest."""

    def __init__(
        self, source: Source, comparison: FileComparison, cache: BlockCache, files: RowFiles, max_open: int
    ) -> None:
        """Open nothing yet.

        Args:
            source: the data.
            comparison: notices shards that change.
            cache: decoded blocks, which the readers share.
            files: the files that share a loop.
            max_open: shards that this thread may have open, those of `files` included.
        """
        self._source = source
        self._comparison = comparison
        self._cache = cache
        self._files = files
        self._max_open_shards = max_open
        self._paths = ShardPaths(source.index.data_root, source.index.shard_paths)
        self._formats = ShardFormats(source)
        self._shards: OrderedDict[int, ReadableShard] = OrderedDict()
        """Number of the shard → its reader, the one used last at the end."""
        self._is_range_reader: dict[type, bool] = {}
        """Class of a reader → True if it is a `RangeReader`: the check of a protocol is slow."""

    def get(self, number: int) -> ReadableShard:
        """Return an open shard; the one that was not used for longest is closed when there are too many."""
        self._comparison.use(number)
        if load_format(self._source.index.shard_formats[number]).maps_files:
            self._comparison.use_mapped(np.array([number], np.int32))
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]

        shard = self._open(number)
        self._shards[number] = shard
        # Each open shard costs a file descriptor; a run may have many thousands of shards.
        if len(self._shards) > self._max_open_shards // 2:
            _, oldest = self._shards.popitem(last=False)
            oldest.reader.close()
        self._files.limit(self._max_open_shards - len(self._shards))
        return shard

    def close(self) -> None:
        """Close every shard."""
        for shard in self._shards.values():
            shard.reader.close()
        self._shards.clear()

    def _open(self, number: int) -> ReadableShard:
        shard_format = self._formats.of(number)
        tokenizer = self._source.tokenizer
        chat = tokenizer.chat if tokenizer is not None else None
        text = self._source.index.shard_texts[number]
        reader = open_reader(shard_format, self._paths.get(number), text, self._cache, chat)
        if type(reader) not in self._is_range_reader:
            self._is_range_reader[type(reader)] = isinstance(reader, RangeReader)
        range_reader = cast(RangeReader, reader) if self._is_range_reader[type(reader)] else None
        token_reader = cast(TokenReader, reader) if shard_format.holds_tokens else None
        return ReadableShard(reader, range_reader, token_reader)
