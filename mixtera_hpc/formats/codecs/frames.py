"""Decode a compressed file frame after frame, as a stream of bounded segments.

A frame is what the compression can decode on its own: a gzip member, a Zstandard frame, a bzip2 stream, an xz block.
Memory holds one segment and the longest line, regardless of the size of the file.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.shard_errors import decompression_error

__all__ = [
    "SEGMENT_BYTES",
    "Codec",
    "DecodedSegment",
    "Decompressor",
    "block_too_large_error",
    "decode_frames",
    "join_block",
    "join_whole_lines",
    "limit_block_bytes",
]

# Compressed bytes per read.
READ_BYTES = 256 << 10
SEGMENT_BYTES = 2 << 20
"""Most decoded bytes that a decompressor returns at once."""


class Decompressor(Protocol):
    """Decodes one frame; the interface of `bz2.BZ2Decompressor` and `lzma.LZMADecompressor`."""

    @property
    def eof(self) -> bool:
        """True after the end of the frame."""
        ...

    @property
    def unused_data(self) -> bytes:
        """Input bytes after the end of the frame."""
        ...

    @property
    def needs_input(self) -> bool:
        """False if more output is available without more input."""
        ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        """Decode `data` and return about `max_length` bytes at most."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """Decoder of one kind of compression."""

    start: Callable[[], Decompressor]
    """Creates the decompressor of the next frame."""
    errors: tuple[type[Exception], ...]
    """The exceptions that a decompressor raises on invalid input."""
    padding: bytes = b""
    """Bytes that may stand between and after frames without a meaning."""


@dataclass(frozen=True, slots=True)
class DecodedSegment:
    """Consecutive decoded bytes."""

    data: bytes
    frame_end: int | None
    """Compressed position of the frame's end if `data` ends a frame."""


def decode_frames(file: BinaryIO, codec: Codec, path: Path) -> Iterator[DecodedSegment]:
    """Decode a file frame after frame.

    Raises:
        DataError: the file is damaged, or ends inside a frame.
    """
    position = 0
    data = b""
    while data := _skip_padding(file, data, codec.padding):
        # One frame: the decompressor says when it has reached its end, and keeps the bytes behind it.
        frame = codec.start()
        while True:
            try:
                decoded = frame.decompress(data, SEGMENT_BYTES)
            except codec.errors as error:
                raise decompression_error(path, f"{error}, near byte {position}") from None
            if frame.eof:
                break
            yield DecodedSegment(decoded, None)

            # A decompressor that has more output for the bytes it got is called again without new ones.
            data = file.read(READ_BYTES) if frame.needs_input else b""
            if not data and frame.needs_input:
                raise decompression_error(path, "it ends inside a compressed frame")

        # The next frame begins with the bytes that this one did not use.
        data = frame.unused_data
        position = file.tell() - len(data)
        yield DecodedSegment(decoded, position)


def _skip_padding(file: BinaryIO, data: bytes, padding: bytes) -> bytes:
    """Return the next bytes after any padding; empty at the end of the file."""
    while True:
        data = data.lstrip(padding) if padding else data
        if data:
            return data
        data = file.read(READ_BYTES)
        if not data:
            return data


def limit_block_bytes(segments: Iterator[DecodedSegment], limit: int, path: Path) -> Iterator[DecodedSegment]:
    """Pass segments on, and refuse a block that decodes to more than `limit` bytes.

    A block ends where a frame ends together with a line.

    Raises:
        DataError: a block is too large.
    """
    size = 0
    start = 0
    ends_line = True
    for segment in segments:
        size += len(segment.data)
        if segment.data:
            ends_line = segment.data.endswith(b"\n")
        if size > limit:
            raise block_too_large_error(path, start, limit)
        yield segment

        # A block ends here: the next one starts with nothing in memory.
        if segment.frame_end is not None and ends_line:
            size = 0
            start = segment.frame_end


def join_block(segments: Iterator[DecodedSegment], start: int, limit: int, path: Path) -> bytes:
    """Return the decoded bytes of the block that begins at byte `start`.

    Raises:
        DataError: it decodes to more than `limit` bytes.
    """
    parts = []
    size = 0
    for segment in segments:
        size += len(segment.data)
        if size > limit:
            raise block_too_large_error(path, start, limit)
        parts.append(segment.data)
    return b"".join(parts)


def block_too_large_error(path: Path, start: int, limit: int) -> DataError:
    """Return the error for a block that decodes to more than `limit` bytes."""
    return DataError(
        f"{path}: the block that begins at byte {start} decodes to more than data.max_block_bytes={limit}, and "
        "it can only be read as a whole.\n"
        "  Compress it in frames that end with a line (docs/formats.md has the command), or raise "
        "data.max_block_bytes."
    )


def join_whole_lines(segments: Iterator[DecodedSegment]) -> Iterator[tuple[bytes, int | None]]:
    """Join segments into buffers of whole lines.

    Yields:
        (lines, frame end): the compressed position after the lines if a frame ends there as well, else None.
    """
    pending: list[bytes] = []
    size = 0
    has_line = False
    last_frame_end = 0
    for segment in segments:
        pending.append(segment.data)
        size += len(segment.data)
        has_line = has_line or b"\n" in segment.data
        ends_frame = segment.frame_end is not None
        if segment.frame_end is not None:
            last_frame_end = segment.frame_end
        # A line of many frames is joined once, at its end.
        if size and not has_line:
            continue
        # Collect more until there is a buffer worth decoding. A frame end is always handed on: a block may end there.
        if not ends_frame and size < SEGMENT_BYTES:
            continue

        # Hand on everything up to the last newline; the rest begins the next buffer.
        data = b"".join(pending)
        line_end = data.rfind(b"\n") + 1
        ends_both = ends_frame and line_end == len(data)
        pending = [data[line_end:]]
        size = len(data) - line_end
        has_line = False
        if line_end or ends_both:
            yield data[:line_end], segment.frame_end if ends_both else None

    # The last line of a file may lack its newline.
    if size:
        yield b"".join(pending), last_frame_end
