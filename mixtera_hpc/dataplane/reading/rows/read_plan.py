"""The byte ranges that are read to get rows of many files: rows near each other in a file share one read."""

from collections.abc import Iterator
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.formats.codecs.positioned_reads import merge_nearby

__all__ = ["ReadPlan"]

Ints = NDArray[np.int64]


class ReadPlan:
    """The positioned reads of some rows, in the order of the disk. Reads must be cut in ascending order."""

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
        read_starts = starts[first]
        # Rows may repeat, so the last row of a read is not always the one that ends last.
        sizes = np.maximum.reduceat(stops, first) - read_starts
        self.offsets: list[int] = read_starts.tolist()
        self.sizes: list[int] = sizes.tolist()
        self._bytes_before: list[int] = np.append(0, np.cumsum(sizes)).tolist()
        # Runs of reads of one shard.
        of_read = shards[first]
        borders = [0, *(np.flatnonzero(of_read[1:] != of_read[:-1]) + 1).tolist(), len(first)]
        self.run_shards: list[int] = of_read[borders[:-1]].tolist()
        self.runs = list(pairwise(borders))
        row_borders = bounds[borders]
        self.run_rows: tuple[Ints, Ints] = row_borders[:-1], row_borders[1:] - 1
        """First and last row of each run."""

        shared = np.flatnonzero(np.diff(bounds) > 1)
        self._row_starts: list[int] = starts.tolist() if len(shared) else []
        self._row_stops: list[int] = stops.tolist() if len(shared) else []
        of_shared = zip(shared.tolist(), bounds[shared].tolist(), bounds[shared + 1].tolist(), strict=True)
        # The last entry is behind all reads.
        self._shared: Iterator[tuple[int, int, int]] = chain(of_shared, [(len(first), 0, 0)])
        self._next_shared = next(self._shared)

    def rows_of(self, first: int, contents: list[bytes]) -> list[bytes]:
        """Return the bytes of the rows in the reads from `first` on.

        Raises:
            EOFError: a read is too short.
        """
        end = first + len(contents)
        if sum(map(len, contents)) != self._bytes_before[end] - self._bytes_before[first]:
            raise EOFError
        if self._next_shared[0] >= end:
            return contents
        rows: list[bytes] = []
        next_single = first
        while self._next_shared[0] < end:
            read, first_row, row_stop = self._next_shared
            rows += contents[next_single - first : read - first]
            content = contents[read - first]
            begin = self.offsets[read]
            # Copies of short rows are cheaper than views of them.
            places = zip(self._row_starts[first_row:row_stop], self._row_stops[first_row:row_stop], strict=True)
            rows += [content[start - begin : stop - begin] for start, stop in places]
            next_single = read + 1
            self._next_shared = next(self._shared)
        return rows + contents[next_single - first :]
