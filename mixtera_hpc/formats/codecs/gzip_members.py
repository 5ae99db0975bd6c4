"""Decode gzip members (RFC 1952) with ISA-L, and tell short members from long ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

from isal import igzip_lib

from mixtera_hpc.formats.codecs.frames import Codec, DecodedSegment, Decompressor

__all__ = ["GZIP", "IsalError", "first_member_exceeds", "mark_line_blocks"]

# Compressed bytes per read.
READ_BYTES = 64 << 10

# The library ships no type information.
IsalError = cast("type[Exception]", igzip_lib.IsalError)


def _start_member() -> Decompressor:
    decompressor: Decompressor = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
    return decompressor


GZIP = Codec(start=_start_member, errors=(IsalError, EOFError), padding=b"\0")
"""Zeros after a member are padding, as for the gzip program."""


def first_member_exceeds(path: Path, size_bytes: int) -> bool:
    """Return True if the first member decodes to more than `size_bytes`. Decodes that much of it; False if damaged."""
    decompressor = _start_member()
    size = 0
    try:
        with path.open("rb") as file:
            while size <= size_bytes and not decompressor.eof:
                data = file.read(READ_BYTES) if decompressor.needs_input else b""
                if not data and decompressor.needs_input:
                    return False
                size += len(decompressor.decompress(data, size_bytes + 1))
    except (OSError, EOFError, IsalError):
        return False
    return size > size_bytes


def mark_line_blocks(segments: Iterator[DecodedSegment], block_bytes: int) -> Iterator[DecodedSegment]:
    """Replace the frame ends by block ends: after at least `block_bytes` decoded bytes, at the next end of a line.

    The positions of these ends count decoded bytes, not compressed ones.
    """
    block_start = 0
    size = 0  # Decoded bytes since `block_start`.
    for segment in segments:
        data = segment.data
        size += len(data)
        # The block is full: cut it at the last line that ends in this segment, if one does.
        line_end = data.rfind(b"\n") + 1 if size >= block_bytes else 0
        if line_end:
            block_start += size - len(data) + line_end
            yield DecodedSegment(data[:line_end], block_start)
            data = data[line_end:]
            size = len(data)
        if data:
            yield DecodedSegment(data, None)
    # The last block, which may be shorter.
    if size:
        yield DecodedSegment(b"", block_start + size)
