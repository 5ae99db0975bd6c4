"""The layout of an MDS shard (MosaicML Streaming, version 2), and the `index.json` of its folder.

A shard is the number of samples n, the first byte of every sample and the end of the last (n + 1 numbers), the columns
as JSON, and the samples. All numbers are 32-bit. The shard describes itself, so `index.json` is only compared with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.batching.json_problems import JSON_ERRORS
from mixtera_hpc.formats.codecs.mds_samples import ENCODINGS, MdsColumn, is_known_encoding
from mixtera_hpc.formats.registry import MDS_INDEX
from mixtera_hpc.formats.shard_errors import ShardLayoutError

__all__ = ["COMPRESSED_SUFFIX", "MdsLayout", "check_mds_index", "read_mds_layout"]

VERSION = 2
COMPRESSED_SUFFIX = ".zstd"
"""Ending of compressed shards, after `.mds`."""
NUMBER_BYTES = 4


class _Header(msgspec.Struct, frozen=True):
    """The JSON object in a shard; also an entry of `index.json`."""

    format: str
    version: int
    column_names: list[str] = []
    column_encodings: list[str] = []
    column_sizes: list[int | None] = []


class _FileInfo(msgspec.Struct, frozen=True):
    basename: str
    bytes: int


class _IndexEntry(_Header, frozen=True, kw_only=True):
    samples: int
    raw_data: _FileInfo
    zip_data: _FileInfo | None = None


class _Index(msgspec.Struct, frozen=True):
    version: int
    shards: list[_IndexEntry]


@dataclass(frozen=True, slots=True, kw_only=True)
class MdsLayout:
    """Positions of the samples of a shard, and the columns that they consist of."""

    size_bytes: int
    """Bytes of the shard, decompressed."""
    starts: NDArray[np.int64]
    """First byte of every sample, and the end of the last; shape (samples + 1,)."""
    columns: tuple[MdsColumn, ...]

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return len(self.starts) - 1


def read_mds_layout(read: Callable[[int, int], bytes], size_bytes: int, path: Path) -> MdsLayout:
    """Read the header of a shard.

    Args:
        read: (offset, size) → bytes of the shard, decompressed.
        size_bytes: bytes of the shard, decompressed.
        path: the shard, for messages.

    Raises:
        DataError: the shard is cut off, is no MDS shard, or has columns that cannot be read.
    """
    starts = _read_starts(read, size_bytes, path)
    header_start = NUMBER_BYTES * (len(starts) + 1)
    text = read(header_start, int(starts[0]) - header_start)
    try:
        header = msgspec.json.decode(text, type=_Header)
    except JSON_ERRORS as error:
        raise _no_shard_error(path, f"its columns are not described by JSON ({error})") from None
    return MdsLayout(size_bytes=size_bytes, starts=starts, columns=_columns(header, path))


def _read_starts(read: Callable[[int, int], bytes], size_bytes: int, path: Path) -> NDArray[np.int64]:
    """Return the first byte of every sample, and the end of the last."""
    num_samples = int.from_bytes(read(0, NUMBER_BYTES), "little")
    header_start = NUMBER_BYTES * (num_samples + 2)
    if size_bytes < header_start:
        raise _no_shard_error(path, f"{size_bytes} bytes are too few for the {num_samples} samples that it announces")
    starts = np.frombuffer(read(NUMBER_BYTES, header_start - NUMBER_BYTES), "<u4").astype(np.int64)
    if starts[0] < header_start or (np.diff(starts) < 0).any():
        raise _no_shard_error(path, "the positions of its samples are not in ascending order")
    if starts[-1] != size_bytes:
        raise DataError(
            f"{path} has {size_bytes} bytes, but its header describes {int(starts[-1])}: it was cut off or replaced.\n"
            "  Copy or download it again, or exclude it with data.exclude."
        )
    return starts


def _no_shard_error(path: Path, problem: str) -> DataError:
    return DataError(
        f"{path} is not a whole MDS shard: {problem}.\n  Copy or download it again, or exclude it with data.exclude."
    )


def _columns(header: _Header, path: Path) -> tuple[MdsColumn, ...]:
    """Return the columns of a shard.

    Raises:
        DataError: they cannot be read.
    """
    if (header.format, header.version) != ("mds", VERSION):
        raise _no_shard_error(
            path, f"it has format {header.format!r} of version {header.version}, not mds of version 2"
        )
    if not len(header.column_names) == len(header.column_encodings) == len(header.column_sizes):
        raise _no_shard_error(path, "its columns have not one name, encoding and size each")
    if any(size is not None and size < 0 for size in header.column_sizes):
        raise _no_shard_error(path, f"its columns have sizes below 0: {header.column_sizes}")
    columns = [
        MdsColumn(name=name, encoding=encoding, size=size or 0)
        for name, encoding, size in zip(header.column_names, header.column_encodings, header.column_sizes, strict=True)
    ]
    for column in columns:
        if not is_known_encoding(column.encoding):
            raise ShardLayoutError(
                f"{path}: column {column.name!r} has the encoding {column.encoding!r}, which cannot be read.\n"
                f"  Write the data set again, without the column or with one of these encodings: "
                f"{', '.join(ENCODINGS)}. Or exclude it with data.exclude."
            )
    return tuple(columns)


def check_mds_index(path: Path, layout: MdsLayout) -> None:
    """Compare a shard with the `index.json` of its folder, if there is one.

    Raises:
        DataError: the shard is not the one that is described.
        ShardLayoutError: the index is unreadable, lacks the shard, or names shards that are missing.
    """
    index_path = path.with_name(MDS_INDEX)
    try:
        status = index_path.stat()
    except FileNotFoundError:
        return
    entry = _read_index(index_path, status.st_mtime_ns, status.st_size).get(path.name)
    if entry is None:
        raise ShardLayoutError(
            f"{index_path} does not list {path.name}, so the shard is no part of that data set.\n"
            "  Remove it, exclude it with data.exclude, or write the index again with streaming's merge_index."
        )
    names = [column.name for column in layout.columns]
    encodings = [column.encoding for column in layout.columns]
    compared = {
        "samples": (layout.num_samples, entry.samples),
        "bytes": (layout.size_bytes, entry.raw_data.bytes),
        "columns": (names, entry.column_names),
        "encodings": (encodings, entry.column_encodings),
    }
    for what, (in_shard, in_index) in compared.items():
        if in_shard != in_index:
            raise DataError(
                f"{path} has {what} {in_shard}, but {MDS_INDEX} says {in_index}: one of the two was cut off or "
                "replaced.\n  Copy both again, or exclude the shard with data.exclude."
            )


@lru_cache(maxsize=64)
def _read_index(path: Path, mtime_ns: int, size_bytes: int) -> dict[str, _IndexEntry]:
    """Return the entries of an `index.json` by the names of their files, plain and compressed.

    The status of the file is a part of the cache's key: all shards of a folder share one read.

    Raises:
        ShardLayoutError: the index is unreadable, or names shards that are missing.
    """
    try:
        index = msgspec.json.decode(path.read_bytes(), type=_Index)
    except (*JSON_ERRORS, OSError) as error:
        raise ShardLayoutError(
            f"{path} is not the index of a folder of MDS shards: {error}.\n  Copy it again, or remove it."
        ) from None
    if index.version != VERSION:
        raise ShardLayoutError(
            f"{path} has version {index.version}; version {VERSION} is read here.\n"
            "  Write the data set again with a current version of mosaicml-streaming."
        )
    entries: dict[str, _IndexEntry] = {}
    for entry in index.shards:
        names = [info.basename for info in (entry.raw_data, entry.zip_data) if info is not None]
        present = [name for name in names if (path.parent / name).exists()]
        if not present:
            raise ShardLayoutError(
                f"{path} lists {' and '.join(names)}, which is not in the folder: a part of the data set is missing.\n"
                f"  Copy the shard, or remove its entry from {MDS_INDEX}."
            )
        if len(present) > 1:
            raise ShardLayoutError(
                f"{path.parent} has {' and '.join(present)}, which hold the same samples: they would count twice.\n"
                f"  Remove one of them."
            )
        entries |= dict.fromkeys(names, entry)
    return entries
