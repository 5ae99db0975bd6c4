"""Seek points of gzip files: what is needed to begin decoding in the middle of a long member.

A seek point is the position, to the bit, where a deflate block begins, and the 32 KiB of decoded text before it, which
the block may refer to. `indexed_gzip` finds many in one pass of its own at the speed of zlib. The last one before each
block of rows is stored in a file next to the index, about 2 kB per decoded megabyte. So a block is read with little
before it. Reading needs ISA-L only.

The file name depends on the size, the first and the last bytes of the shard. The last bytes contain the checksum of all
its content, so the points of a shard serve every index and survive when the shard is moved. Without them everything can
still be read, by decoding from the start of the file.
"""

import hashlib
import io
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from isal import igzip_lib
from numpy.typing import NDArray

from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.formats.codecs.deflate_bits import align_to_bit
from mixtera_hpc.formats.codecs.gzip_members import IsalError
from mixtera_hpc.formats.codecs.positioned_reads import read_fully
from mixtera_hpc.formats.shard_errors import decompression_error

__all__ = ["SPACING_BYTES", "SeekPoints", "find_points", "seek_folder_of", "write_points"]

SPACING_BYTES = 4 << 20
"""Decoded bytes from one point to the next."""
# How far back a deflate block may refer (RFC 1951, section 2).
WINDOW_BYTES = 32 << 10
# Compressed bytes that are read beyond the estimated end of a part.
READ_AHEAD_BYTES = 16 << 10
# Bytes at each end of a shard that enter its file name.
IDENTITY_BYTES = 64

# File: header, one _POINT per seek point, then the windows, each compressed with Zstandard.
_MAGIC = b"mixseek1"
# Magic, number of points, checksum of the table.
_HEADER = struct.Struct("<8sII")
# Decoded position; compressed position in bits; position of the compressed window in this file, its size (0: none).
_POINT = np.dtype([("decoded", "<u8"), ("bit", "<u8"), ("window", "<u8"), ("window_bytes", "<u4")])

# What `IndexedGzipFile.export_index` writes (indexed_gzip, zran.c): header, one record per point, then the raw windows.
# Magic, version, flags, compressed and decoded size, spacing, window size, number of points.
_EXPORT_HEADER = struct.Struct("<5sBBQQIII")
# A point lies `bits` bits before `byte`.
_EXPORT_POINT = np.dtype([("byte", "<u8"), ("decoded", "<u8"), ("bits", "u1"), ("has_window", "u1")])


def seek_folder_of(index: str | Path) -> Path:
    """Return the folder that contains the seek points of an index's shards."""
    return Path(f"{index}.seek")


def write_points(
    shard: Path, folder: Path, spacing_bytes: int = SPACING_BYTES, starts: Sequence[int] | None = None
) -> Path:
    """Find the seek points of an undamaged gzip file and store them in `folder`, unless they are there already.

    Args:
        shard: the gzip file.
        folder: is made if it does not exist.
        spacing_bytes: decoded bytes from one point to the next.
        starts: decoded positions at which reads will begin. Only the last point before each of them is stored; None
            stores all.

    Raises:
        PropertyIndexError: the points cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _file_name(shard)
        if not path.exists():
            table, windows = _build_points(shard, spacing_bytes, starts)
            _write(path, table, windows)
    except OSError as error:
        raise PropertyIndexError(
            f"Cannot store the seek points of {shard} in {folder}: {error.strerror or error}.\n"
            "  Free some space, set index.path to another place, or build without them: index.seek_points=false."
        ) from None
    return path


def _write(path: Path, table: NDArray[Any], windows: bytes) -> None:
    """Write a file under a temporary name and publish it with a rename."""
    # Two builds may write the same points at the same time: each has its own file, and the last rename wins.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with temporary.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, len(table), _checksum(table)) + table.tobytes() + windows)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def find_points(shard: Path, folders: Sequence[Path]) -> "SeekPoints | None":
    """Return the seek points of a shard from the first folder that has them undamaged; None if there is none."""
    folders = [folder for folder in folders if folder.is_dir()]
    if not folders:
        return None
    try:
        name = _file_name(shard)
    except OSError:
        return None
    # A damaged or missing file is not an error: another folder may have the points.
    for folder in folders:
        try:
            return SeekPoints(folder / name)
        except (OSError, ValueError):
            continue
    return None


def _file_name(shard: Path) -> str:
    """Return the name of a shard's seek points, which depends on its content and not on its path."""
    with shard.open("rb") as file:
        fd = file.fileno()
        size = os.fstat(fd).st_size
        head = os.pread(fd, IDENTITY_BYTES, 0)
        tail = os.pread(fd, IDENTITY_BYTES, max(size - IDENTITY_BYTES, 0))
    digest = hashlib.blake2b(b"%d " % size + head + tail, digest_size=16)
    return digest.hexdigest() + ".seek"


def _checksum(table: NDArray[Any]) -> int:
    return int.from_bytes(hashlib.blake2b(table.tobytes(), digest_size=4).digest(), "little")


def _build_points(shard: Path, spacing_bytes: int, starts: Sequence[int] | None) -> tuple[NDArray[Any], bytes]:
    """Return the table of the points to store, and their compressed windows one after the other."""
    data = _export_index(shard, spacing_bytes)
    *_, window_bytes, count = _EXPORT_HEADER.unpack(data[: _EXPORT_HEADER.size])
    exported = np.frombuffer(data, _EXPORT_POINT, count, _EXPORT_HEADER.size)
    position = _EXPORT_HEADER.size + exported.nbytes

    table = np.zeros(count, _POINT)
    table["decoded"] = exported["decoded"]
    table["bit"] = exported["byte"] * 8 - exported["bits"]

    is_stored = np.ones(count, np.bool_)
    if starts is not None:
        # The starts of members are always stored, that of the file among them: decoding ends where a member ends.
        before = np.searchsorted(table["decoded"], np.array(starts, np.int64), side="right") - 1
        is_stored = np.isin(np.arange(count), before) | (exported["has_window"] == 0)

    # Compress the windows one by one, so that each can be read alone.
    # A point at the start of a member refers to nothing and has no window.
    windows = []
    compress = zstandard.ZstdCompressor(level=9, write_checksum=True).compress
    for number in np.flatnonzero(exported["has_window"]).tolist():
        if is_stored[number]:
            windows.append(compress(data[position : position + window_bytes]))
            table["window_bytes"][number] = len(windows[-1])
        position += window_bytes
    table = table[is_stored]

    # Windows follow the table; each begins where the ones before it end.
    window_ends = np.cumsum(table["window_bytes"])
    table["window"] = _HEADER.size + table.nbytes + window_ends - table["window_bytes"]
    return table, b"".join(windows)


def _export_index(shard: Path, spacing_bytes: int) -> memoryview:
    """Let `indexed_gzip` decode the file once and return the index that it exports."""
    # Needed only while an index with long gzip members is built.
    import indexed_gzip

    # `spacing` and `window_size` are in decoded bytes.
    exported = io.BytesIO()
    with indexed_gzip.IndexedGzipFile(str(shard), spacing=spacing_bytes, window_size=WINDOW_BYTES) as file:
        file.build_full_index()
        file.export_index(fileobj=exported)
    return exported.getbuffer()


class SeekPoints:
    """The seek points of one shard. The table is in memory; windows are read when needed."""

    def __init__(self, path: Path) -> None:
        """Read the table.

        Raises:
            OSError: the file does not exist.
            ValueError: it is damaged.
        """
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
            magic, count, checksum = _HEADER.unpack(header.ljust(_HEADER.size, b"\0"))
            # A wrong number must not decide how much memory the table takes.
            if count * _POINT.itemsize > os.fstat(file.fileno()).st_size:
                raise ValueError("no seek points")
            self._table = np.frombuffer(file.read(count * _POINT.itemsize), _POINT)
        # Only the table is verified here; every window has its own checksum, from Zstandard.
        if magic != _MAGIC or not count or len(self._table) != count or _checksum(self._table) != checksum:
            raise ValueError("no seek points")
        self._path = path
        self._decoded: list[int] = self._table["decoded"].tolist()
        self._bit: list[int] = self._table["bit"].tolist()

    def read(self, fd: int, shard: Path, offset: int, size: int) -> bytes:
        """Return `size` decoded bytes from decoded position `offset`.

        Raises:
            DataError: the shard is damaged.
            PropertyIndexError: the file of the seek points is damaged, or cannot be read.
        """
        stop = offset + size
        # From the last point at or before the first byte, to the first point at or after the end.
        first = int(np.searchsorted(self._table["decoded"], offset, side="right")) - 1
        last = int(np.searchsorted(self._table["decoded"], stop, side="left"))
        windows = [self._read_window(number, shard) for number in range(first, last)]
        try:
            parts = [self._decode_from(fd, first + i, window, stop) for i, window in enumerate(windows)]
            decoded = [data for part in parts for data in part]
        except (IsalError, zstandard.ZstdError, OSError, EOFError) as error:
            raise decompression_error(shard, f"{error}, between seek points {first} and {last}") from None
        skip = offset - self._decoded[first]
        return b"".join(decoded)[skip : skip + size]

    def _decode_from(self, fd: int, number: int, window: bytes, stop: int) -> Iterator[bytes]:
        """Decode from one point to the next, or to decoded position `stop` if that comes first.

        Args:
            fd: the shard.
            number: of the point.
            window: the decoded text before the point.
            stop: decoded position.
        """
        start_byte, start_bit = divmod(self._bit[number], 8)
        missing = stop - self._decoded[number]
        # The compressed bytes up to the next point are enough, its own first byte included: it may share that byte.
        if number + 1 == len(self._decoded):
            stop_byte = os.fstat(fd).st_size
            position = stop_byte
        else:
            span = self._decoded[number + 1] - self._decoded[number]
            stop_byte = self._bit[number + 1] // 8 + 1
            missing = min(missing, span)
            # Of a part, about its share of the bytes; more are read if they are needed.
            share = int((stop_byte - start_byte) * missing / span)
            position = min(start_byte + share + READ_AHEAD_BYTES, stop_byte)

        compressed = align_to_bit(read_fully(fd, position - start_byte, start_byte), start_bit)
        # A raw deflate stream that may refer to the window, as if it had just been decoded.
        decoder = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_DEFLATE, hist_bits=15, zdict=window)
        data = decoder.decompress(compressed, missing)
        yield data

        missing -= len(data)
        while missing > 0:
            if decoder.eof or (decoder.needs_input and position == stop_byte):
                raise EOFError("the file is not the one that was indexed")
            compressed = b""
            if decoder.needs_input:
                compressed = read_fully(fd, min(READ_AHEAD_BYTES, stop_byte - position), position)
                position += len(compressed)
            data = decoder.decompress(compressed, missing)
            yield data
            missing -= len(data)

    def _read_window(self, number: int, shard: Path) -> bytes:
        """Return the decoded text before a point; empty if it has none."""
        size = int(self._table["window_bytes"][number])
        if not size:
            return b""
        try:
            with self._path.open("rb") as file:
                data = os.pread(file.fileno(), size, int(self._table["window"][number]))
            # The size in the frame decides how much memory the decoder takes.
            if zstandard.frame_content_size(data) > WINDOW_BYTES:
                raise zstandard.ZstdError("a window is too large")
            return zstandard.decompress(data, max_output_size=WINDOW_BYTES)
        except (zstandard.ZstdError, OSError) as error:
            raise PropertyIndexError(
                f"{self._path}, which has the seek points of {shard}, cannot be read: {error}.\n"
                "  Delete the file: without it, blocks are decoded from the start of the shard."
            ) from None
