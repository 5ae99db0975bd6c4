"""Where the blocks of an `.xz` file lie: its own index says so, and each can be decoded alone.

`xz -T` and `pixz` write many (24 MiB of text each by default), `xz` of one thread a single one. A block becomes a stream of its own
between a made-up header and footer, so liblzma checks its checksum as always. Follows the .xz format specification 1.2.
"""

import lzma
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.codecs.frames import PIECE_BYTES, Piece, damaged
from mixtera_hpc.formats.codecs.positioned_reads import read_fully

__all__ = ["XzBlock", "decoded", "xz_blocks"]

MAX_DICTIONARY_BYTES = 1 << 30
READ_BYTES = 256 << 10
_MAGIC, _FOOTER_MAGIC = b"\xfd7zXZ\0", b"YZ"
_ENDS = 12
"""Bytes of a stream's header, and of its footer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class XzBlock:
    """One block."""

    begin: int
    end: int
    unpadded_bytes: int
    decoded_bytes: int
    flags: bytes
    """Of the stream; they name the checksum."""


def xz_blocks(fd: int, path: Path) -> list[XzBlock]:
    """Every block of a file, from the indexes at the ends of its streams.

    Raises:
        DataError: the file is damaged or cut off.
    """
    stop, found = os.fstat(fd).st_size, []
    while stop := _without_padding(fd, stop):
        try:
            stop, blocks = _stream(fd, stop)
        except (ValueError, IndexError):
            raise _cut_off(path, stop) from None
        found.append(blocks)
    return [block for blocks in reversed(found) for block in blocks]


def _cut_off(path: Path, stop: int) -> DataError:
    return damaged(
        path, f"it is cut off or ends inside a compressed frame; no stream ends at byte {stop}, near byte {stop}"
    )


def _without_padding(fd: int, stop: int) -> int:
    while stop >= 4 and read_fully(fd, 4, stop - 4) == bytes(4):
        stop -= 4
    return stop


def _stream(fd: int, stop: int) -> tuple[int, list[XzBlock]]:
    """Where the stream begins that ends at `stop`, and its blocks."""
    footer = read_fully(fd, _ENDS, stop - _ENDS) if stop >= 2 * _ENDS else b""
    if footer[10:] != _FOOTER_MAGIC or zlib.crc32(footer[4:10]) != int.from_bytes(footer[:4], "little"):
        raise ValueError
    index_bytes, flags = 4 * (int.from_bytes(footer[4:8], "little") + 1), footer[8:10]
    index = read_fully(fd, index_bytes, stop - _ENDS - index_bytes) if index_bytes <= stop - 2 * _ENDS else b""
    if len(index) < 8 or zlib.crc32(index[:-4]) != int.from_bytes(index[-4:], "little") or index[0]:
        raise ValueError
    sizes = _records(index)
    begin = stop - _ENDS - index_bytes - sum(_padded(unpadded) for unpadded, _ in sizes) - _ENDS
    if begin < 0 or read_fully(fd, 8, begin) != _MAGIC + flags:
        raise ValueError
    blocks, position = [], begin + _ENDS
    for unpadded, size in sizes:
        end = position + _padded(unpadded)
        block = XzBlock(begin=position, end=end, unpadded_bytes=unpadded, decoded_bytes=size, flags=flags)
        blocks.append(block)
        position = end
    return begin, blocks


def _padded(size: int) -> int:
    return -(-size // 4) * 4


def _records(index: bytes) -> list[tuple[int, int]]:
    """Unpadded and decoded bytes of every block."""
    count, position = _number(index, 1)
    found = []
    for _ in range(count):
        unpadded, position = _number(index, position)
        size, position = _number(index, position)
        found.append((unpadded, size))
    return found


def _number(data: bytes, position: int) -> tuple[int, int]:
    """A variable-length integer, and where the next begins."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if not byte & 0x80:
            return value, position


def _encoded(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def decoded(fd: int, blocks: list[XzBlock], path: Path) -> Iterator[Piece]:
    """The decoded bytes of blocks, some at a time; every block ends a frame.

    Raises:
        DataError: a block is damaged.
    """
    for block in blocks:
        decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_DICTIONARY_BYTES)
        try:
            for data in _as_stream(fd, block):
                yield Piece(decoder.decompress(data, PIECE_BYTES), None)
                while not decoder.eof and not decoder.needs_input:
                    yield Piece(decoder.decompress(b"", PIECE_BYTES), None)
        except (lzma.LZMAError, EOFError) as error:
            raise damaged(path, f"{error}, near byte {block.begin}") from None
        if not decoder.eof:
            raise damaged(path, f"it ends inside a compressed frame, near byte {block.begin}")
        yield Piece(b"", block.end)


def _as_stream(fd: int, block: XzBlock) -> Iterator[bytes]:
    """A whole stream that has this block alone."""
    yield _MAGIC + block.flags + zlib.crc32(block.flags).to_bytes(4, "little")
    for position in range(block.begin, block.end, READ_BYTES):
        yield read_fully(fd, min(READ_BYTES, block.end - position), position)
    index = b"\0\1" + _encoded(block.unpadded_bytes) + _encoded(block.decoded_bytes)
    index += bytes(-len(index) % 4)
    index += zlib.crc32(index).to_bytes(4, "little")
    ending = (len(index) // 4 - 1).to_bytes(4, "little") + block.flags
    yield index + zlib.crc32(ending).to_bytes(4, "little") + ending + _FOOTER_MAGIC
