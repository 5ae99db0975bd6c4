"""JSON lines compressed with gzip (`.jsonl.gz`), decoded by ISA-L.

A file of short members is read member by member, as every compressed format is. In a file whose first member is long (what
plain `gzip` writes) a block is 4 MiB of decoded lines, and its offset and length count decoded bytes; seek points, found while
the index is built, let reading one begin near it.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from isal import igzip_lib

from mixtera_hpc.formats.base import BlockRef, RowBatch, ScanSpec, ScanUnit, ShardReader
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.frames import Codec, Decompressor, Piece, pieces_of
from mixtera_hpc.formats.codecs.seek_points import SeekPoints, find_points, write_points
from mixtera_hpc.formats.readers.compressed_jsonl import CompressedJsonlFormat, CompressedJsonlReader

__all__ = ["JsonlGzFormat"]

LONG_BYTES = 8 << 20
"""A first member that decodes to more is long."""
BLOCK_BYTES = 4 << 20
MIN_SPACING_BYTES = 1 << 17
"""Of seek points, each of which has a window of 32 KiB."""

_ERROR = cast("type[Exception]", igzip_lib.IsalError)


def _start() -> Decompressor:
    started: Decompressor = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
    return started


_CODEC = Codec(start=_start, errors=(_ERROR, EOFError), padding=b"\0")
"""Zeros after a member are padding, as gzip itself has it."""


class JsonlGzFormat(CompressedJsonlFormat):
    """`Format` of `.jsonl.gz` files."""

    def __init__(self, long_bytes: int = LONG_BYTES, block_bytes: int = BLOCK_BYTES) -> None:
        super().__init__("jsonl.gz", _CODEC)
        self._long_bytes, self._block_bytes = long_bytes, block_bytes

    def scan(self, path: Path, unit: ScanUnit, fields: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
        yield from super().scan(path, unit, fields, block_rows)
        if fields.seek_folder is not None and self._is_long(path):
            write_points(path, Path(fields.seek_folder), max(self._block_bytes, MIN_SPACING_BYTES))

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        points = find_points(path, cache.seek_folders)
        if points is None and not self._is_long(path):
            return CompressedJsonlReader(path, text, cache, _CODEC)
        return _LongReader(path, text, cache, points)

    def _pieces(self, file: BinaryIO, path: Path) -> Iterator[Piece]:
        pieces = pieces_of(file, _CODEC, path)
        return _cut(pieces, self._block_bytes) if self._is_long(path) else pieces

    def _is_long(self, path: Path) -> bool:
        """Whether the first member is long; decodes as much of it."""
        decoder, size = _start(), 0
        try:
            with path.open("rb") as file:
                while size <= self._long_bytes and not decoder.eof:
                    data = file.read(64 << 10) if decoder.needs_input else b""
                    if not data and decoder.needs_input:
                        return False
                    size += len(decoder.decompress(data, self._long_bytes + 1))
        except (OSError, EOFError, _ERROR):
            return False
        return size > self._long_bytes


def _cut(pieces: Iterator[Piece], block_bytes: int) -> Iterator[Piece]:
    """Decoded bytes with ends of blocks in them: after every `block_bytes`, where the next line ends."""
    position, size = 0, 0
    for piece in pieces:
        data = piece.data
        size += len(data)
        cut = data.rfind(b"\n") + 1 if size >= block_bytes else 0
        if cut:
            position += size - len(data) + cut
            yield Piece(data[:cut], position)
            data, size = data[cut:], len(data) - cut
        if data:
            yield Piece(data, None)
    if size:
        yield Piece(b"", position + size)


class _LongReader(CompressedJsonlReader):
    """Takes blocks out of the middle of long members."""

    def __init__(self, path: Path, text: str | None, cache: BlockCache, points: SeekPoints | None) -> None:
        super().__init__(path, text, cache, _CODEC)
        self._points = points
        if self._points is None and cache.seek_folders:
            warnings.warn(
                f"There are no seek points of {path} in {', '.join(map(str, cache.seek_folders))}: every block of it is "
                "decoded from the start of the file. Copy the folder along with the index, or build the index again.",
                stacklevel=2,
            )

    def _decoded(self, block: BlockRef) -> bytes:
        if self._points is not None:
            return self._points.read(self._fd, self._path, block.offset, block.length)
        position, found = 0, []
        with self._path.open("rb") as file:
            for piece in pieces_of(file, _CODEC, self._path):
                begin, end = block.offset - position, block.offset + block.length - position
                found.append(piece.data[max(begin, 0) : max(end, 0)])
                position += len(piece.data)
                if end <= len(piece.data):
                    break
        return b"".join(found)
