"""Whole blocks of plain files in memory, where a run has more shards than a process may keep open.

Rows that are served together then come from thousands of shards, and most of the time would go into opening, looking up
and closing files for one row each. A small block is read once instead, when its first row is served. Its other rows are
served within the same window, at about the same time. Price: the blocks of the windows in use in memory, which is
`dataplane.lanes` × `dataplane.window_bytes`, more where domains move at their own speeds, and at most the budget; and
the bytes of a block that other domains need at another time are read again.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from mixtera_hpc.dataplane.reading.domain_streams import Documents

__all__ = ["MAX_SMALL_BLOCK_BYTES", "SmallBlocks"]

MAX_SMALL_BLOCK_BYTES = 128 << 10
"""Largest block that is read as a whole: to open a file takes about as long on a parallel file system."""
ReadBytes = Callable[[int], bytes]
"""A function that reads all bytes of a block, given its number."""


class SmallBlocks:
    """The blocks that were used last. One per reading thread."""

    def __init__(self, max_bytes: int, read_bytes: ReadBytes) -> None:
        """Hold nothing yet, and at most `max_bytes` later."""
        self._max_bytes = max_bytes
        self._read_bytes = read_bytes
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._num_bytes = 0
        self.num_reads = 0
        """Number of blocks read so far."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks in memory."""
        return self._num_bytes

    def read(self, documents: Documents) -> list[bytes]:
        """Return the bytes of the rows of `documents`, which are sorted by block and row.

        Raises:
            OSError: a file cannot be opened or read.
            EOFError: a read was short.
        """
        starts = documents.offset.tolist()
        stops = (documents.offset + documents.length).tolist()
        block = documents.block
        borders = [0, *(np.flatnonzero(block[1:] != block[:-1]) + 1).tolist(), len(block)]
        lines: list[bytes] = []
        for number, (first, last) in zip(block[borders[:-1]].tolist(), pairwise(borders), strict=True):
            data = self._get(number)
            lines += [data[start:stop] for start, stop in zip(starts[first:last], stops[first:last], strict=True)]
        return lines

    def _get(self, number: int) -> bytes:
        """Return all bytes of a block, from memory if they are there."""
        data = self._blocks.get(number)
        if data is not None:
            self._blocks.move_to_end(number)
            return data
        data = self._read_bytes(number)
        self.num_reads += 1
        self._blocks[number] = data
        self._num_bytes += len(data)
        while self._num_bytes > self._max_bytes and len(self._blocks) > 1:
            _, oldest = self._blocks.popitem(last=False)
            self._num_bytes -= len(oldest)
        return data
