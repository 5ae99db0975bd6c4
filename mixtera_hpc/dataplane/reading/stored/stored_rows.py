"""Read rows of compressed files from a row store, where each domain has frames of its own.

A frame is decoded once for all rows that are wanted of it. Price per row: 16 bytes of a memory-mapped file, and its
share of a frame of about 64 KiB.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.stored.mapped_files import map_array
from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import BlockRef, Format, ScanSpec
from mixtera_hpc.formats.batching.json_payloads import decode_payload
from mixtera_hpc.formats.batching.json_problems import JSON_ERRORS
from mixtera_hpc.formats.batching.row_type import RowType
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.decoded_sizes import decodes_files
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.index.row_store.row_files import FRAME_BYTES

__all__ = ["ShardFormats", "StoredRowsReader", "blocks_with_rows"]

Ints = NDArray[np.int64]


def blocks_with_rows(source: Source) -> NDArray[np.bool_]:
    """Return which blocks have their rows in a row store; shape (num_blocks,)."""
    is_stored = np.zeros(len(source.blocks), np.bool_)
    for store in source.index.row_stores:
        is_stored[store.first_block : store.last_block] = True
    is_compressed = np.array([decodes_files(name) for name in source.index.shard_formats], np.bool_)
    return is_stored & is_compressed[source.blocks.shard]


class ShardFormats:
    """The format that opens each shard of a run: that of the row store where it has the shard, else the shard's own."""

    def __init__(self, source: Source) -> None:
        """Map the places of all rows; nothing is read yet.

        Raises:
            DataError: a store cannot be read.
        """
        self._source = source
        self._stores = source.index.row_stores
        self._places = [map_array(Path(store.places), np.dtype("<i8")).reshape(-1, 2) for store in self._stores]
        if self._stores:
            self._first_rows = np.concatenate([[0], np.cumsum(source.blocks.rows, dtype=np.int64)])

    def of(self, shard: int) -> Format:
        """Return the format that opens a shard."""
        name = self._source.index.shard_formats[shard]
        if self._stores and decodes_files(name):
            # The blocks of a shard follow each other.
            first_block = int(np.searchsorted(self._source.blocks.shard, shard))
            for store, places in zip(self._stores, self._places, strict=True):
                if store.first_block <= first_block < store.last_block:
                    first_row = int(self._first_rows[first_block] - self._first_rows[store.first_block])
                    return cast(Format, _StoredRowsFormat(Path(store.folder), places[first_row:]))
        return load_format(name)


class _StoredRowsFormat:
    """A `Format` that opens one shard through its row store."""

    holds_tokens = False

    def __init__(self, folder: Path, places: Ints) -> None:
        """Take the folder of the store, and the places of the rows from the first one of the shard on."""
        self._folder = folder
        self._places = places

    def open(self, path: Path, text: str | None, cache: BlockCache) -> "StoredRowsReader":
        """Open the shard; see `Format.open`."""
        return StoredRowsReader(path, text, cache, self._folder, self._places)


class StoredRowsReader:
    """A `ShardReader` of the rows of one shard."""

    def __init__(self, path: Path, text: str | None, cache: BlockCache, folder: Path, places: NDArray[Any]) -> None:
        self._path = path
        self._cache = cache
        self._folder = folder
        self._places = places
        self._type = RowType(ScanSpec(text=text))
        self._decoder = msgspec.json.Decoder(self._type.struct)
        self._decompress = zstandard.ZstdDecompressor().decompress
        self._files: dict[int, int] = {}

    def documents(self, block: BlockRef, lengths: Ints, rows: Ints) -> list[str]:
        """Return the texts of the named rows of a block."""
        decoded = self._decode_rows(self._decoder.decode, block, rows)
        try:
            return self._type.documents(decoded)
        except ValueError as error:
            raise self._damage(error) from None

    def payloads(self, block: BlockRef, lengths: Ints, rows: Ints) -> list[dict[str, Any]]:
        """Return the named rows as dicts."""
        return self._decode_rows(decode_payload, block, rows)

    def close(self) -> None:
        """Release the file descriptors."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _decode_rows(self, decode: Callable[[bytes], Any], block: BlockRef, rows: Ints) -> list[Any]:
        places = np.asarray(self._places[block.first_row + rows])
        keys, first, inverse = np.unique(places[:, 0], return_index=True, return_inverse=True)
        sizes = places[first, 1] >> 32
        frames = [self._frame(key, size) for key, size in zip(keys.tolist(), sizes.tolist(), strict=True)]
        numbers = (places[:, 1] & 0xFFFFFFFF).tolist()
        try:
            return [decode(frames[i][number]) for i, number in zip(inverse.tolist(), numbers, strict=True)]
        except (IndexError, *JSON_ERRORS) as error:
            raise self._damage(error) from None

    def _frame(self, key: int, size: int) -> list[bytes]:
        """Return the lines of a frame."""
        return self._cache.get((str(self._folder), key), lambda: self._load(key, size))

    def _load(self, key: int, size: int) -> tuple[list[bytes], int]:
        number = key >> 48
        offset = key & ((1 << 48) - 1)
        try:
            if number not in self._files:
                path = self._folder / f"rows-{number:05d}.zst"
                self._files[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            content = self._decompress(self._limited(os.pread(self._files[number], size, offset)))
        except (OSError, zstandard.ZstdError) as error:
            raise self._damage(error) from None
        return content.split(b"\n"), len(content)

    def _limited(self, frame: bytes) -> bytes:
        """Return a frame whose rows have at most `data.max_block_bytes`.

        Raises:
            DataError: the frame is larger, or does not record its size.
        """
        size = zstandard.frame_content_size(frame)
        # Frames of a row store record their decoded size. A frame without it could fill the memory when it is decoded.
        if not 0 <= size <= self._cache.max_block_bytes + FRAME_BYTES:
            raise DataError(
                f"{self._folder}: a frame decodes to {size if size >= 0 else 'an unknown number of'} bytes, but "
                f"data.max_block_bytes is {self._cache.max_block_bytes}.\n"
                "  Raise data.max_block_bytes, or set data.materialize=never."
            )
        return frame

    def _damage(self, error: Exception) -> DataError:
        return DataError(
            f"The row store {self._folder} is damaged where it holds rows of {self._path}: {error}.\n"
            f"  Remove {self._folder} and run mixtera-hpc index build again, or set data.materialize=never."
        )
