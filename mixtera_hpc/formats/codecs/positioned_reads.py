"""Positioned reads: threads share one file descriptor without a lock, and rows near each other share one read."""

import errno
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.formats.base import BlockRef
from mixtera_hpc.formats.shard_errors import open_shard

__all__ = ["OpenShard", "merge_nearby", "read_borders", "read_each_fully", "read_fully", "row_byte_ranges"]

MAX_GAP_BYTES = 32 << 10
"""Largest number of bytes between two rows that are read in one call, together with these bytes."""
MAX_UNUSED = 0.25
"""Bytes between rows that one call of `merge_nearby` may add, per byte of the rows themselves."""


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


def read_each_fully(fd: int, sizes: Sequence[int], offsets: Sequence[int]) -> list[bytes]:
    """Read several byte ranges; see `read_fully`.

    Raises:
        ValueError: a size or an offset is negative. An index that is wrong asks for such ranges.
    """
    try:
        contents = list(map(os.pread, itertools.repeat(fd), sizes, offsets))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ValueError("the index names bytes that no file has") from None
    # Short reads are so rare that reading everything again costs nothing.
    if sum(map(len, contents)) < sum(sizes):
        return list(map(read_fully, itertools.repeat(fd), sizes, offsets))
    return contents


def merge_nearby(
    starts: NDArray[np.int64], stops: NDArray[np.int64], files: NDArray[np.integer[Any]] | None = None
) -> NDArray[np.intp]:
    """Group rows that are read in one call, given the byte range of each row in ascending order.

    Args:
        starts: first byte of each row.
        stops: one past the last byte of each row.
        files: number of the file of each row, ascending; None if there is one file.

    Returns:
        Bounds of the groups: rows [bounds[i], bounds[i + 1]) are read in call i.
    """
    return np.flatnonzero(read_borders(starts, stops, files)) if len(starts) else np.zeros(1, np.intp)


def read_borders(
    starts: NDArray[np.int64], stops: NDArray[np.int64], files: NDArray[np.integer[Any]] | None = None
) -> NDArray[np.bool_]:
    """Return a mask of the rows that begin a call, see `merge_nearby`, followed by True; shape (n + 1,)."""
    # Rows of other domains lie between those of one domain. Close the smallest gaps first, and only so many that all
    # reads together have at most 1 + MAX_UNUSED times the bytes of the rows.
    gaps = starts[1:] - stops[:-1]
    is_near = gaps <= MAX_GAP_BYTES
    if files is not None:
        is_near &= files[1:] == files[:-1]
    near = np.flatnonzero(is_near)
    near_gaps = np.maximum(gaps[near], 0)
    ascending = np.argsort(near_gaps, kind="stable")
    budget = MAX_UNUSED * int((stops - starts).sum())
    num_closed = int(np.searchsorted(np.cumsum(near_gaps[ascending]), budget, side="right"))

    is_border = np.ones(len(starts) + 1, np.bool_)
    is_border[near[ascending[:num_closed]] + 1] = False
    return is_border


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
