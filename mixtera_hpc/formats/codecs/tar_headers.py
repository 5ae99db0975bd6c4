"""Read the headers of a tar archive. Nothing is extracted, and no name is ever used as a path.

Understands ustar and pax (POSIX.1-2017, `pax`, sections "ustar Interchange Format" and "pax Extended Header") and GNU
long names and sizes. `tarfile` needs twice as long for the headers alone as this module for a scan with the texts
(bench/formats.py), because it builds an object with twenty attributes per member.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mixtera_hpc.errors import DataError

__all__ = ["ReadBytes", "TarError", "TarMember", "buffered_reads", "iter_members"]

ReadBytes = Callable[[int, int], bytes]
"""(offset, size) → bytes; fewer at the end of the archive."""

# Headers and contents begin at multiples of this many bytes.
SECTOR = 512
# Bytes per read while members are small: one read serves many headers.
READ_AHEAD_BYTES = 256 << 10
# Bytes per read after a large member, whose content is skipped.
HEADER_READ_BYTES = 4 << 10

_ZERO_SECTOR = bytes(SECTOR)

# Types of members (header byte 156).
_REGULAR_FILES = (b"0", b"\0", b"7")
_GNU_LONG_NAME = b"L"
_PAX_HEADER = b"x"
_PAX_GLOBAL_HEADER = b"g"
# Links, devices, folders and pipes. Their size field does not count.
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")


class TarError(DataError):
    """An archive is damaged. The message names the byte."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """A regular file inside an archive."""

    name: str
    data: int
    """First byte of the content."""
    size: int
    end: int
    """First byte of the next member's header."""


@dataclass(frozen=True, slots=True)
class _MemberOverride:
    """Values of GNU and pax headers for the member that follows; None leaves the member's own header in force."""

    name: str | None = None
    size: int | None = None


_NO_OVERRIDE = _MemberOverride()
MAX_OVERRIDE_BYTES = 1 << 20
"""Largest extended header that is read: names have 4,096 bytes at most on Linux."""
MAX_LENGTH_DIGITS = len(str(MAX_OVERRIDE_BYTES))


def buffered_reads(fd: int) -> ReadBytes:
    """Return a function that reads from `fd` through a buffer: headers near each other cost one system call."""
    start = 0
    buffer = b""

    def read(offset: int, size: int) -> bytes:
        nonlocal start, buffer
        if offset < start or offset + size > start + len(buffer):
            # A jump over a large content: the bytes after this header are probably content as well.
            jump = offset - start - len(buffer)
            ahead = HEADER_READ_BYTES if jump > READ_AHEAD_BYTES // 8 else READ_AHEAD_BYTES
            buffer = os.pread(fd, max(size, ahead), offset)
            start = offset
        return buffer[offset - start : offset - start + size]

    return read


def iter_members(read: ReadBytes, start: int, stop: int, *, to_end: bool) -> Iterator[TarMember]:
    """Yield the regular files between bytes `start` and `stop` of an archive; skip folders, links and devices.

    End marks (zeros) in the middle, as `cat` leaves them between archives, are skipped. With `to_end`, the archive's
    end mark must come before `stop`.

    Raises:
        TarError: a header is invalid, or the archive ends inside a member or without its end mark.
    """
    position = start
    has_ended = False
    override = _NO_OVERRIDE
    while position < stop:
        header = read(position, SECTOR)
        # An end mark, or a part of one at the end of a truncated file.
        if header == _ZERO_SECTOR[: len(header)]:
            has_ended = has_ended or header == _ZERO_SECTOR
            position += SECTOR
            continue
        has_ended = False

        name, size, kind = _parse_header(header, position)
        if override.size is not None and kind in _REGULAR_FILES:
            size = override.size
        data = position + SECTOR
        end = data + -(-size // SECTOR) * SECTOR  # The content is padded to whole sectors.
        if end > stop:
            raise TarError(f"it ends inside member {override.name or name!r}, which begins at byte {position}")

        if kind in (_GNU_LONG_NAME, _PAX_HEADER):
            if size > MAX_OVERRIDE_BYTES:
                raise TarError(
                    f"the extended header at byte {position} has {size} bytes, and a name is never that long"
                )
            override = _parse_override(kind, read(data, size), position, override)
        elif kind != _PAX_GLOBAL_HEADER:
            # An override applies to one member of any type.
            if kind in _REGULAR_FILES:
                yield TarMember(override.name or name, data, size, end)
            override = _NO_OVERRIDE
        position = end

    if to_end and not has_ended:
        raise TarError(f"it ends at byte {stop} without an end mark: it was cut off")


def _parse_header(header: bytes, position: int) -> tuple[str, int, bytes]:
    """Return the name, size and type of a ustar header.

    Fields: name (byte 0, 100 bytes), size (124, 12), checksum (148, 8), type (156, 1), magic (257, 6), name prefix
    (345, 155).
    """
    try:
        # The checksum is the sum of all bytes, with its own field taken as eight spaces (8 * 32 = 256).
        checksum = sum(header) - sum(header[148:156]) + 256
        if len(header) < SECTOR or checksum != _parse_number(header[148:156]):
            raise ValueError
        kind = header[156:157]
        size = 0 if kind in _WITHOUT_CONTENT else _parse_number(header[124:136])
        if size < 0:
            raise ValueError
    except ValueError:
        raise TarError(f"there is no valid header at byte {position}") from None

    # The prefix field has the leading folders of names of more than 100 bytes. GNU's own magic (`ustar  `) has other
    # fields there.
    name = header[:100]
    if header[257:263] == b"ustar\0" and header[345] != 0:
        name = header[345:500].rstrip(b"\0") + b"/" + name.rstrip(b"\0")
    return _text(name), size, kind


def _parse_number(field: bytes) -> int:
    """Parse octal digits, or a big-endian integer if the highest bit is set (GNU "base-256")."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    # Digits end with a NUL or a space, and some writers pad them with spaces.
    digits = field.split(b"\0", 1)[0].strip()
    return int(digits, 8) if digits else 0


def _parse_decimal(text: str, position: int) -> int:
    # `int` alone would accept signs, underscores and digits of other scripts.
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise TarError(f"the extended header at byte {position} is damaged: size={text[:20]!r}")
    return int(text)


def _text(data: bytes) -> str:
    """Decode a name that ends at the first NUL."""
    return data.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _parse_override(kind: bytes, data: bytes, position: int, override: _MemberOverride) -> _MemberOverride:
    """Return `override` with the name and the size that an extended header has; one header may follow another."""
    if kind == _GNU_LONG_NAME:
        return _MemberOverride(_text(data), override.size)
    records = _parse_pax(data, position)
    name = records.get("path", override.name)
    size = _parse_decimal(records["size"], position) if "size" in records else override.size
    return _MemberOverride(name, size)


def _parse_pax(data: bytes, position: int) -> dict[str, str]:
    """Parse the records of a pax header: length in decimal, space, KEY=VALUE, newline. The length counts it all."""
    records = {}
    start = 0
    while start < len(data):
        # Zeros may follow a record.
        if data[start] == 0:
            start += 1
            continue
        digits = data[start : start + MAX_LENGTH_DIGITS + 1].partition(b" ")[0]
        end = start + int(digits) if digits.isdigit() else start
        if not start < end <= len(data):
            raise TarError(f"the extended header at byte {position} is damaged")
        # Skip the length and its space; leave out the newline at the end.
        key, _, value = data[start + len(digits) + 1 : end - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "backslashreplace")
        start = end
    return records
