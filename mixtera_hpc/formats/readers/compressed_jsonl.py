"""JSON lines inside a compressed file: scanned as a stream, read block by block.

A block is a run of compressed frames that ends where a line ends. If each frame contains whole lines, as `pzstd` or a
careful writer makes them, every frame is a block; a file of one frame is a single block. Rows inside a block have no
byte range of their own: reading one decodes its block, which stays in the cache.
"""

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.formats.base import BlockRanges, BlockRef, RowBatch, ScanSpec, ScanUnit, ShardReader
from mixtera_hpc.formats.batching.json_lines import JsonLineBatcher, line_ends
from mixtera_hpc.formats.batching.json_payloads import decode_payloads
from mixtera_hpc.formats.batching.json_problems import JSON_ERRORS, without_bom
from mixtera_hpc.formats.batching.row_type import RowType
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.frames import (
    Codec,
    DecodedSegment,
    decode_frames,
    join_block,
    join_whole_lines,
    limit_block_bytes,
)
from mixtera_hpc.formats.codecs.positioned_reads import OpenShard, read_fully
from mixtera_hpc.formats.codecs.shared_blocks import DecodedLines
from mixtera_hpc.formats.shard_errors import shard_changed_error

__all__ = ["CompressedJsonlFormat", "CompressedJsonlReader"]

Unpack = Callable[[Sequence[bytes]], list[Any]]


class CompressedJsonlFormat:
    """`Format` of compressed JSON lines. The codec makes the difference between the formats."""

    holds_tokens = False
    may_be_empty = False
    maps_files = False

    def __init__(self, name: str, codec: Codec) -> None:
        self.name = name
        self._codec = codec

    def units(self, path: Path, size_bytes: int) -> list[ScanUnit]:
        """Return the whole file as one unit: decoding can only begin at its start."""
        return [ScanUnit(0, size_bytes)] if size_bytes else []

    def scan(self, path: Path, unit: ScanUnit, spec: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
        """Read the rows of the file; `block_rows` is ignored, because the frames decide where blocks end."""
        batcher = JsonLineBatcher(spec, path)
        with path.open("rb") as file:
            segments = limit_block_bytes(self._segments(file, path), spec.max_block_bytes, path)
            block_start = 0
            rows = 0
            is_start = True
            for data, frame_end in join_whole_lines(segments):
                lines = batcher.decode(without_bom(data) if is_start else data)
                is_start = is_start and not data
                rows += len(lines.rows)
                # Frames without rows become part of the next block.
                ranges = []
                if frame_end is not None and rows > 0:
                    ranges.append((block_start, frame_end - block_start, rows))
                    block_start = frame_end
                    rows = 0
                # After a bad row, only look for more of them.
                if batcher.should_stop:
                    break
                if not batcher.failed:
                    yield batcher.batch(lines, BlockRanges.of(ranges), None)
        batcher.check()

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        """Open a shard for random access by block."""
        return CompressedJsonlReader(path, text, cache, self._codec)

    def _segments(self, file: BinaryIO, path: Path) -> Iterator[DecodedSegment]:
        """Decode the file. A block may end wherever a segment ends a frame."""
        return decode_frames(file, self._codec, path)


@dataclass(frozen=True, slots=True)
class _DecodedLines:
    """A decoded block."""

    data: bytes
    starts: NDArray[np.int64]
    """First byte of every row inside `data`."""
    ends: NDArray[np.int64]
    """End of every row inside `data`."""

    def without_starts(self) -> DecodedLines:
        """Return the lines for other processes. They do not need the starts."""
        return DecodedLines(self.data, self.ends)


class CompressedJsonlReader:
    """Decodes whole blocks into the cache and takes rows out of them."""

    def __init__(self, path: Path, text: str | None, cache: BlockCache, codec: Codec) -> None:
        self._path = path
        self._cache = cache
        self._max_block_bytes = cache.max_block_bytes
        self._codec = codec
        self.unpack_documents = _unpack_documents(text)
        """A function from lines to texts; the same one for all shards with the same path of the text."""
        self._shard = OpenShard(path)

    def documents(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[str]:
        """Return the texts of the named rows; see `ShardReader`."""
        return self._unpack(self.unpack_documents, block, rows)

    def payloads(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return the named rows as dicts; see `ShardReader`."""
        return self._unpack(decode_payloads, block, rows)

    def lines(self, block: BlockRef, rows: NDArray[np.int64]) -> list[bytes]:
        """Return the named rows as they are in the file, perhaps with white space around them."""
        shared = self._cache.shared
        if shared is not None:
            return shared.lines(str(self._path), block.offset, rows, lambda: self._decoded(block).without_starts())
        decoded = self._decoded(block)
        data = decoded.data
        places = zip(decoded.starts[rows].tolist(), decoded.ends[rows].tolist(), strict=True)
        return [data[start:stop] for start, stop in places]

    def close(self) -> None:
        """Release the file descriptor."""
        self._shard.close()

    def _unpack(self, unpack: Unpack, block: BlockRef, rows: NDArray[np.int64]) -> list[Any]:
        lines = self.lines(block, rows)
        try:
            return unpack(lines)
        except (*JSON_ERRORS, ValueError) as error:
            raise shard_changed_error(self._path, block, f"{error}") from None

    def _decoded(self, block: BlockRef) -> _DecodedLines:
        return self._cache.get((str(self._path), block.offset), lambda: self._load(block))

    def _load(self, block: BlockRef) -> tuple[_DecodedLines, int]:
        """Decode a block for the cache."""
        data = self._read_block(block)
        # The first block begins at the start of the file.
        if block.offset == 0:
            data = without_bom(data)
        ends = line_ends(data)
        # Rows are found by their position, so a block with other rows would return wrong ones.
        if len(ends) != block.rows:
            raise shard_changed_error(self._path, block, f"{block.rows} rows were expected, but it has {len(ends)}")
        starts = np.concatenate([[0], ends[:-1]])
        return _DecodedLines(data, starts, ends), len(data) + 2 * ends.nbytes

    def _read_block(self, block: BlockRef) -> bytes:
        """Return the decoded lines of a block."""
        compressed = read_fully(self._shard.fd, block.length, block.offset)
        segments = decode_frames(io.BytesIO(compressed), self._codec, self._path)
        return join_block(segments, block.offset, self._max_block_bytes, self._path)


@functools.cache
def _unpack_documents(text: str | None) -> Unpack:
    """Return the function that returns the texts of lines."""
    row_type = RowType(ScanSpec(text=text))
    decode = msgspec.json.Decoder(row_type.struct).decode
    # A loop, so that another thread can get the interpreter's lock after each row.
    return lambda lines: row_type.documents([decode(line) for line in lines])
