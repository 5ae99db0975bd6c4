"""Plain text: one file is one document, and what is known of it is its path.

Costs a shard, a block and an open file per document: right for books, wrong for millions of short texts.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import (
    BlockRanges,
    BlockRef,
    RowBatch,
    ScanSpec,
    ScanUnit,
    ShardReader,
    open_shard,
    shard_changed,
)
from mixtera_hpc.formats.batching.dict_rows import BadRow, RowScanner
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.positioned_reads import read_fully

__all__ = ["PlainTextFormat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainTextFormat:
    """`Format` of plain text files in UTF-8; an empty file holds no document. `data.text` is not looked at."""

    name: str = "text"
    holds_tokens: bool = False

    def units(self, path: Path, size_bytes: int) -> list[ScanUnit]:
        return [ScanUnit(0, size_bytes)] if size_bytes else []

    def scan(self, path: Path, unit: ScanUnit, fields: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
        size = unit.stop
        if size > fields.max_block_bytes:
            raise DataError(
                f"{path} has {size} bytes in one document, more than data.max_block_bytes={fields.max_block_bytes}.\n"
                "  Split it, raise data.max_block_bytes, or leave it out with data.exclude."
            )
        row = _row(path.read_bytes(), fields.text)
        scanner = RowScanner(fields, path)
        batch = scanner.batch([row], BlockRanges.of([(0, size, 1)]), np.array([size]))
        scanner.check()
        if batch:
            yield batch

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        return _Reader(path)


def _row(data: bytes, text: str | None) -> dict[str, Any] | BadRow:
    """The document as a row that has it where every other format's rows have theirs."""
    if (nul := data.find(b"\0")) >= 0:
        return BadRow(f"a NUL character at byte {nul}; this is no text")
    try:
        found: Any = data.decode()
    except UnicodeDecodeError as error:
        return BadRow(f"no UTF-8: {error.reason} at byte {error.start}")
    for key in reversed((text or "text").split(".")):
        found = {key: found}
    row: dict[str, Any] = found
    return row


class _Reader:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = open_shard(path)

    def documents(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[str]:
        return [self._read(block) for _ in rows]

    def payloads(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        return [{"text": self._read(block)} for _ in rows]

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _read(self, block: BlockRef) -> str:
        data = read_fully(self._fd, block.length, 0)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise shard_changed(self._path, block, f"{error}") from None
        if len(data) != block.length:
            raise shard_changed(self._path, block, f"{block.length} bytes were expected, {len(data)} are there")
        return text
