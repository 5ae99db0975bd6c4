"""A JSON file that is one array of objects (`.json`), as LLaVA and others publish theirs.

The whole file is in memory while it is scanned, so `data.max_block_bytes` bounds its size. Afterwards every row has a
byte range and is read alone, as in JSON lines.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import BlockRanges, RowBatch, RowDecoder, ScanSpec, ScanUnit, ShardReader
from mixtera_hpc.formats.batching.dict_rows import BadRow, DictRowBatcher
from mixtera_hpc.formats.batching.json_array_rows import find_array_rows
from mixtera_hpc.formats.batching.json_payloads import decode_payload
from mixtera_hpc.formats.batching.json_problems import JSON_ERRORS, json_problem, without_bom
from mixtera_hpc.formats.batching.json_row_decoder import JsonRowDecoder
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
    may_be_empty: bool = False
    maps_files: bool = False

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
        rows = find_array_rows(data, len(data) - len(without_bom(data)))
        if rows.problem and not spec.skip_bad:
            raise _no_array_error(path, data, rows.problem)
        batcher = DictRowBatcher(spec, path)
        num_rows = len(rows.stops)
        for first in range(0, num_rows, BATCH_ROWS):
            stop = min(first + BATCH_ROWS, num_rows)
            bounds = zip(rows.starts[first:stop].tolist(), rows.stops[first:stop].tolist(), strict=True)
            lengths = np.diff(rows.starts[first : stop + 1])
            blocks = _blocks_ending_in(first, stop, rows.starts, block_rows)
            batch = batcher.batch([_decode_row(data[start:end]) for start, end in bounds], blocks, lengths)
            if batch:
                yield batch
            if batcher.should_stop:
                break
        batcher.check()
        # The rows before the damage are those of an array.
        if rows.problem:
            raise _no_array_error(path, data, rows.problem)

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        """Open a shard for random access by row."""
        return JsonRowReader(path, text, after_row=BETWEEN_ROWS)

    def row_decoder(self, text: str | None) -> RowDecoder:
        """Return the decoder of rows; see `RowFormat`."""
        return JsonRowDecoder(text, after_row=BETWEEN_ROWS)


def _no_array_error(path: Path, data: bytes, problem: str) -> DataError:
    is_object = without_bom(data).lstrip()[:1] == b"{"
    hint = "Set data.format=jsonl if it has one row per line" if is_object else "Repair it"
    return DataError(f"{path} is not a JSON array of rows: {problem}.\n  {hint}, or exclude it with data.exclude.")


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


def _decode_row(row: bytes) -> Any:
    try:
        return decode_payload(row)
    except JSON_ERRORS as error:
        return BadRow(json_problem(row, error))
