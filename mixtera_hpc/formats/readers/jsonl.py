"""JSON lines, uncompressed: any row can be read alone, so a plan costs exactly the bytes of its rows.

A unit is a byte range of fixed size; a line belongs to the unit in which it begins. A block is a fixed number of lines.
"""

import codecs
import os
from collections.abc import Callable, Iterator, Sequence
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
    RowDecoder,
    ScanSpec,
    ScanUnit,
    ShardReader,
    split_evenly,
)
from mixtera_hpc.formats.batching.json_lines import JsonLineBatcher, JsonLines, line_ends
from mixtera_hpc.formats.batching.json_row_decoder import JsonRowDecoder
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.positioned_reads import OpenShard, merge_nearby, read_each_fully, row_byte_ranges
from mixtera_hpc.formats.shard_errors import shard_changed_error

__all__ = ["JsonRowReader", "JsonlFormat"]

UNIT_BYTES = 64 << 20
# Bytes read and decoded at once; few enough to stay in the cache of a core in between.
SEGMENT_BYTES = 1 << 20
FEW_ROWS = 8
"""Rows of a shard that are read one by one: to look for neighbours costs more than the reads."""
READS_AT_ONCE = 16
"""Reads whose rows are decoded together: their bytes are still in the first cache of a core."""

Row = bytes | memoryview
DecodeEach = Callable[[Sequence[Row]], list[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonlFormat:
    """`Format` of `.jsonl` files."""

    name: str = "jsonl"
    holds_tokens: bool = False
    may_be_empty: bool = True
    maps_files: bool = False
    unit_bytes: int = UNIT_BYTES
    segment_bytes: int = SEGMENT_BYTES

    def units(self, path: Path, size_bytes: int) -> list[ScanUnit]:
        """Split the shard into byte ranges of equal size, anywhere inside lines."""
        return split_evenly(size_bytes, self.unit_bytes)

    def scan(self, path: Path, unit: ScanUnit, spec: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
        """Read the lines that begin in the unit."""
        batcher = JsonLineBatcher(spec, path)
        with path.open("rb", buffering=0) as file:
            fd = file.fileno()
            begin = _first_line(fd, unit)
            # The line that begins behind a byte order mark belongs to the first unit, however short that is.
            stop = max(unit.stop, begin + 1) if unit.start == 0 else unit.stop
            blocks = _LineBlocks(begin, block_rows)
            limit = _LineLimit(path, spec.max_block_bytes)
            for offset, data in _read_lines(fd, ScanUnit(begin, stop), self.segment_bytes, limit):
                lines = batcher.decode(data)
                if not batcher.failed:
                    ranges, lengths = blocks.add(lines.ends + offset)
                    yield batcher.batch(lines, ranges, lengths)
                elif batcher.should_stop:
                    break
        # Only an error message needs the number of rows before the unit, which costs a read of all of them.
        batcher.check(_rows_before(path, begin) if batcher.failed and unit.start else 0)

        # This batch has no rows: it only reports the last block, whose rows came with the batches before.
        last_block = blocks.unfinished()
        if last_block:
            yield batcher.batch(JsonLines.none(), BlockRanges.of([last_block]), np.zeros(0, np.int64))

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        """Open a shard for random access by row."""
        return JsonRowReader(path, text)

    def row_decoder(self, text: str | None) -> RowDecoder:
        """Return the decoder of rows; see `RowFormat`."""
        return JsonRowDecoder(text)


class _LineBlocks:
    """Divides the rows of a unit into blocks of `block_rows` rows."""

    def __init__(self, begin: int, block_rows: int) -> None:
        self._block_rows = block_rows
        # First byte of the unfinished block.
        self._start = begin
        # End of the last row.
        self._end = begin
        # Rows of the unfinished block.
        self._rows = 0

    def add(self, ends: NDArray[np.int64]) -> tuple[BlockRanges, NDArray[np.int64]]:
        """Add the next rows, given the end of each. Return the blocks that are now full, and the bytes of every row."""
        lengths = np.diff(ends, prepend=self._end)

        # The unfinished block needs `block_rows - rows` more rows; after that, every `block_rows`-th row ends a block.
        block_ends = ends[self._block_rows - self._rows - 1 :: self._block_rows]
        bounds = np.concatenate([[self._start], block_ends])
        full = BlockRanges(
            offset=bounds[:-1],
            length=np.diff(bounds),
            rows=np.full(len(block_ends), self._block_rows),
        )

        self._start = int(bounds[-1])
        self._rows = (self._rows + len(ends)) % self._block_rows
        if len(ends):
            self._end = int(ends[-1])
        return full, lengths

    def unfinished(self) -> tuple[int, int, int] | None:
        """Return the last block of the unit as (offset, length, rows) if it is not full."""
        return (self._start, self._end - self._start, self._rows) if self._rows else None


def _first_line(fd: int, unit: ScanUnit) -> int:
    """Return the first byte of the first line that begins in the unit; the unit's stop if there is none."""
    if unit.start == 0:
        # A byte order mark at the start of a file is not part of its first row.
        return len(codecs.BOM_UTF8) if os.pread(fd, len(codecs.BOM_UTF8), 0) == codecs.BOM_UTF8 else 0
    # If the byte before the unit is a newline, a line begins at the unit's first byte.
    position = unit.start - 1
    while position < unit.stop and (data := os.pread(fd, SEGMENT_BYTES, position)):
        # Otherwise it begins after the first newline, possibly outside the unit.
        newline = data.find(b"\n")
        if newline >= 0:
            return min(position + newline + 1, unit.stop)
        position += len(data)
    return unit.stop


@dataclass(frozen=True, slots=True)
class _LineLimit:
    """The maximum length of a line."""

    path: Path
    line_bytes: int

    def check(self, offset: int, size: int) -> None:
        """Refuse a line that begins at `offset` and has at least `size` bytes.

        Raises:
            DataError: the line is too long.
        """
        if size >= self.line_bytes:
            raise DataError(
                f"{self.path}: the line that begins at byte {offset} has more than data.max_block_bytes="
                f"{self.line_bytes} bytes.\n"
                "  Is this JSON with one row per line? Raise data.max_block_bytes, or exclude it with data.exclude."
            )


def _read_lines(fd: int, unit: ScanUnit, segment_bytes: int, limit: _LineLimit) -> Iterator[tuple[int, memoryview]]:
    """Yield (offset, whole lines) for the lines that begin in the unit, whose start must be the start of a line.

    The buffer is reused for the next lines.
    """
    buffer = bytearray(segment_bytes)
    begin = unit.start
    while begin < unit.stop:
        size = _fill(fd, buffer, begin)
        if not size:
            return

        # Stop after the line that contains the last byte of the unit. If it does not end in this buffer, stop after
        # the last whole line; the last line of the file may lack its newline.
        last_newline = buffer.find(b"\n", max(unit.stop - 1 - begin, 0), size)
        is_end_of_file = size < len(buffer)
        if last_newline >= 0:
            cut = last_newline + 1
        elif is_end_of_file:
            cut = size
        else:
            cut = buffer.rfind(b"\n", 0, size) + 1

        if cut:
            yield begin, memoryview(buffer)[:cut]
            begin += cut
        else:
            # A line that is longer than the buffer.
            limit.check(begin, size)
            buffer = bytearray(2 * len(buffer))


def _fill(fd: int, buffer: bytearray, offset: int) -> int:
    """Read into the buffer and return the number of bytes: fewer than it holds only at the end of the file."""
    view = memoryview(buffer)
    size = 0
    # File systems may return short reads anywhere.
    while size < len(buffer) and (count := os.preadv(fd, [view[size:]], offset + size)):
        size += count
    return size


def _rows_before(path: Path, offset: int) -> int:
    """Count the rows of a shard that begin before a byte. Reads the file up to there; used for error messages only."""
    rows = 0
    with path.open("rb") as file:
        while file.tell() < offset and (data := b"".join(file.readlines(SEGMENT_BYTES))):
            start = file.tell() - len(data)
            rows += len(line_ends(data[: max(offset - start, 0)]))
    return rows


class JsonRowReader:
    """Reads single rows of JSON with `pread`. Threads share nothing but the file descriptor."""

    def __init__(self, path: Path, text: str | None, after_row: bytes = b"") -> None:
        self._path = path
        self._decoder = JsonRowDecoder(text, after_row)
        self._shard = OpenShard(path)

    def documents(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[str]:
        """Return the texts of the named rows; see `ShardReader`."""
        starts, row_lengths = row_byte_ranges(block, lengths, rows)
        return self._decode_at(self._decoder.documents, starts, row_lengths, block)

    def payloads(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return the named rows as dicts; see `ShardReader`."""
        starts, row_lengths = row_byte_ranges(block, lengths, rows)
        return self._decode_at(self._decoder.payloads, starts, row_lengths, block)

    def documents_at(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[str]:
        """Return the texts of the rows at these byte ranges; see `RangeReader`."""
        return self._decode_at(self._decoder.documents, starts, lengths)

    def payloads_at(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return the rows at these byte ranges as dicts; see `RangeReader`."""
        return self._decode_at(self._decoder.payloads, starts, lengths)

    def close(self) -> None:
        """Release the file descriptor."""
        self._shard.close()

    def _decode_at(
        self,
        decode_each: DecodeEach,
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        block: BlockRef | None = None,
    ) -> list[Any]:
        try:
            rows: list[Any] = []
            for contents in _read_rows(self._shard.fd, starts, starts + lengths):
                rows += decode_each(contents)
            return rows
        except ValueError as error:
            raise shard_changed_error(self._path, block, f"{error}") from None


def _read_rows(fd: int, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> Iterator[list[bytes]]:
    """Yield the bytes of the rows, those of some reads at a time; rows near each other share a read."""
    if len(starts) <= FEW_ROWS:
        yield read_each_fully(fd, (stops - starts).tolist(), starts.tolist())
        return
    bounds = merge_nearby(starts, stops)
    first_bytes = starts[bounds[:-1]]
    offsets = first_bytes.tolist()
    sizes = (stops[bounds[1:] - 1] - first_bytes).tolist()
    row_starts = starts.tolist()
    row_stops = stops.tolist()
    shared = np.flatnonzero(np.diff(bounds) > 1)
    of_shared = list(zip(shared.tolist(), bounds[shared].tolist(), bounds[shared + 1].tolist(), strict=True))
    for first in range(0, len(sizes), READS_AT_ONCE):
        last = min(first + READS_AT_ONCE, len(sizes))
        contents = read_each_fully(fd, sizes[first:last], offsets[first:last])
        rows: list[bytes] = []
        next_single = first
        for read, first_row, last_row in of_shared[np.searchsorted(shared, first) : np.searchsorted(shared, last)]:
            rows += contents[next_single - first : read - first]
            content = contents[read - first]
            begin = offsets[read]
            # Copies of short rows are cheaper than views of them.
            places = zip(row_starts[first_row:last_row], row_stops[first_row:last_row], strict=True)
            rows += [content[start - begin : stop - begin] for start, stop in places]
            next_single = read + 1
        yield rows + contents[next_single - first :]
