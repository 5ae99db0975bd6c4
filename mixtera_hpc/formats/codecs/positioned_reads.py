"""Positioned reads that several threads share a descriptor for, and which neighbouring rows to read at once."""

import itertools
import os
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.formats.base import BlockRef

__all__ = ["merge_nearby", "read_fully", "row_byte_ranges"]

MERGE_BYTES = 32 << 10
"""Wanted rows nearer than this are read together with what lies between them."""


def read_fully(fd: int, size: int, offset: int) -> bytes:
    """`size` bytes from `offset`, fewer only at the end of the file; network file systems may return less at once."""
    data = os.pread(fd, size, offset)
    while len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data


def merge_nearby(starts: NDArray[np.int64], stops: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Slices of rows that are read at once."""
    gaps = np.flatnonzero(starts[1:] - stops[:-1] > MERGE_BYTES) + 1
    bounds = [0, *gaps.tolist(), len(starts)] if len(starts) else [0]
    return itertools.pairwise(bounds)


def row_byte_ranges(
    block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First byte inside the shard, and bytes, of some rows of a block; `lengths` has all rows of the block."""
    stops = block.offset + np.cumsum(lengths)
    return (stops - lengths)[rows], lengths[rows]
