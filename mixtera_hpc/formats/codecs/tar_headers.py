"""Where the members of a tar archive lie: headers only, nothing is extracted, no name is ever used as a path.

Understands ustar, GNU long names and sizes, and pax. `tarfile` takes twice as long for the headers alone as this for a scan with the
texts (bench/formats.py): it builds an object with twenty attributes per member.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mixtera_hpc.errors import DataError

__all__ = ["Member", "Read", "TarError", "members", "window"]

Read = Callable[[int, int], bytes]
"""(offset, size) → bytes, fewer at the end."""

SECTOR = 512
_ZEROS = bytes(SECTOR)
_FILES = b"0\0" + b"7"
_LONG_NAME, _PAX, _PAX_GLOBAL = b"L", b"x", b"g"
_WITHOUT_DATA = b"123456"
NEAR, FAR = 256 << 10, 4 << 10
"""Bytes read at once: among small members, and past large ones."""


class TarError(DataError):
    """An archive is damaged; the message says at which byte."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside an archive."""

    name: str
    data: int
    """Where its content begins."""
    size: int
    end: int
    """Where the next member begins."""


def window(fd: int) -> Read:
    """Reads of headers that mostly follow each other, few system calls."""
    start, held = 0, b""

    def read(offset: int, size: int) -> bytes:
        nonlocal start, held
        if not start <= offset or offset + size > start + len(held):
            ahead = FAR if offset - start - len(held) > NEAR // 8 else NEAR
            start, held = offset, os.pread(fd, max(size, ahead), offset)
        return held[offset - start : offset - start + size]

    return read


def members(read: Read, start: int, stop: int, *, to_end: bool) -> Iterator[Member]:
    """The regular files between two bytes of an archive; folders, links and devices are passed over.

    Archives that were put together with `cat` have end marks in between, which are passed over too.

    Args:
        to_end: whether the archive's end mark must come before `stop`.

    Raises:
        TarError: a header is no header, or the archive ends inside a member or without its end mark.
    """
    position, long_name, long_size, has_ended = start, None, None, False
    while position < stop:
        header = read(position, SECTOR)
        if header == _ZEROS[: len(header)]:
            has_ended, position = has_ended or header == _ZEROS, position + SECTOR
            continue
        has_ended = False
        name, size, kind = _parsed(header, position)
        size = long_size if long_size is not None and kind in _FILES else size
        data = position + SECTOR
        end = data + -(-size // SECTOR) * SECTOR
        if end > stop:
            raise TarError(f"it ends inside member {long_name or name!r}, which begins at byte {position}")
        if kind == _LONG_NAME:
            long_name = _text(read(data, size))
        elif kind in (_PAX, _PAX_GLOBAL):
            found = _pax(read(data, size), position) if kind == _PAX else {}
            long_name = found.get("path", long_name)
            long_size = _decimal(found["size"], position) if "size" in found else long_size
        else:
            if kind in _FILES:
                yield Member(long_name or name, data, size, end)
            long_name = long_size = None
        position = end
    if to_end and not has_ended:
        raise TarError(f"it ends at byte {stop} without an end mark: it was cut off")


def _parsed(header: bytes, position: int) -> tuple[str, int, bytes]:
    """Name, size and kind."""
    try:
        if len(header) < SECTOR or sum(header) - sum(header[148:156]) + 256 != _number(header[148:156]):
            raise ValueError
        kind = header[156:157]
        size = 0 if kind in _WITHOUT_DATA else _number(header[124:136])
        if size < 0:
            raise ValueError
    except ValueError:
        raise TarError(f"there is no valid header at byte {position}") from None
    name = header[:100]
    if header[257:263] == b"ustar\0" and header[345] != 0:
        name = header[345:500].rstrip(b"\0") + b"/" + name.rstrip(b"\0")
    return _text(name), size, kind


def _number(field: bytes) -> int:
    """Octal, or with the highest bit set big-endian."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    return int(digits, 8) if digits else 0


def _decimal(text: str, position: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise TarError(f"the extended header at byte {position} is damaged: size={text[:20]!r}")
    return int(text)


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _pax(data: bytes, position: int) -> dict[str, str]:
    """The records `length key=value`."""
    found = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            raise TarError(f"the extended header at byte {position} is damaged")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "backslashreplace")
        data = data[int(length) :].lstrip(b"\0")
    return found
