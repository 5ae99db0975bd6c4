"""Built windows in memory that the reading processes of a node share.

Ranks that read the same lane need the same windows. Whoever needs a window first builds it, and the others copy it. A
process that finds a window in progress goes on with the next one, so processes that need several windows at the same
time divide the work. Locks, and what happens when a process is killed or stopped, are those of `SharedBlocks`. Price:
about 0.1 ms per window that is built and 0.05 ms per window that is copied.
"""

import mmap
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.lookup.epoch_orders import WindowKey
from mixtera_hpc.dataplane.reading.lookup.window_table import WindowDocuments, WindowTable
from mixtera_hpc.formats.codecs.shared_blocks import Buffer, SharedBlocks

__all__ = ["SharedWindows"]

Ints = NDArray[np.int64]

MIN_SHARED_ROWS = 1024
"""Documents of the smallest window that is shared: it takes 0.3 ms to build, index columns included."""


class SharedWindows:
    """The windows of a node, as one reading thread sees them. Not thread-safe."""

    def __init__(self, fd: int) -> None:
        """Map the memory behind a descriptor, which may be closed afterwards.

        All its readers have the same `Source`, so domain, epoch and number identify a window. See `share_windows`.
        """
        self._blocks = SharedBlocks(fd)
        weakref.finalize(self, self._blocks.close)

    def can_share(self, num_rows: Ints, table: WindowTable) -> NDArray[np.bool_]:
        """Return which windows the processes share, by the number of their documents; shape (len(num_rows),).

        The memory does not keep a very large window, so every process builds it, without waiting for another one.
        """
        fits = num_rows * table.row_bytes <= self._blocks.max_block_bytes
        return (num_rows >= MIN_SHARED_ROWS) & fits

    def build(
        self, keys: Sequence[WindowKey], table: WindowTable, build_one: Callable[[int], WindowDocuments]
    ) -> Iterator[tuple[int, WindowDocuments]]:
        """Yield the documents of windows, in any order, with the position of each window in `keys`.

        Args:
            keys: the windows.
            table: has the types of the columns.
            build_one: builds the window at a position of `keys`, if no other process has.
        """
        positions = list(range(len(keys)))
        for read in (self._blocks.read_unless_busy, self._blocks.read):
            busy = []
            for position in positions:
                domain, epoch, number = keys[position]
                name = f"window {domain} {epoch}"
                documents = read(name, number, partial(_copy, table), partial(_built, build_one, position))
                if documents is None:
                    busy.append(position)
                else:
                    yield position, documents
            positions = busy


def _built(build_one: Callable[[int], WindowDocuments], position: int) -> tuple[list[Buffer], WindowDocuments]:
    """Return a new window as bytes, the columns with the widest values first, and its documents."""
    documents = build_one(position)
    columns = [documents.items, documents.block, documents.offset, documents.length, documents.row]
    return [np.ascontiguousarray(column).data for column in columns if column is not None], documents


def _copy(table: WindowTable, memory: mmap.mmap, first: int, stop: int) -> WindowDocuments:
    """Return the documents of a window, whose bytes lie between two places of the memory."""
    data = memory[first:stop]
    types = {"block": np.dtype(np.int32), **{name: np.dtype(table.types[name]) for name in ("offset", "length", "row")}}
    if not table.has_unit_items:
        types = {"items": np.dtype(np.int64), **types}
    count = len(data) // sum(dtype.itemsize for dtype in types.values())
    columns: dict[str, Any] = {"items": None}
    offset = 0
    for name, dtype in types.items():
        columns[name] = np.frombuffer(data, dtype, count, offset)
        offset += columns[name].nbytes
    return WindowDocuments(**columns)
