"""The byte ranges that are read to get rows of many files: rows near each other in a file share one read.

Most rows of a shuffled stream have a read of their own, whose bytes are the row. The others are cut out of their reads.
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.formats.codecs.positioned_reads import read_borders

__all__ = ["FileReads", "ReadPlan"]

Ints = NDArray[np.int64]


class FileReads(NamedTuple):
    """The reads of one file."""

    shard: int
    """Number of the file."""
    first_row: int
    """Number in the shard of the first row that is read."""
    last_row: int
    """Number in the shard of the last row that is read."""
    first_single: int
    """First of this file's reads of a single row, among those of all files."""
    single_stop: int
    """One past the last of them."""
    first_shared: int
    """First of this file's reads of several rows, among those of all files."""
    shared_stop: int
    """One past the last of them."""


class ReadPlan:
    """The positioned reads of some rows: those of single rows, and those of several rows."""

    def __init__(self, shards: NDArray[np.int32], starts: Ints, lengths: Ints, rows: NDArray[np.integer[Any]]) -> None:
        """Plan reads of rows that are sorted by shard and by their first byte.

        Args:
            shards: shard of each row.
            starts: first byte of each row inside its shard.
            lengths: bytes of each row.
            rows: number of each row in its shard.
        """
        # A read begins at a row that is too far behind the row before it. A row between two borders has its own read.
        stops = starts + lengths
        is_border = read_borders(starts, stops, shards)
        is_first = is_border[:-1]
        is_single = is_first & is_border[1:]
        single = np.flatnonzero(is_single)
        shared = np.flatnonzero(~is_single)
        self.positions = np.concatenate([single, shared])
        """Position of each row among those requested: rows with a read of their own, then the others."""
        sizes = lengths[single]
        self.offsets: list[int] = starts[single].tolist()
        """First byte of each read of a single row."""
        self.sizes: list[int] = sizes.tolist()
        self.num_bytes = int(sizes.sum())
        """Bytes of all reads of a single row."""
        border = np.flatnonzero(is_first[shared])
        self._plan_shared(starts[shared], stops[shared], border)
        self._plan_files(shards, rows, single, shared[border])

    def _plan_shared(self, starts: Ints, stops: Ints, first: NDArray[np.intp]) -> None:
        """Plan the reads of several rows each, given the byte range of each of their rows, and the first of each."""
        read_starts = starts[first]
        # Rows may repeat, so the last row of a read is not always the one that ends last.
        sizes = np.maximum.reduceat(stops, first) - read_starts if len(first) else first
        self.shared_offsets: list[int] = read_starts.tolist()
        """First byte of each read of several rows."""
        self.shared_sizes: list[int] = sizes.tolist()
        self.num_shared_bytes = int(sizes.sum())
        """Bytes of all reads of several rows."""
        borders = np.append(first, len(starts))
        self.shared_borders: list[int] = borders.tolist()
        """First row of each of these reads among all of their rows, and the number of these rows."""
        read = np.repeat(np.arange(len(first)), np.diff(borders))
        self.read_of_row: list[int] = read.tolist()
        """Number of the read of each of these rows."""
        shift = read_starts[read]
        self.row_starts: list[int] = (starts - shift).tolist()
        """First byte of each of these rows inside its read."""
        self.row_stops: list[int] = (stops - shift).tolist()

    def _plan_files(
        self, shards: NDArray[np.int32], rows: NDArray[np.integer[Any]], single: Ints, first_shared: Ints
    ) -> None:
        """List the reads of each file.

        Args:
            shards: shard of each row.
            rows: number of each row in its shard.
            single: position of the row of each read of a single row.
            first_shared: position of the first row of each read of several rows.
        """
        # The rows of a file follow each other, and so do its reads in both lists.
        borders = np.flatnonzero(shards[1:] != shards[:-1]) + 1
        first = np.concatenate([np.zeros(min(len(shards), 1), np.intp), borders])
        stop = np.append(first[1:], len(shards))
        self.shards = shards[first]
        """Number of each file."""
        fields = [self.shards, rows[first], rows[stop - 1]]
        for reads in (single, first_shared):
            fields += [np.searchsorted(reads, first), np.searchsorted(reads, stop)]
        # Without the Python code of a named tuple's constructor: there may be as many files as rows.
        values = zip(*(field.tolist() for field in fields), strict=True)
        self.files = list(map(partial(tuple.__new__, FileReads), values))
