"""Read and decode rows of files whose rows are decoded alike, from all files in one loop.

Price per row: one positioned read and its share of a decoding call. Price per file and read: 2 µs, and 4 µs more where
it has to be opened, because not all files fit into the process's file descriptors.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.rows.read_plan import ReadPlan

__all__ = ["RowFiles"]

READS_AT_ONCE = 16
"""Reads whose rows are decoded together: their bytes are still in the first cache of a core."""

Ints = NDArray[np.int64]
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
        self,
        shards: NDArray[np.int32],
        starts: Ints,
        lengths: Ints,
        decode: Callable[[Sequence[bytes]], list[Any]],
        enter: EnterShard,
    ) -> list[Any]:
        """Return the decoded rows at some byte ranges, sorted by shard and by their first byte.

        Raises:
            OSError: a file cannot be opened or read.
            EOFError: a read was short, as on network file systems or behind the end of a file.
            ValueError: rows cannot be decoded.
        """
        plan = ReadPlan(shards, starts, lengths)
        rows: list[Any] = []
        contents: list[bytes] = []
        first_content = 0
        places = zip(plan.run_shards, plan.runs, *(ends.tolist() for ends in plan.run_rows), strict=True)
        for shard, (first, last), first_row, last_row in places:
            enter(shard, first_row, last_row)
            descriptor = self._descriptor(shard)
            for begin in range(first, last, READS_AT_ONCE):
                own = slice(begin, min(begin + READS_AT_ONCE, last))
                contents += map(os.pread, repeat(descriptor), plan.sizes[own], plan.offsets[own])
                if len(contents) >= READS_AT_ONCE:
                    rows += decode(plan.rows_of(first_content, contents))
                    first_content += len(contents)
                    contents = []
        if contents:
            rows += decode(plan.rows_of(first_content, contents))
        return rows

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
