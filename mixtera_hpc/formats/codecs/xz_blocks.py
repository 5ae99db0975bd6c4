"""List the blocks of an `.xz` file from its own index, and decode each block alone.

`xz -T` and `pixz` write many blocks (24 MiB of text each by default), `xz` with one thread writes a single one. To
decode a block, it is put between a stream header, an index and a footer made for it, so that liblzma verifies its
checksum as usual. References are to the .xz file format specification, version 1.2.1 (https://xz.tukaani.org/format).
"""

import lzma
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.codecs.frames import SEGMENT_BYTES, DecodedSegment
from mixtera_hpc.formats.codecs.positioned_reads import read_fully
from mixtera_hpc.formats.codecs.varints import encode_varint, read_varint
from mixtera_hpc.formats.shard_errors import decompression_error

__all__ = ["XzBlock", "decode_blocks", "list_blocks"]

# Memory limit of a decoder, which holds the dictionary of a block (`xz -9` uses 64 MiB).
MAX_DICTIONARY_BYTES = 1 << 30
# Compressed bytes per read.
READ_BYTES = 256 << 10

_HEADER_MAGIC = b"\xfd7zXZ\0"
_FOOTER_MAGIC = b"YZ"
# Stream header (section 2.1.1): magic (6), flags (2), CRC32 of the flags (4).
_HEADER_BYTES = 12
# Stream footer (section 2.1.2): CRC32 (4) of the next two fields, backward size (4), flags (2), magic (2).
_FOOTER_BYTES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class XzBlock:
    """One block of a stream."""

    begin: int
    end: int
    """Compressed positions, padding included."""
    unpadded_bytes: int
    decoded_bytes: int
    flags: bytes
    """Flags of the stream, which name the type of the checksum."""


def list_blocks(fd: int, path: Path) -> list[XzBlock]:
    """Return every block of a file. Streams are read backwards, because the index stands at the end of each.

    Raises:
        DataError: the file is damaged or cut off.
    """
    stop = os.fstat(fd).st_size
    per_stream: list[list[XzBlock]] = []
    while stop := _without_padding(fd, stop):
        try:
            # The stream before this one ends where this one begins.
            stop, blocks = _read_stream(fd, stop)
        except (ValueError, IndexError):
            raise _cut_off_error(path, stop) from None
        per_stream.append(blocks)
    return [block for blocks in reversed(per_stream) for block in blocks]


def _cut_off_error(path: Path, stop: int) -> DataError:
    problem = f"it is cut off or ends inside a compressed frame; no stream ends at byte {stop}, near byte {stop}"
    return decompression_error(path, problem)


def _without_padding(fd: int, stop: int) -> int:
    """Return the position before any stream padding (section 2.2): zeros, four at a time."""
    read_bytes = 16
    while stop >= 4:
        # A file that was only allocated ends with any number of zeros, so the reads become longer.
        size = min(read_bytes, stop // 4 * 4)
        read_bytes = min(4 * read_bytes, READ_BYTES)
        content = len(read_fully(fd, size, stop - size).rstrip(b"\0"))
        if content:
            return stop - (size - content) // 4 * 4
        stop -= size
    return stop


def _read_stream(fd: int, stop: int) -> tuple[int, list[XzBlock]]:
    """Return the first byte and the blocks of the stream that ends at `stop`.

    Raises:
        ValueError: no valid stream ends there.
        IndexError: its index is truncated.
    """
    index_bytes, flags = _read_footer(fd, stop)
    index_start = stop - _FOOTER_BYTES - index_bytes
    sizes = _read_index(fd, index_start, index_bytes)

    # The blocks lie directly before the index, the stream header before the first of them.
    begin = index_start - sum(_padded(unpadded) for unpadded, _ in sizes) - _HEADER_BYTES
    if begin < 0 or read_fully(fd, 8, begin) != _HEADER_MAGIC + flags:
        raise ValueError

    blocks = []
    position = begin + _HEADER_BYTES
    for unpadded, size in sizes:
        end = position + _padded(unpadded)
        block = XzBlock(begin=position, end=end, unpadded_bytes=unpadded, decoded_bytes=size, flags=flags)
        blocks.append(block)
        position = end
    return begin, blocks


def _read_footer(fd: int, stop: int) -> tuple[int, bytes]:
    """Return the size of the index and the flags of the stream that ends at `stop` (section 2.1.2)."""
    if stop < _HEADER_BYTES + _FOOTER_BYTES:
        raise ValueError
    footer = read_fully(fd, _FOOTER_BYTES, stop - _FOOTER_BYTES)
    checksum = int.from_bytes(footer[:4], "little")
    if footer[10:] != _FOOTER_MAGIC or zlib.crc32(footer[4:10]) != checksum:
        raise ValueError

    # The backward size is stored in units of four bytes, less one.
    index_bytes = 4 * (int.from_bytes(footer[4:8], "little") + 1)
    if index_bytes > stop - _HEADER_BYTES - _FOOTER_BYTES:
        raise ValueError
    return index_bytes, footer[8:10]


def _read_index(fd: int, start: int, size: int) -> list[tuple[int, int]]:
    """Return the unpadded and decoded bytes of every block.

    The index (section 4): indicator 0 (1 byte), number of records, the records, padding, CRC32 (4 bytes).
    """
    index = read_fully(fd, size, start)
    if len(index) < 8 or index[0] != 0 or zlib.crc32(index[:-4]) != int.from_bytes(index[-4:], "little"):
        raise ValueError

    # Skip the indicator byte; the checksum has shown that the records are complete.
    count, position = read_varint(index, 1)
    records = []
    for _ in range(count):
        unpadded, position = read_varint(index, position)
        decoded, position = read_varint(index, position)
        records.append((unpadded, decoded))
    return records


def _padded(size: int) -> int:
    """Round up to a multiple of four bytes."""
    return -(-size // 4) * 4


def decode_blocks(fd: int, blocks: list[XzBlock], path: Path) -> Iterator[DecodedSegment]:
    """Decode blocks segment by segment. Every block ends a frame.

    Raises:
        DataError: a block is damaged.
    """
    for block in blocks:
        decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_DICTIONARY_BYTES)
        try:
            for data in _as_stream(fd, block):
                yield DecodedSegment(decoder.decompress(data, SEGMENT_BYTES), None)
                # The decoder may have more output than one segment for the bytes it got.
                while not decoder.eof and not decoder.needs_input:
                    yield DecodedSegment(decoder.decompress(b"", SEGMENT_BYTES), None)
        except (lzma.LZMAError, EOFError) as error:
            raise decompression_error(path, f"{error}, near byte {block.begin}") from None
        if not decoder.eof:
            raise decompression_error(path, f"it ends inside a compressed frame, near byte {block.begin}")
        yield DecodedSegment(b"", block.end)


def _as_stream(fd: int, block: XzBlock) -> Iterator[bytes]:
    """Yield the bytes of a whole stream that contains only this block."""
    # Stream header; the flags select the checksum that the block itself carries.
    yield _HEADER_MAGIC + block.flags + zlib.crc32(block.flags).to_bytes(4, "little")

    for position in range(block.begin, block.end, READ_BYTES):
        yield read_fully(fd, min(READ_BYTES, block.end - position), position)

    # Indicator 0, one record, padding to four bytes, checksum.
    index = b"\0\1" + encode_varint(block.unpadded_bytes) + encode_varint(block.decoded_bytes)
    index += bytes(-len(index) % 4)
    index += zlib.crc32(index).to_bytes(4, "little")
    yield index

    # Stream footer, which gives the size of the index in units of four bytes, less one.
    backward_size = (len(index) // 4 - 1).to_bytes(4, "little")
    footer = backward_size + block.flags
    yield zlib.crc32(footer).to_bytes(4, "little") + footer + _FOOTER_MAGIC
