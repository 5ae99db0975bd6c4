"""JSON lines inside a compressed file, read as a stream and, later, block by block.

A block is a run of compressed frames (gzip: members) that ends where a line ends: with one frame per so many lines, as
`pzstd` or a careful writer makes them, that is every frame; a shard of a single frame is a single block. Rows inside a block
have no byte range of their own: reading one decodes its block, and the cache keeps it.
"""

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.cache import BlockCache
from mixtera_hpc.formats.fields import RowType
from mixtera_hpc.formats.format import Batch, BlockRef, Fields, Ranges, ShardReader, Unit, open_shard, shard_changed
from mixtera_hpc.formats.lines import LineScanner, line_ends

__all__ = ["Codec", "CompressedJsonl", "Decompressor"]

READ_BYTES = 256 << 10
PIECE_BYTES = 2 << 20


class Decompressor(Protocol):
    """Decodes one frame, as `bz2.BZ2Decompressor` does."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """How one compression is undone."""

    start: Callable[[], Decompressor]
    """A decompressor for the next frame."""
    errors: tuple[type[Exception], ...]
    """What it raises on bytes that are not its own."""
    padding: bytes = b""
    """Bytes that may stand between and after frames, meaning nothing."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some decoded bytes."""

    data: bytes
    frame_end: int | None
    """Compressed position, when a frame ends with this data."""


class CompressedJsonl:
    """`Format` of compressed JSON lines; the codec makes the difference."""

    holds_tokens = False

    def __init__(self, name: str, codec: Codec) -> None:
        self.name = name
        self._codec = codec

    def units(self, path: Path, size_bytes: int) -> list[Unit]:
        return [Unit(0, size_bytes)] if size_bytes else []

    def scan(self, path: Path, unit: Unit, fields: Fields, block_rows: int) -> Iterator[Batch]:
        scanner = LineScanner(fields, path)
        with path.open("rb") as file:
            start, rows = 0, 0
            pieces = _bounded(_pieces(file, self._codec, path), fields.max_block_bytes, path)
            for data, end in _whole_lines(pieces):
                lines = scanner.lines(data)
                rows += len(lines.rows)
                closes = end is not None and rows > 0
                blocks = Ranges.of([(start, end - start, rows)] if end is not None and closes else [])
                if scanner.has_enough:
                    break
                if not scanner.failed:
                    yield scanner.batch(lines, blocks, None)
                start, rows = (end, 0) if end is not None and closes else (start, rows)
        scanner.check()

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        return _Reader(path, text, cache, self._codec)


def _bounded(pieces: Iterator[_Piece], limit: int, path: Path) -> Iterator[_Piece]:
    """Refuse a run of bytes that can only be decoded as a whole, and is too long for it."""
    size, start = 0, 0
    for piece in pieces:
        size += len(piece.data)
        if size > limit:
            raise DataError(
                f"{path}: what begins at byte {start} decodes to more than data.max_block_bytes={limit}, and none of it can be "
                "read without the rest.\n"
                "  Compress it in frames that end with a line (docs/formats.md has the command), or raise data.max_block_bytes."
            )
        yield piece
        if piece.frame_end is not None and piece.data.endswith(b"\n"):
            size, start = 0, piece.frame_end


def _whole_lines(pieces: Iterator[_Piece]) -> Iterator[tuple[bytes, int | None]]:
    """Buffers of whole lines, and the compressed position after each where it ends a frame as well."""
    held: list[bytes] = []
    size, end, has_line = 0, 0, False
    for piece in pieces:
        held.append(piece.data)
        size += len(piece.data)
        has_line = has_line or b"\n" in piece.data
        end = piece.frame_end if piece.frame_end is not None else end
        if piece.frame_end is None and (size < PIECE_BYTES or not has_line):
            continue
        data = b"".join(held)
        cut = data.rfind(b"\n") + 1
        complete = cut == len(data) and piece.frame_end is not None
        held, size, has_line = [data[cut:]], len(data) - cut, False
        if cut or complete:
            yield data[:cut], piece.frame_end if complete else None
    if size:
        yield b"".join(held), end


def _pieces(file: BinaryIO, codec: Codec, path: Path) -> Iterator[_Piece]:
    """Decode a file frame after frame, some bytes at a time.

    Raises:
        DataError: it is damaged, or ends inside a frame.
    """
    position, data = 0, b""
    while data := _skip_padding(file, data, codec.padding):
        frame = codec.start()
        while True:
            try:
                decoded = frame.decompress(data, PIECE_BYTES)
            except codec.errors as error:
                raise _damaged(path, f"{error}, near byte {position}") from None
            if frame.eof:
                break
            yield _Piece(decoded, None)
            data = file.read(READ_BYTES) if frame.needs_input else b""
            if not data and frame.needs_input:
                raise _damaged(path, "it ends inside a compressed frame")
        position = file.tell() - len(frame.unused_data)
        yield _Piece(decoded, position)
        data = frame.unused_data


def _skip_padding(file: BinaryIO, data: bytes, padding: bytes) -> bytes:
    """The next bytes that mean something; empty at the end of the file."""
    while True:
        data = data.lstrip(padding) if padding else data
        if data or not (data := file.read(READ_BYTES)):
            return data


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(
        f"{path} cannot be decompressed: {problem}.\n  Copy or download it again, or leave it out with data.exclude."
    )


@dataclass(frozen=True, slots=True)
class _Block:
    data: memoryview
    ends: NDArray[np.int64]


class _Reader:
    """Decodes whole blocks into the cache and takes rows out of them."""

    def __init__(self, path: Path, text: str | None, cache: BlockCache, codec: Codec) -> None:
        self._path, self._cache, self._codec = path, cache, codec
        self._type = RowType(Fields(text=text))
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
        raw = os.pread(self._fd, block.length, block.offset)
        data = b"".join(piece.data for piece in _pieces(io.BytesIO(raw), self._codec, self._path))
        ends = line_ends(data)
        if len(ends) != block.rows:
            raise shard_changed(self._path, block, f"{block.rows} rows were expected, {len(ends)} are there")
        return _Block(memoryview(data), ends), len(data) + ends.nbytes
