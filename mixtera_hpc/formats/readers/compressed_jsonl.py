"""JSON lines inside a compressed file, read as a stream and, later, block by block.

A block is a run of compressed frames (gzip: members) that ends where a line ends: with one frame per so many lines, as
`pzstd` or a careful writer makes them, that is every frame; a shard of a single frame is a single block. Rows inside a block
have no byte range of their own: reading one decodes its block, and the cache keeps it.
"""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.formats.base import (
    BlockRanges,
    BlockRef,
    RowBatch,
    ScanSpec,
    ScanUnit,
    ShardReader,
    open_shard,
    shard_changed,
)
from mixtera_hpc.formats.batching.json_lines import LineScanner, line_ends
from mixtera_hpc.formats.batching.row_type import RowType
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.frames import Codec, Piece, bounded, pieces_of, whole_lines
from mixtera_hpc.formats.codecs.positioned_reads import read_fully

__all__ = ["CompressedJsonlFormat", "CompressedJsonlReader"]


class CompressedJsonlFormat:
    """`Format` of compressed JSON lines; the codec makes the difference."""

    holds_tokens = False

    def __init__(self, name: str, codec: Codec) -> None:
        self.name = name
        self._codec = codec

    def units(self, path: Path, size_bytes: int) -> list[ScanUnit]:
        return [ScanUnit(0, size_bytes)] if size_bytes else []

    def scan(self, path: Path, unit: ScanUnit, fields: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
        scanner = LineScanner(fields, path)
        with path.open("rb") as file:
            start, rows = 0, 0
            pieces = bounded(self._pieces(file, path), fields.max_block_bytes, path)
            for data, end in whole_lines(pieces):
                lines = scanner.lines(data)
                rows += len(lines.rows)
                closes = end is not None and rows > 0
                blocks = BlockRanges.of([(start, end - start, rows)] if end is not None and closes else [])
                if scanner.has_enough:
                    break
                if not scanner.failed:
                    yield scanner.batch(lines, blocks, None)
                start, rows = (end, 0) if end is not None and closes else (start, rows)
        scanner.check()

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        return CompressedJsonlReader(path, text, cache, self._codec)

    def _pieces(self, file: BinaryIO, path: Path) -> Iterator[Piece]:
        """The decoded bytes; where a piece says that a frame ends, a block may."""
        return pieces_of(file, self._codec, path)


@dataclass(frozen=True, slots=True)
class _Block:
    data: memoryview
    ends: NDArray[np.int64]


class CompressedJsonlReader:
    """Decodes whole blocks into the cache and takes rows out of them."""

    def __init__(self, path: Path, text: str | None, cache: BlockCache, codec: Codec) -> None:
        self._path, self._cache, self._codec = path, cache, codec
        self._type = RowType(ScanSpec(text=text))
        self._decoder = msgspec.json.Decoder(self._type.struct)
        self._fd = open_shard(path)

    def documents(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[str]:
        return self._type.documents(self._decode(self._decoder, block, rows))

    def payloads(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        return self._decode(msgspec.json.Decoder(), block, rows)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _decode(self, decoder: "msgspec.json.Decoder[Any]", block: BlockRef, rows: NDArray[np.int64]) -> list[Any]:
        decoded = self._cache.get((str(self._path), block.offset), lambda: self._load(block))
        stops = decoded.ends[rows].tolist()
        starts = np.concatenate([[0], decoded.ends])[rows].tolist()
        try:
            return [decoder.decode(decoded.data[a:b]) for a, b in zip(starts, stops, strict=True)]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise shard_changed(self._path, block, f"{error}") from None

    def _load(self, block: BlockRef) -> tuple[_Block, int]:
        data = self._decoded(block)
        ends = line_ends(data)
        if len(ends) != block.rows:
            raise shard_changed(self._path, block, f"{block.rows} rows were expected, {len(ends)} are there")
        return _Block(memoryview(data), ends), len(data) + ends.nbytes

    def _decoded(self, block: BlockRef) -> bytes:
        """The lines of a block."""
        raw = read_fully(self._fd, block.length, block.offset)
        return b"".join(piece.data for piece in pieces_of(io.BytesIO(raw), self._codec, self._path))
