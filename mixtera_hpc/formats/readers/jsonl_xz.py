"""JSON lines compressed with LZMA (`.jsonl.xz`)."""

import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mixtera_hpc.formats.base import BlockRef, ShardReader
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.frames import Codec, Piece
from mixtera_hpc.formats.codecs.xz_blocks import decoded, xz_blocks
from mixtera_hpc.formats.readers.compressed_jsonl import CompressedJsonlFormat, CompressedJsonlReader

__all__ = ["JsonlXzFormat"]

_CODEC = Codec(start=lzma.LZMADecompressor, errors=(lzma.LZMAError, EOFError))


class JsonlXzFormat(CompressedJsonlFormat):
    """`Format` of `.jsonl.xz` files; a block is a run of xz's own blocks that ends where a line does."""

    def __init__(self) -> None:
        super().__init__("jsonl.xz", _CODEC)

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        return _Reader(path, text, cache)

    def _pieces(self, file: BinaryIO, path: Path) -> Iterator[Piece]:
        return decoded(file.fileno(), xz_blocks(file.fileno(), path), path)


class _Reader(CompressedJsonlReader):
    def __init__(self, path: Path, text: str | None, cache: BlockCache) -> None:
        super().__init__(path, text, cache, _CODEC)
        self._blocks = xz_blocks(self._fd, path)

    def _decoded(self, block: BlockRef) -> bytes:
        wanted = [b for b in self._blocks if block.offset <= b.begin < block.offset + block.length]
        return b"".join(piece.data for piece in decoded(self._fd, wanted, self._path))
