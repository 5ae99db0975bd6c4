"""Read and decode rows of files whose rows are decoded alike, from all files in one loop.

Price per row: one positioned read and its share of a decoding call. Price per file and call: 2 µs, and 5 µs more where
it has to be opened, because not all files fit into the process's file descriptors.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

from mixtera_hpc.dataplane.reading.rows.read_plan import ReadPlan

__all__ = ["ROWS_AT_ONCE", "RowFiles"]

ROWS_AT_ONCE = 16
"""Rows that are decoded together: their bytes are still in the first cache of a core."""

DecodeRows = Callable[[Sequence[bytes]], list[Any]]
EnterShard = Callable[[int, int, int], None]
"""A function that gets the next shard, and the numbers of the first and the last row that are read of it."""


class _OpenFile:
    __slots__ = ("descriptor", "last_use")

    def __init__(self, descriptor: int, last_use: int) -> None:
        self.descriptor = descriptor
        self.last_use = last_use


class RowFiles:
    """Open files, by number of the shard.

    Reads of many rows go through the same files again and again, in ascending order. If too many are open, a file that
    the last two of these reads did not use is closed. If there is none, the most recently used file is closed, because
    it is needed again after all others.
    """

    def __init__(self, data_root: str, paths: Sequence[str], max_open: int) -> None:
        """Open nothing yet.

        Args:
            data_root: the folder that `paths` are relative to.
            paths: of all shards.
            max_open: files that are open at the same time.
        """
        self._data_root = data_root
        self._paths = paths
        self._max_open = max_open
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        """Those that were used last at the end."""
        self._num_calls = 0

    def limit(self, max_open: int) -> None:
        """Keep at most `max_open` files open from now on."""
        self._max_open = max(max_open, 1)
        while len(self._open) > self._max_open:
            self._close_one()

    def read(
        self, plan: ReadPlan, decode: DecodeRows, enter: EnterShard, at_once: int = ROWS_AT_ONCE
    ) -> Iterator[tuple[bool, list[Any]]]:
        """Yield groups of about `at_once` decoded rows, each with True if its rows share reads with others, else False.

        Rows with a read of their own come in the order of `plan.positions`, and so do rows that share reads.

        Raises:
            OSError: a file cannot be opened or read.
            EOFError: a read was short, as on network file systems or behind the end of a file.
            ValueError: rows cannot be decoded.
        """
        self._num_calls += 1
        single: list[bytes] = []
        shared: list[bytes] = []
        num_checked = 0
        for file in plan.files:
            enter(file.shard, file.first_row, file.last_row)
            descriptor = self._descriptor(file.shard)
            for begin in range(file.first_single, file.single_stop, at_once):
                own = slice(begin, min(begin + at_once, file.single_stop))
                single += map(os.pread, repeat(descriptor), plan.sizes[own], plan.offsets[own])
                if len(single) >= at_once:
                    _check_sizes(single, sum(plan.sizes[num_checked : own.stop]))
                    num_checked = own.stop
                    yield False, decode(single)
                    single = []
            for begin in range(file.first_shared, file.shared_stop, at_once):
                reads = range(begin, min(begin + at_once, file.shared_stop))
                for rows in _rows_of_reads(descriptor, plan, reads, at_once):
                    shared += rows
                    if len(shared) >= at_once:
                        yield True, decode(shared)
                        shared = []
        if single:
            _check_sizes(single, sum(plan.sizes[num_checked:]))
            yield False, decode(single)
        if shared:
            yield True, decode(shared)

    def read_raw(self, plan: ReadPlan, enter: EnterShard) -> list[bytes]:
        """Return the bytes of all rows, in the order of `plan.positions`.

        Raises:
            OSError: a file cannot be opened or read.
            EOFError: a read was short.
        """
        self._num_calls += 1
        rows: list[bytes] = []
        shared: list[bytes] = []
        # There may be as many files as rows, so little is done for each.
        for shard, first_row, last_row, first, stop, first_shared, shared_stop in plan.files:
            enter(shard, first_row, last_row)
            descriptor = repeat(self._descriptor(shard))
            rows += map(os.pread, descriptor, plan.sizes[first:stop], plan.offsets[first:stop])
            if first_shared < shared_stop:
                own = slice(first_shared, shared_stop)
                shared += map(os.pread, descriptor, plan.shared_sizes[own], plan.shared_offsets[own])
        _check_sizes(rows, plan.num_bytes)
        _check_sizes(shared, plan.num_shared_bytes)
        places = zip(plan.read_of_row, plan.row_starts, plan.row_stops, strict=True)
        rows += [shared[read][start:end] for read, start, end in places]
        return rows

    def read_bytes(self, shard: int, offset: int, size: int) -> bytes:
        """Return the bytes [offset, offset + size) of a file.

        Raises:
            OSError: the file cannot be opened or read.
            EOFError: the read was short.
        """
        content = os.pread(self._descriptor(shard, is_in_turn=False), size, offset)
        if len(content) != size:
            raise EOFError
        return content

    def close(self) -> None:
        """Close all files."""
        while self._open:
            self._close_one()

    def _descriptor(self, shard: int, *, is_in_turn: bool = True) -> int:
        file = self._open.get(shard)
        if file is not None:
            self._open.move_to_end(shard)
            file.last_use = self._num_calls
            return file.descriptor
        while len(self._open) >= self._max_open:
            self._close_one(is_in_turn=is_in_turn)
        # The paths of data sets with names are absolute. A library takes longer to join paths than to open the file.
        name = self._paths[shard]
        path = name if name[0] == "/" else f"{self._data_root}/{name}"
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open[shard] = _OpenFile(descriptor, self._num_calls)
        return descriptor

    def _close_one(self, *, is_in_turn: bool = False) -> None:
        """Close the least recently used file, or, if all are read in turn, the most recently used one."""
        oldest = next(iter(self._open.values()))
        are_all_in_use = oldest.last_use >= self._num_calls - 1
        _, file = self._open.popitem(last=is_in_turn and are_all_in_use)
        os.close(file.descriptor)


def _check_sizes(contents: Sequence[bytes], num_bytes: int) -> None:
    """Raise EOFError if a read is too short."""
    if sum(map(len, contents)) != num_bytes:
        raise EOFError


def _rows_of_reads(descriptor: int, plan: ReadPlan, reads: range, at_once: int) -> Iterator[list[bytes]]:
    """Yield the bytes of the rows of some reads of several rows each, at most `at_once` rows at a time.

    Raises:
        EOFError: a read is too short.
    """
    sizes = plan.shared_sizes[reads.start : reads.stop]
    contents = list(map(os.pread, repeat(descriptor), sizes, plan.shared_offsets[reads.start : reads.stop]))
    _check_sizes(contents, sum(sizes))
    stop = plan.shared_borders[reads.stop]
    for begin in range(plan.shared_borders[reads.start], stop, at_once):
        own = slice(begin, min(begin + at_once, stop))
        # Copies of short rows are cheaper than views of them.
        places = zip(plan.read_of_row[own], plan.row_starts[own], plan.row_stops[own], strict=True)
        yield [contents[read - reads.start][start:end] for read, start, end in places]
