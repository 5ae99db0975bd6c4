"""Read and decode rows of files whose rows are decoded alike, from all files in one loop.

Price per row: one positioned read and its share of a decoding call. Price per file and read: 2 µs, and 4 µs more where
it has to be opened, because not all files fit into the process's file descriptors.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

from mixtera_hpc.dataplane.reading.rows.read_plan import ReadPlan

__all__ = ["RowFiles"]

READS_AT_ONCE = 16
"""Rows that are decoded together: their bytes are still in the first cache of a core."""

DecodeRows = Callable[[Sequence[bytes]], list[Any]]
EnterShard = Callable[[int, int, int], None]
"""A function that gets the next shard, and the positions of its first and last row among those requested."""


class RowFiles:
    """Open files, by number of the shard. The files that were not used for longest are closed."""

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
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def read(
        self, plan: ReadPlan, decode: DecodeRows, enter: EnterShard, at_once: int = READS_AT_ONCE
    ) -> Iterator[tuple[bool, list[Any]]]:
        """Yield groups of about `at_once` decoded rows, each with True if its rows share reads with others, else False.

        Rows with a read of their own come in the order of `plan.positions`, and so do rows that share reads.

        Raises:
            OSError: a file cannot be opened or read.
            EOFError: a read was short, as on network file systems or behind the end of a file.
            ValueError: rows cannot be decoded.
        """
        single: list[bytes] = []
        shared: list[bytes] = []
        num_checked = 0
        for file in plan.files:
            enter(file.shard, file.first_row, file.row_stop - 1)
            descriptor = self._descriptor(file.shard)
            for begin in range(file.first_single, file.single_stop, at_once):
                own = slice(begin, min(begin + at_once, file.single_stop))
                single += map(os.pread, repeat(descriptor), plan.sizes[own], plan.offsets[own])
                if len(single) >= at_once:
                    _check_sizes(single, plan.sizes[num_checked : own.stop])
                    num_checked = own.stop
                    yield False, decode(single)
                    single = []
            for read in range(file.first_shared, file.shared_stop):
                for rows in _rows_of_read(descriptor, plan, read):
                    shared += rows
                    if len(shared) >= at_once:
                        yield True, decode(shared)
                        shared = []
        if single:
            _check_sizes(single, plan.sizes[num_checked:])
            yield False, decode(single)
        if shared:
            yield True, decode(shared)

    def read_bytes(self, shard: int, offset: int, size: int) -> bytes:
        """Return the bytes [offset, offset + size) of a file.

        Raises:
            OSError: the file cannot be opened or read.
            EOFError: the read was short.
        """
        content = os.pread(self._descriptor(shard), size, offset)
        if len(content) != size:
            raise EOFError
        return content

    def close(self) -> None:
        """Close all files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _descriptor(self, shard: int) -> int:
        descriptor = self._descriptors.get(shard)
        if descriptor is not None:
            self._descriptors.move_to_end(shard)
            return descriptor
        # The paths of data sets with names are absolute. pathlib takes longer than opening the file.
        path = self._paths[shard]
        descriptor = os.open(os.path.join(self._data_root, path), os.O_RDONLY | os.O_CLOEXEC)  # noqa: PTH118
        self._descriptors[shard] = descriptor
        if len(self._descriptors) > self._max_open:
            os.close(self._descriptors.popitem(last=False)[1])
        return descriptor


def _check_sizes(contents: Sequence[bytes], sizes: Sequence[int]) -> None:
    """Raise EOFError if a read is too short."""
    if sum(map(len, contents)) != sum(sizes):
        raise EOFError


def _rows_of_read(descriptor: int, plan: ReadPlan, number: int) -> Iterator[list[bytes]]:
    """Yield the bytes of the rows that share a read, some rows at a time.

    Raises:
        EOFError: the read is too short.
    """
    offset = plan.shared_offsets[number]
    content = os.pread(descriptor, plan.shared_sizes[number], offset)
    if len(content) != plan.shared_sizes[number]:
        raise EOFError
    stop = plan.shared_borders[number + 1]
    for begin in range(plan.shared_borders[number], stop, READS_AT_ONCE):
        own = slice(begin, min(begin + READS_AT_ONCE, stop))
        # Copies of short rows are cheaper than views of them.
        places = zip(plan.row_starts[own], plan.row_stops[own], strict=True)
        yield [content[start - offset : end - offset] for start, end in places]
