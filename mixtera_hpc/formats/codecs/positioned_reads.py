"""Positioned reads: threads share one file descriptor without a lock, and rows near each other share one read."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.formats.base import BlockRef
from mixtera_hpc.formats.shard_errors import open_shard

__all__ = ["OpenShard", "merge_nearby", "read_fully", "row_byte_ranges"]

# Two rows with at most this many bytes between them are read in one call, together with the bytes between them.
MAX_GAP_BYTES = 32 << 10


class OpenShard:
    """An open shard. Several threads may read from `fd` at the same time.

    Raises:
        DataError: the shard cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.fd = open_shard(path)

    def close(self) -> None:
        """Release the file descriptor. A second call does nothing."""
        # Take the descriptor first: its number may belong to another file as soon as it is closed.
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def read_fully(fd: int, size: int, offset: int) -> bytes:
    """Read `size` bytes at `offset`; fewer only at the end of the file. Network file systems may return short reads."""
    # Nearly always one call: the loop runs for short reads only.
    data = os.pread(fd, size, offset)
    while len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data


def merge_nearby(starts: NDArray[np.int64], stops: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield slices (first, last) of rows to read in one call, given the byte range of each row in ascending order."""
    # A new read begins at every row that is too far from the end of the row before it.
    breaks = np.flatnonzero(starts[1:] - stops[:-1] > MAX_GAP_BYTES) + 1
    bounds = [0, *breaks.tolist(), len(starts)] if len(starts) else [0]
    return itertools.pairwise(bounds)


def row_byte_ranges(
    block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first byte inside the shard and the length of the named rows of a block.

    Args:
        block: the block.
        lengths: bytes of every row of the block, shape (block.rows,).
        rows: positions inside the block.
    """
    # The rows of a block lie one after the other from its first byte.
    stops = block.offset + np.cumsum(lengths)
    starts = stops - lengths
    return starts[rows], lengths[rows]
