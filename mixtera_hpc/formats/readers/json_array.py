"""A JSON file that is one array of objects (`.json`), as LLaVA and others publish theirs.

The whole file is in memory while it is scanned, so `data.max_block_bytes` bounds its size. Afterwards every row has a
byte range and is read alone, as in JSON lines.
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
from mixtera_hpc.formats.batching.dict_rows import BadRow, DictRowBatcher
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.readers.jsonl import JsonRowReader

__all__ = ["JsonArrayFormat"]

BATCH_ROWS = 4096
# Bytes between two rows; they belong to the byte range of the row before them.
BETWEEN_ROWS = b", \t\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonArrayFormat:
    """`Format` of `.json` files that contain one array."""

    name: str = "json"
    holds_tokens: bool = False

    def units(self, path: Path, size_bytes: int) -> list[ScanUnit]:
        """Return the whole file as one unit."""
        return [ScanUnit(0, size_bytes)] if size_bytes else []

    def scan(self, path: Path, unit: ScanUnit, spec: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
        """Read the rows of the array."""
        if unit.stop > spec.max_block_bytes:
            raise DataError(
                f"{path} is one JSON array of {unit.stop} bytes, more than data.max_block_bytes="
                f"{spec.max_block_bytes}.\n"
                "  Raise it, or write one row per line: jq -c '.[]' FILE > FILE.jsonl"
            )
        # Find the rows first, without decoding them; then decode a batch at a time.
        data = path.read_bytes()
        rows = _split_array(data, path)
        starts = _row_starts(data, rows)
        batcher = DictRowBatcher(spec, path)
        for first in range(0, len(rows), BATCH_ROWS):
            batch_rows = rows[first : first + BATCH_ROWS]
            stop = first + len(batch_rows)
            lengths = np.diff(starts[first : stop + 1])
            blocks = _blocks_ending_in(first, stop, starts, block_rows)
            batch = batcher.batch(list(map(_decode_row, batch_rows)), blocks, lengths)
            if batch:
                yield batch
            if batcher.should_stop:
                break
        batcher.check()

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        """Open a shard for random access by row."""
        return JsonRowReader(path, text, after_row=BETWEEN_ROWS)


def _split_array(data: bytes, path: Path) -> list[msgspec.Raw]:
    """Return the undecoded rows: views of `data`."""
    try:
        return msgspec.json.decode(data, type=list[msgspec.Raw])
    except (msgspec.DecodeError, RecursionError) as error:
        is_object = data.lstrip()[:1] == b"{"
        hint = "Set data.format=jsonl if it has one row per line" if is_object else "Repair it"
        raise DataError(
            f"{path} is not a JSON array of rows: {error}.\n  {hint}, or exclude it with data.exclude."
        ) from None


def _row_starts(data: bytes, rows: list[msgspec.Raw]) -> NDArray[np.int64]:
    """Return the first byte of every row, and the end of the last; shape (rows + 1,)."""
    if not rows:
        return np.zeros(1, np.int64)
    # The rows are views of `data`, so differences of memory addresses are positions in the file.
    addresses = [_address(row) for row in rows]
    end = addresses[-1] + len(memoryview(rows[-1]))
    return np.array([*addresses, end], np.int64) - _address(data)


def _address(buffer: Any) -> int:
    """Return the memory address of a buffer's first byte."""
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address


def _blocks_ending_in(first: int, stop: int, starts: NDArray[np.int64], block_rows: int) -> BlockRanges:
    """Return the blocks whose last row is one of the rows [first, stop)."""
    num_rows = len(starts) - 1
    block_stops = [*range(block_rows, num_rows, block_rows), num_rows]
    ranges = []
    # A block may be longer than a batch, or end in the middle of one.
    for block_stop in block_stops:
        if first < block_stop <= stop:
            block_start = (block_stop - 1) // block_rows * block_rows
            offset = int(starts[block_start])
            ranges.append((offset, int(starts[block_stop]) - offset, block_stop - block_start))
    return BlockRanges.of(ranges)


def _decode_row(row: msgspec.Raw) -> Any:
    try:
        return msgspec.json.decode(row)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return BadRow(str(error))
