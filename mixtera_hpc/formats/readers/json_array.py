"""A JSON file that is one array of objects (`.json`), as LLaVA and others ship theirs.

The whole file is in memory while it is scanned, so `data.max_block_bytes` bounds it; afterwards every row has its bytes and is
read alone, as in JSON lines.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import BlockRanges, RowBatch, ScanSpec, ScanUnit, ShardReader
from mixtera_hpc.formats.batching.dict_rows import BadRow, RowScanner
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.readers.jsonl import JsonRowReader

__all__ = ["JsonArrayFormat"]

BATCH_ROWS = 4096
BETWEEN_ROWS = b", \t\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonArrayFormat:
    """`Format` of `.json` files that hold an array."""

    name: str = "json"
    holds_tokens: bool = False

    def units(self, path: Path, size_bytes: int) -> list[ScanUnit]:
        return [ScanUnit(0, size_bytes)] if size_bytes else []

    def scan(self, path: Path, unit: ScanUnit, fields: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
        if unit.stop > fields.max_block_bytes:
            raise DataError(
                f"{path} is one JSON array of {unit.stop} bytes, more than data.max_block_bytes={fields.max_block_bytes}.\n"
                "  Raise it, or write a row per line: jq -c '.[]' FILE > FILE.jsonl"
            )
        data = path.read_bytes()
        rows, scanner = _split(data, path), RowScanner(fields, path)
        starts = _starts(data, rows)
        for first in range(0, len(rows), BATCH_ROWS):
            part = rows[first : first + BATCH_ROWS]
            lengths = np.diff(starts[first : first + len(part) + 1])
            blocks = _blocks(starts, first, len(part), block_rows, len(rows))
            batch = scanner.batch(list(map(_decoded, part)), blocks, lengths)
            if batch:
                yield batch
            if scanner.has_enough:
                break
        scanner.check()

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        return JsonRowReader(path, text, after_row=BETWEEN_ROWS)


def _split(data: bytes, path: Path) -> list[msgspec.Raw]:
    try:
        return msgspec.json.decode(data, type=list[msgspec.Raw])
    except (msgspec.DecodeError, RecursionError) as error:
        hint = "Set data.format=jsonl where it has a row per line" if data.lstrip()[:1] == b"{" else "Repair it"
        raise DataError(
            f"{path} is not a JSON array of rows: {error}.\n  {hint}, or leave it out with data.exclude."
        ) from None


def _starts(data: bytes, rows: list[msgspec.Raw]) -> NDArray[np.int64]:
    """Where every row begins, and where the last one ends; shape (rows + 1,)."""
    if not rows:
        return np.zeros(1, np.int64)
    addresses = [_address(row) for row in rows]
    end = addresses[-1] + len(memoryview(rows[-1]))
    return np.array([*addresses, end], np.int64) - _address(data)


def _address(buffer: Any) -> int:
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address


def _blocks(starts: NDArray[np.int64], first: int, count: int, block_rows: int, total: int) -> BlockRanges:
    """The blocks that end with one of `count` rows from `first` on."""
    ends = [*range(block_rows, total, block_rows), total]
    bounds = [(max(end - 1, 0) // block_rows * block_rows, end) for end in ends if first < end <= first + count]
    return BlockRanges.of([(int(starts[a]), int(starts[b] - starts[a]), b - a) for a, b in bounds])


def _decoded(row: msgspec.Raw) -> Any:
    try:
        return msgspec.json.decode(row)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return BadRow(str(error))
