"""Seek points of gzip files: what is needed to begin decoding in the middle.

Every few megabytes of decoded text: where a deflate block begins, to the bit, and the 32 KiB before it that it may refer to. They
are found by `indexed_gzip` in a pass of its own (zlib's speed, once per shard and index) and kept in a file beside the index,
some 2 kB per decoded megabyte. Reading needs ISA-L alone: empty blocks fill the byte in the middle of which the block begins.

A shard is known by its size, its first bytes and its last, which hold the checksum of all that is in it: the points of a shard
serve every index and survive moves. Without them everything can still be read, at the price of decoding from the start.
"""

import hashlib
import io
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import zstandard
from isal import igzip_lib
from numpy.typing import NDArray

from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.formats.codecs.frames import damaged
from mixtera_hpc.formats.codecs.positioned_reads import read_fully

__all__ = ["SPACING_BYTES", "SeekPoints", "find_points", "seek_folder_of", "write_points"]

SPACING_BYTES = 4 << 20
WINDOW_BYTES = 32 << 10
_MAGIC = b"mixseek1"
_HEAD = struct.Struct("<8sII")
"""Magic, number of points, checksum of the table."""
_POINT = np.dtype([("at", "<u8"), ("bit", "<u8"), ("window", "<u8"), ("size", "<u4")])
"""Decoded position, position in the compressed file in bits, where the compressed window lies and how long it is (0: none)."""
_EXPORTED = struct.Struct("<5sBBQQIII")
_EXPORTED_POINT = np.dtype([("cmp", "<u8"), ("at", "<u8"), ("bits", "u1"), ("has_window", "u1")])
IDENTITY_BYTES = 64
_EMPTY_FIXED = 2, 10
"""A deflate block that says nothing, with the fixed codes, and how many bits it has; the lowest comes first (RFC 1951, 3.2.6)."""
_EMPTY_DYNAMIC = 0x46AFF90000000000081C004, 91
"""Another, with codes of its own (3.2.7): one bit each for literal 255, the end, and a distance. An odd number of bits."""


def seek_folder_of(index: str | Path) -> Path:
    """Where the seek points of the shards of an index are kept."""
    return Path(f"{index}.seek")


def write_points(shard: Path, folder: Path, spacing_bytes: int = SPACING_BYTES) -> Path:
    """Find the seek points of a gzip file that is known to be whole, and keep them in `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _name(shard)
        if not path.exists():
            _write(path, *_found(shard, spacing_bytes))
    except OSError as error:
        raise PropertyIndexError(
            f"The seek points of {shard} cannot be made in {folder}: {error.strerror or error}.\n  Make room, set index.path "
            "to another place, or do without them: index.seek_points=false."
        ) from None
    return path


def _write(path: Path, table: NDArray[Any], windows: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        file.write(_HEAD.pack(_MAGIC, len(table), _checksum(table)) + table.tobytes() + windows)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def find_points(shard: Path, folders: Sequence[Path]) -> "SeekPoints | None":
    """The seek points of a shard, from the first folder that has them whole; None where none has."""
    try:
        name = _name(shard) if any(folder.is_dir() for folder in folders) else ""
    except OSError:
        return None
    for folder in folders if name else ():
        try:
            return SeekPoints(folder / name)
        except (OSError, ValueError):
            continue
    return None


def _name(shard: Path) -> str:
    """What a shard's points are called, wherever it lies."""
    with shard.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        ends = os.pread(file.fileno(), IDENTITY_BYTES, 0), os.pread(file.fileno(), IDENTITY_BYTES, max(size - 64, 0))
    return hashlib.blake2b(b"%d " % size + b"".join(ends), digest_size=16).hexdigest() + ".seek"


def _checksum(table: NDArray[Any]) -> int:
    return int.from_bytes(hashlib.blake2b(table.tobytes(), digest_size=4).digest(), "little")


def _found(shard: Path, spacing_bytes: int) -> tuple[NDArray[Any], bytes]:
    """The table of points and their windows, compressed one by one."""
    import indexed_gzip

    exported = io.BytesIO()
    with indexed_gzip.IndexedGzipFile(str(shard), spacing=spacing_bytes, window_size=WINDOW_BYTES) as file:
        file.build_full_index()
        file.export_index(fileobj=exported)
    data = exported.getbuffer()
    _, _, _, _, _, _, window_bytes, count = _EXPORTED.unpack(data[: _EXPORTED.size])
    found = np.frombuffer(data, _EXPORTED_POINT, count, _EXPORTED.size)
    position = _EXPORTED.size + found.nbytes
    table, windows = np.zeros(count, _POINT), []
    table["at"], table["bit"] = found["at"], found["cmp"] * 8 - found["bits"]
    compress = zstandard.ZstdCompressor(level=9, write_checksum=True).compress
    for number in np.flatnonzero(found["has_window"]).tolist():
        windows.append(compress(data[position : position + window_bytes]))
        position += window_bytes
        table["size"][number] = len(windows[-1])
    table["window"] = _HEAD.size + table.nbytes + np.cumsum(table["size"]) - table["size"]
    return table, b"".join(windows)


class SeekPoints:
    """The points of one shard; the table is in memory, windows are read when they are needed."""

    def __init__(self, path: Path) -> None:
        """Read the table.

        Raises:
            OSError: there is no such file.
            ValueError: it is damaged.
        """
        with path.open("rb") as file:
            head = file.read(_HEAD.size)
            magic, count, checksum = _HEAD.unpack(head.ljust(_HEAD.size, b"\0"))
            self._table = np.frombuffer(file.read(count * _POINT.itemsize), _POINT)
        if magic != _MAGIC or not count or len(self._table) != count or _checksum(self._table) != checksum:
            raise ValueError("no seek points")
        self._path = path
        self._at: list[int] = self._table["at"].tolist()
        self._bit: list[int] = self._table["bit"].tolist()

    def read(self, fd: int, shard: Path, offset: int, size: int) -> bytes:
        """`size` decoded bytes from decoded position `offset`.

        Raises:
            DataError: the shard is damaged.
        """
        first = int(np.searchsorted(self._table["at"], offset, side="right")) - 1
        last = int(np.searchsorted(self._table["at"], offset + size, side="left"))
        try:
            decoded = [data for number in range(first, last) for data in self._segment(fd, number, offset + size)]
        except (cast("type[Exception]", igzip_lib.IsalError), zstandard.ZstdError, OSError, EOFError) as error:
            raise damaged(shard, f"{error}, between seek points {first} and {last}") from None
        data = b"".join(decoded)
        skip = offset - self._at[first]
        return data[skip : skip + size]

    def _segment(self, fd: int, number: int, stop: int) -> Iterator[bytes]:
        """Decode from one point to the next, or to `stop`."""
        is_last = number + 1 == len(self._at)
        end = stop if is_last else min(stop, self._at[number + 1])
        start_byte, bit = divmod(self._bit[number], 8)
        end_byte = os.fstat(fd).st_size if is_last else self._bit[number + 1] // 8 + 1
        raw = read_fully(fd, end_byte - start_byte, start_byte)
        decoder = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_DEFLATE, hist_bits=15, zdict=self._window(number))
        wanted = end - self._at[number]
        data = decoder.decompress(_filled(raw, bit), wanted)
        yield data
        while (wanted := wanted - len(data)) > 0:
            if decoder.eof or decoder.needs_input:
                raise EOFError("the file is not the one that was indexed")
            data = decoder.decompress(b"", wanted)
            yield data

    def _window(self, number: int) -> bytes:
        size = int(self._table["size"][number])
        if not size:
            return b""
        with self._path.open("rb") as file:
            data = os.pread(file.fileno(), size, int(self._table["window"][number]))
        return zstandard.decompress(data, max_output_size=WINDOW_BYTES)


def _filled(data: bytes, bit: int) -> bytes:
    """`data`, which begins with bit `bit` of its first byte, as a stream of its own: empty blocks end at that bit.

    Shifting it there instead would misplace stored blocks, whose content begins at a whole byte.
    """
    filler, size = _EMPTY_DYNAMIC if bit % 2 else (0, 0)
    while size % 8 != bit:
        filler, size = filler | _EMPTY_FIXED[0] << size, size + _EMPTY_FIXED[1]
    head = filler | data[0] >> bit << size
    return head.to_bytes(size // 8 + 1, "little") + data[1:]
