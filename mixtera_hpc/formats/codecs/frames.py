"""Compressed files as runs of decoded bytes, frame after frame, never more in memory than a piece and the longest line."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from mixtera_hpc.errors import DataError

__all__ = ["PIECE_BYTES", "Codec", "Decompressor", "Piece", "bounded", "damaged", "pieces_of", "whole_lines"]

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
class Piece:
    """Some decoded bytes."""

    data: bytes
    frame_end: int | None
    """Compressed position, when a frame ends with this data."""


def bounded(pieces: Iterator[Piece], limit: int, path: Path) -> Iterator[Piece]:
    """Refuse a run of bytes that can only be decoded as a whole, and is too long for it."""
    size, start, ends_line = 0, 0, True
    for piece in pieces:
        size += len(piece.data)
        ends_line = piece.data.endswith(b"\n") if piece.data else ends_line
        if size > limit:
            raise DataError(
                f"{path}: what begins at byte {start} decodes to more than data.max_block_bytes={limit}, and none of it can be "
                "read without the rest.\n"
                "  Compress it in frames that end with a line (docs/formats.md has the command), or raise data.max_block_bytes."
            )
        yield piece
        if piece.frame_end is not None and ends_line:
            size, start = 0, piece.frame_end


def whole_lines(pieces: Iterator[Piece]) -> Iterator[tuple[bytes, int | None]]:
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


def pieces_of(file: BinaryIO, codec: Codec, path: Path) -> Iterator[Piece]:
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
                raise damaged(path, f"{error}, near byte {position}") from None
            if frame.eof:
                break
            yield Piece(decoded, None)
            data = file.read(READ_BYTES) if frame.needs_input else b""
            if not data and frame.needs_input:
                raise damaged(path, "it ends inside a compressed frame")
        position = file.tell() - len(frame.unused_data)
        yield Piece(decoded, position)
        data = frame.unused_data


def _skip_padding(file: BinaryIO, data: bytes, padding: bytes) -> bytes:
    """The next bytes that mean something; empty at the end of the file."""
    while True:
        data = data.lstrip(padding) if padding else data
        if data or not (data := file.read(READ_BYTES)):
            return data


def damaged(path: Path, problem: str) -> DataError:
    """The error for a file that cannot be decompressed."""
    return DataError(
        f"{path} cannot be decompressed: {problem}.\n  Copy or download it again, or leave it out with data.exclude."
    )
