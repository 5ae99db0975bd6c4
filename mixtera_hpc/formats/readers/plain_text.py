"""Plain text: one file is one document, and its properties come from its path.

Every document costs a shard, a block and an open file: right for books, wrong for millions of short texts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import BlockRanges, BlockRef, RowBatch, ScanSpec, ScanUnit, ShardReader
from mixtera_hpc.formats.batching.dict_rows import BadRow, DictRowBatcher
from mixtera_hpc.formats.batching.json_problems import without_bom
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.positioned_reads import OpenShard, read_fully
from mixtera_hpc.formats.shard_errors import shard_changed_error

__all__ = ["PlainTextFormat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainTextFormat:
    """`Format` of plain text files in UTF-8. An empty file holds no document. `data.text` is ignored."""

    name: str = "text"
    holds_tokens: bool = False
    may_be_empty: bool = True
    maps_files: bool = False

    def units(self, path: Path, size_bytes: int) -> list[ScanUnit]:
        """Return the whole file as one unit."""
        return [ScanUnit(0, size_bytes)] if size_bytes else []

    def scan(self, path: Path, unit: ScanUnit, spec: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
        """Read the file as one row, which is one block."""
        size = unit.stop
        if not size:
            return
        if size > spec.max_block_bytes:
            raise DataError(
                f"{path} has {size} bytes in one document, more than data.max_block_bytes={spec.max_block_bytes}.\n"
                "  Split it, raise data.max_block_bytes, or exclude it with data.exclude."
            )
        row = _as_row(path.read_bytes(), spec.text)
        batcher = DictRowBatcher(spec, path)
        batch = batcher.batch([row], BlockRanges.of([(0, size, 1)]), np.array([size]))
        batcher.check()
        if batch:
            yield batch

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        """Open the file."""
        return PlainTextReader(path)


def _as_row(data: bytes, text: str | None) -> dict[str, Any] | BadRow:
    """Build a row with the document at the path `data.text`, as the rows of other formats have it."""
    # Valid UTF-8 can contain NUL, but text files do not; binary files nearly always do.
    nul = data.find(b"\0")
    if nul >= 0:
        return BadRow(f"a NUL character at byte {nul}: the file is not text")
    try:
        value: Any = without_bom(data).decode()
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8: {error.reason} at byte {error.start}")
    # Wrap the text in its parents, from the inside out.
    for key in reversed((text or "text").split(".")):
        value = {key: value}
    row: dict[str, Any] = value
    return row


class PlainTextReader:
    """Reads the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shard = OpenShard(path)

    def documents(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[str]:
        """Return the text for every named row; see `ShardReader`."""
        return [self._read(block) for _ in rows]

    def payloads(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return `{"text": …}` for every named row; see `ShardReader`."""
        return [{"text": self._read(block)} for _ in rows]

    def close(self) -> None:
        """Release the file descriptor."""
        self._shard.close()

    def _read(self, block: BlockRef) -> str:
        data = read_fully(self._shard.fd, block.length, 0)
        if len(data) != block.length:
            raise shard_changed_error(self._path, block, f"{block.length} bytes were expected, but it has {len(data)}")
        try:
            return without_bom(data).decode()
        except UnicodeDecodeError as error:
            raise shard_changed_error(self._path, block, f"{error}") from None
