"""JSON lines, uncompressed: any row can be read on its own, so a plan costs exactly the bytes it names.

A unit is a byte range of fixed size; a line belongs to the unit in which it begins. A block is a fixed number of lines.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
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
    cut,
    open_shard,
    shard_changed,
)
from mixtera_hpc.formats.batching.json_lines import Lines, LineScanner, line_ends
from mixtera_hpc.formats.batching.row_type import RowType
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.positioned_reads import merge_nearby, read_fully, row_byte_ranges

__all__ = ["JsonRowReader", "JsonlFormat"]

UNIT_BYTES = 64 << 20
PIECE_BYTES = 1 << 20
"""Read and decoded at once; small enough to stay in a core's cache on its way."""
_PLAIN: "msgspec.json.Decoder[Any]" = msgspec.json.Decoder()


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonlFormat:
    """`Format` of `.jsonl` files."""

    name: str = "jsonl"
    holds_tokens: bool = False
    unit_bytes: int = UNIT_BYTES
    segment_bytes: int = PIECE_BYTES

    def units(self, path: Path, size_bytes: int) -> list[ScanUnit]:
        return cut(size_bytes, self.unit_bytes)

    def scan(self, path: Path, unit: ScanUnit, fields: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
        scanner = LineScanner(fields, path)
        with path.open("rb", buffering=0) as file:
            begin = _first_line(file.fileno(), unit)
            blocks = _Blocks(begin, block_rows)
            limit = _Limit(path, fields.max_block_bytes)
            for offset, data in _pieces(file.fileno(), (begin, unit.stop), self.segment_bytes, limit):
                lines = scanner.lines(data)
                if not scanner.failed:
                    ranges, lengths = blocks.add(lines.ends + offset)
                    yield scanner.batch(lines, ranges, lengths)
                elif scanner.has_enough:
                    break
        scanner.check(_rows_before(path, begin) if scanner.failed else 0)
        if last := blocks.rest():
            yield scanner.batch(Lines.none(), BlockRanges.of([last]), np.zeros(0, np.int64))

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        return JsonRowReader(path, text)


class _Blocks:
    """Cuts the rows of a unit into blocks of equal numbers of rows."""

    def __init__(self, begin: int, block_rows: int) -> None:
        self._block_rows = block_rows
        self._start = begin
        self._end = begin
        self._rows = 0

    def add(self, ends: NDArray[np.int64]) -> tuple[BlockRanges, NDArray[np.int64]]:
        """Take the next rows, given where each ends; returns the blocks now full and the bytes of every row."""
        lengths = np.diff(ends, prepend=self._end)
        last = ends[self._block_rows - self._rows - 1 :: self._block_rows]
        starts = np.concatenate([[self._start], last])
        table = np.stack([starts[:-1], np.diff(starts), np.full(len(last), self._block_rows)])
        self._start = int(starts[-1])
        self._rows = (self._rows + len(ends)) % self._block_rows
        self._end = int(ends[-1]) if len(ends) else self._end
        return BlockRanges(offset=table[0], length=table[1], rows=table[2]), lengths

    def rest(self) -> tuple[int, int, int] | None:
        """The last block of the unit, when it is not full."""
        return (self._start, self._end - self._start, self._rows) if self._rows else None


def _first_line(fd: int, unit: ScanUnit) -> int:
    """Where the first line begins that belongs to `unit`; its stop when none does."""
    if unit.start == 0:
        return 0
    position = unit.start - 1
    while position < unit.stop and (data := os.pread(fd, PIECE_BYTES, position)):
        found = data.find(b"\n")
        if found >= 0:
            return min(position + found + 1, unit.stop)
        position += len(data)
    return unit.stop


@dataclass(frozen=True, slots=True)
class _Limit:
    """How long a line may be."""

    path: Path
    line_bytes: int

    def check(self, offset: int, size: int) -> None:
        """Refuse a line that begins at `offset` and has `size` bytes or more."""
        if size >= self.line_bytes:
            raise DataError(
                f"{self.path}: the line that begins at byte {offset} has more than data.max_block_bytes={self.line_bytes} bytes.\n"
                "  Is this JSON with a row per line? Raise data.max_block_bytes, or leave the file out with data.exclude."
            )


def _pieces(fd: int, span: tuple[int, int], size_bytes: int, limit: _Limit) -> Iterator[tuple[int, memoryview]]:
    """Whole lines that begin in `span`, with the offset of the first; valid until the next are asked for."""
    (begin, stop), buffer = span, bytearray(size_bytes)
    while begin < stop:
        size = _fill(fd, buffer, begin)
        if not size:
            return
        last = buffer.find(b"\n", max(stop - 1 - begin, 0), size)
        at_end = size < len(buffer)
        cut = last + 1 or (size if at_end else buffer.rfind(b"\n", 0, size) + 1)
        if cut:
            yield begin, memoryview(buffer)[:cut]
            begin += cut
        else:
            limit.check(begin, size)
            buffer = bytearray(2 * len(buffer))


def _fill(fd: int, buffer: bytearray, offset: int) -> int:
    """Read into `buffer`; fewer bytes than it holds only at the end of the file, though file systems may return less."""
    view, size = memoryview(buffer), 0
    while size < len(buffer) and (more := os.preadv(fd, [view[size:]], offset + size)):
        size += more
    return size


def _rows_before(path: Path, offset: int) -> int:
    """Rows of a shard that begin before a byte; for messages only."""
    rows = 0
    with path.open("rb") as file:
        while file.tell() < offset and (data := b"".join(file.readlines(PIECE_BYTES))):
            rows += len(line_ends(data[: max(offset - file.tell() + len(data), 0)]))
    return rows


class JsonRowReader:
    """Reads wanted rows with `pread`; threads share nothing but the descriptor."""

    def __init__(self, path: Path, text: str | None, after_row: bytes = b"") -> None:
        self._path, self._after_row = path, after_row
        self._type = RowType(ScanSpec(text=text))
        self._decoder = msgspec.json.Decoder(self._type.struct)
        self._fd = open_shard(path)

    def documents(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[str]:
        return self._type.documents(self._decode(self._decoder, *row_byte_ranges(block, lengths, rows), block))

    def payloads(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        return self._decode(_PLAIN, *row_byte_ranges(block, lengths, rows), block)

    def documents_at(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[str]:
        return self._type.documents(self._decode(self._decoder, starts, lengths))

    def payloads_at(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[dict[str, Any]]:
        return self._decode(_PLAIN, starts, lengths)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _trimmed(self, decode: Callable[[bytes | memoryview], Any]) -> Callable[[bytes | memoryview], Any]:
        return lambda row: decode(bytes(row).rstrip(self._after_row))

    def _decode(
        self,
        decoder: "msgspec.json.Decoder[Any]",
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        block: BlockRef | None = None,
    ) -> list[Any]:
        try:
            decode = self._trimmed(decoder.decode) if self._after_row else decoder.decode
            return list(itertools.chain.from_iterable(_decoded(self._fd, decode, starts, starts + lengths)))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise shard_changed(self._path, block, f"{error}") from None


def _decoded(
    fd: int, decode: Callable[[bytes | memoryview], Any], starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> Iterator[list[Any]]:
    """Rows, those that lie near each other out of one read."""
    begins, ends = starts.tolist(), stops.tolist()
    for first, last in merge_nearby(starts, stops):
        begin = begins[first]
        data = read_fully(fd, ends[last - 1] - begin, begin)
        if last == first + 1:
            yield [decode(data)]
        else:
            view = memoryview(data)
            yield [
                decode(view[a - begin : b - begin]) for a, b in zip(begins[first:last], ends[first:last], strict=True)
            ]
