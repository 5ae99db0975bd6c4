"""The byte ranges that are read to get rows of many files: rows near each other in a file share one read.

Most rows of a shuffled stream have a read of their own, whose bytes are the row. The others are cut out of their reads.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.lookup.columns import concatenated_ranges
from mixtera_hpc.formats.codecs.positioned_reads import merge_nearby

__all__ = ["FileReads", "ReadPlan"]

Ints = NDArray[np.int64]


class FileReads(NamedTuple):
    """The reads of one file."""

    shard: int
    first_row: int
    """Position of its first row among all rows."""
    row_stop: int
    first_single: int
    """Number of its first read of a single row."""
    single_stop: int
    first_shared: int
    """Number of its first read of several rows."""
    shared_stop: int


class ReadPlan:
    """The positioned reads of some rows: those of single rows, and those of several rows."""

    def __init__(self, shards: NDArray[np.int32], starts: Ints, lengths: Ints) -> None:
        """Plan reads of rows that are sorted by shard and by their first byte.

        Args:
            shards: shard of each row.
            starts: first byte of each row inside its shard.
            lengths: bytes of each row.
        """
        stops = starts + lengths
        bounds = merge_nearby(starts, stops, shards)
        first = bounds[:-1]
        num_rows = bounds[1:] - first
        is_shared = num_rows > 1
        single = first[~is_shared]
        first_shared = first[is_shared]
        shared = concatenated_ranges(first_shared, num_rows[is_shared])
        self.positions = np.concatenate([single, shared])
        """Position of each row among those requested: rows with a read of their own, then the others."""
        self.offsets: list[int] = starts[single].tolist()
        """First byte of each read of a single row."""
        self.sizes: list[int] = lengths[single].tolist()
        self._plan_shared(starts, stops, first_shared, shared)

        # For each file: the range of its rows, of its reads of single rows, and of its reads of several rows.
        is_border = np.ones(len(shards) + 1, np.bool_)
        np.not_equal(shards[1:], shards[:-1], out=is_border[1:-1])
        row_borders = np.flatnonzero(is_border)
        fields = [shards[row_borders[:-1]].tolist()]
        for borders in (row_borders, np.searchsorted(single, row_borders), np.searchsorted(first_shared, row_borders)):
            fields += [borders[:-1].tolist(), borders[1:].tolist()]
        # Without the Python code of a named tuple's constructor: there may be as many files as rows.
        self.files = list(map(partial(tuple.__new__, FileReads), zip(*fields, strict=True)))

    def _plan_shared(self, starts: Ints, stops: Ints, first: NDArray[np.intp], rows: Ints) -> None:
        """Plan the reads of several rows each, given the first row of each read and all of their rows."""
        borders = np.searchsorted(rows, first)
        self.shared_offsets: list[int] = starts[first].tolist()
        """First byte of each read of several rows."""
        # Rows may repeat, so the last row of a read is not always the one that ends last.
        ends = np.maximum.reduceat(stops[rows], borders) if len(first) else first
        self.shared_sizes: list[int] = (ends - starts[first]).tolist()
        self.shared_borders: list[int] = [*borders.tolist(), len(rows)]
        """First row of each of these reads among all of their rows, and the number of these rows."""
        read = np.repeat(np.arange(len(first)), np.diff(self.shared_borders))
        self.read_of_row: list[int] = read.tolist()
        """Number of the read of each of these rows."""
        read_starts = starts[first][read]
        self.row_starts: list[int] = (starts[rows] - read_starts).tolist()
        """First byte of each of these rows inside its read."""
        self.row_stops: list[int] = (stops[rows] - read_starts).tolist()
