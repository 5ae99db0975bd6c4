"""JSON lines compressed with LZMA (`.jsonl.xz`)."""

import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mixtera_hpc.formats.base import BlockRef, ShardReader
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.frames import Codec, DecodedSegment, join_block
from mixtera_hpc.formats.codecs.xz_blocks import decode_blocks, list_blocks
from mixtera_hpc.formats.readers.compressed_jsonl import CompressedJsonlFormat, CompressedJsonlReader

__all__ = ["JsonlXzFormat"]

_XZ = Codec(start=lzma.LZMADecompressor, errors=(lzma.LZMAError, EOFError))


class JsonlXzFormat(CompressedJsonlFormat):
    """`Format` of `.jsonl.xz` files. A block is a run of xz's own blocks that ends where a line ends."""

    def __init__(self) -> None:
        super().__init__("jsonl.xz", _XZ)

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        """Open a shard for random access by block."""
        return JsonlXzReader(path, text, cache)

    def _segments(self, file: BinaryIO, path: Path) -> Iterator[DecodedSegment]:
        blocks = list_blocks(file.fileno(), path)
        return decode_blocks(file.fileno(), blocks, path)


class JsonlXzReader(CompressedJsonlReader):
    """Decodes the xz blocks of one of our blocks, and nothing before them."""

    def __init__(self, path: Path, text: str | None, cache: BlockCache) -> None:
        super().__init__(path, text, cache, _XZ)
        # Read once per open: the index stands at the end of the file.
        self._blocks = list_blocks(self._shard.fd, path)

    def _read_block(self, block: BlockRef) -> bytes:
        # A row may end in the next xz block, but never outside the block of the index.
        stop = block.offset + block.length
        xz_blocks = [xz_block for xz_block in self._blocks if block.offset <= xz_block.begin < stop]
        segments = decode_blocks(self._shard.fd, xz_blocks, self._path)
        return join_block(segments, block.offset, self._max_block_bytes, self._path)
