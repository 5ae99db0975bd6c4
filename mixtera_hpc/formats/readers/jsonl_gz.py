"""JSON lines compressed with gzip (`.jsonl.gz`), decoded by ISA-L.

A file of short members is read member by member, like every compressed format. If the first member is long, as plain
`gzip` writes it, a block is 4 MiB of decoded lines, and its offset and length count decoded bytes. Seek points, found
while the index is built, let a reader begin decoding near a block.
"""

import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mixtera_hpc.formats.base import BlockRef, RowBatch, ScanSpec, ScanUnit, ShardReader
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.frames import DecodedSegment, block_too_large_error, decode_frames
from mixtera_hpc.formats.codecs.gzip_members import GZIP, first_member_exceeds, mark_line_blocks
from mixtera_hpc.formats.codecs.seek_points import SeekPoints, find_points, write_points
from mixtera_hpc.formats.readers.compressed_jsonl import CompressedJsonlFormat, CompressedJsonlReader

__all__ = ["JsonlGzFormat"]

LOGGER = logging.getLogger("mixtera_hpc")

# A first member that decodes to more than this makes a file one of long members.
LONG_MEMBER_BYTES = 8 << 20
BLOCK_BYTES = 4 << 20
# Points that are found per block. The one before the block is stored, and what lies between is decoded with every read.
POINTS_PER_BLOCK = 8
# Least distance of seek points, each of which stores a window of 32 KiB.
MIN_SPACING_BYTES = 1 << 17


class JsonlGzFormat(CompressedJsonlFormat):
    """`Format` of `.jsonl.gz` files."""

    def __init__(self, long_bytes: int = LONG_MEMBER_BYTES, block_bytes: int = BLOCK_BYTES) -> None:
        super().__init__("jsonl.gz", GZIP)
        self._long_bytes = long_bytes
        self._block_bytes = block_bytes

    def scan(self, path: Path, unit: ScanUnit, spec: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
        """Read the rows of the file, then find the seek points of long members if the spec has a folder for them."""
        starts: list[int] = []
        for batch in super().scan(path, unit, spec, block_rows):
            starts += batch.blocks.offset.tolist()
            yield batch
        # The scan has shown that the file is undamaged.
        if spec.seek_folder is not None and self._has_long_members(path):
            spacing = max(self._block_bytes // POINTS_PER_BLOCK, MIN_SPACING_BYTES)
            write_points(path, Path(spec.seek_folder), spacing, starts)

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        """Open a shard for random access by block."""
        # Points exist for long members only, so finding them answers the question without decoding.
        points = find_points(path, cache.seek_folders)
        if points is None and not self._has_long_members(path):
            return CompressedJsonlReader(path, text, cache, GZIP)
        return LongMemberReader(path, text, cache, points)

    def _segments(self, file: BinaryIO, path: Path) -> Iterator[DecodedSegment]:
        segments = decode_frames(file, GZIP, path)
        return mark_line_blocks(segments, self._block_bytes) if self._has_long_members(path) else segments

    def _has_long_members(self, path: Path) -> bool:
        return first_member_exceeds(path, self._long_bytes)


class LongMemberReader(CompressedJsonlReader):
    """Decodes blocks in the middle of long members: from a seek point, or else from the start of the file."""

    def __init__(self, path: Path, text: str | None, cache: BlockCache, points: SeekPoints | None) -> None:
        super().__init__(path, text, cache, GZIP)
        self._points = points
        if points is None and cache.seek_folders:
            _warn_of_missing_points(path, cache.seek_folders)

    def _read_block(self, block: BlockRef) -> bytes:
        # The length of a block counts decoded bytes.
        if block.length > self._max_block_bytes:
            raise block_too_large_error(self._path, block.offset, self._max_block_bytes)
        if self._points is not None:
            return self._points.read(self._shard.fd, self._path, block.offset, block.length)

        position = 0  # Decoded bytes before the current segment.
        parts = []
        with self._path.open("rb") as file:
            for segment in decode_frames(file, GZIP, self._path):
                # The block's range relative to this segment; it may begin before it or end after it.
                start = block.offset - position
                stop = start + block.length
                parts.append(segment.data[max(start, 0) : max(stop, 0)])
                position += len(segment.data)
                if stop <= len(segment.data):
                    break
        return b"".join(parts)


@functools.cache
def _warn_of_missing_points(path: Path, folders: tuple[Path, ...]) -> None:
    """Log a warning, once per process and shard: readers are opened again and again."""
    LOGGER.warning(
        "No seek points of %s in %s: every block is decoded from the start of the file. Copy the folder together with "
        "the index, or build the index again.",
        path,
        ", ".join(map(str, folders)),
    )
