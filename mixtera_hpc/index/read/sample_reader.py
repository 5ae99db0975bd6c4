"""Read the per-sample columns of an index, block by block on request.

Every rank has a `SampleReader`. It opens the file when it reads the first block, not before.
"""

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.index_tables import SampleColumns
from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.index.layout import SIZE_NUMBERS, open_children, read_texts
from mixtera_hpc.index.open_file import DAMAGE, damaged, open_file
from mixtera_hpc.index.read.column_cache import ColumnCache
from mixtera_hpc.index.table_values import check_range

__all__ = ["SampleReader", "SampleSource"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSource:
    """Place of the samples of one index. Rank 0 sends it to every rank."""

    path: str
    fingerprint: str
    first_sample: int = 0
    """Position of its first sample among the samples of all joined indexes."""
    combos: list[int] | None = None
    """Own combo number → number among the joined combos; None: the index is not joined with others."""
    numbers: list[str] | None = None
    """Names of the number properties of all joined indexes; None: its own."""


class SampleReader:
    """Reads per-sample columns. Several threads may share one; they take turns."""

    def __init__(self, path: str | Path, fingerprint: str | None = None, cache_bytes: int = 0) -> None:
        """Prepare to read; nothing is opened yet.

        Args:
            path: the index file.
            fingerprint: the generation that the file must contain; None accepts any.
            cache_bytes: size of the cache of column ranges that were read last.
        """
        self.path = Path(path)
        self._cache = ColumnCache(cache_bytes)
        self._fingerprint = fingerprint
        # h5py serializes all calls of a process anyway; the lock protects our own state as well.
        self._lock = threading.Lock()
        self._file: h5py.File | None = None
        self._columns: dict[str, Any] = {}
        self._numbers: dict[str, Any] = {}
        self._chunk_rows = 1
        self._num_combos = 0
        self.bytes_read = 0
        """Bytes of the column values read so far: decompressed, in their stored types."""

    def read(self, first_sample: int, rows: int) -> SampleColumns:
        """Read the samples of one block, given its `BlockTable.first_sample` and `BlockTable.rows`.

        Raises:
            PropertyIndexError: the file is missing or damaged.
        """
        return self.read_many([first_sample], [rows])

    def read_many(
        self, first_samples: Sequence[int], rows: Sequence[int], only: Collection[str] | None = None
    ) -> SampleColumns:
        """Read the samples of several blocks and concatenate them.

        Args:
            first_samples: `BlockTable.first_sample` of every block.
            rows: `BlockTable.rows` of every block.
            only: the columns to read, numbers as `numbers/NAME`; the others are returned as zeros. None reads all but
                the built-in numbers.

        Raises:
            PropertyIndexError: the file is missing or damaged.
        """
        ranges = [(int(first), int(first) + int(count)) for first, count in zip(first_samples, rows, strict=True)]
        return self._with_file(lambda: self._read_ranges(ranges, only))

    def column_types(self) -> dict[str, np.dtype[Any]]:
        """Return the stored type of every integer column."""
        return self._with_file(lambda: {name: column.dtype for name, column in self._columns.items()})

    def close(self) -> None:
        """Close the file. A later read opens it again."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file = None

    def _with_file(self, read: Callable[[], T]) -> T:
        """Call `read` with the file open, one thread at a time."""
        with self._lock:
            try:
                self._open()
                return read()
            except DAMAGE as error:
                raise damaged(self.path, error) from None

    def _open(self) -> None:
        if self._file is None:
            self._file = open_file(self.path)
            self._check_generation(self._file)
            self._chunk_rows = int(self._file.attrs["chunk_rows"])
            self._num_combos = int(self._file["combos"].attrs["num_combos"])
            self._columns = open_children(self._file["samples"])
            self._numbers = open_children(self._columns.pop("numbers"))

    def _check_generation(self, file: h5py.File) -> None:
        """Refuse a file that replaced the one whose tables are in use."""
        # A refresh that only added shards keeps the generation, and with it all positions.
        if self._fingerprint in (None, *read_texts(file["generations"], "fingerprint")):
            return
        raise PropertyIndexError(
            f"{self.path} is no longer the index that this run began with. It was rebuilt, derived, or refreshed after "
            "shards were changed or deleted.\n  Restore the old file to continue, or start a new run."
        )

    def _read_ranges(self, ranges: Sequence[tuple[int, int]], only: Collection[str] | None) -> SampleColumns:
        rows = sum(stop - start for start, stop in ranges)
        # The cache works block by block; without one, blocks near each other are read in one call.
        reads = [] if self._cache.max_bytes else _merge_nearby(ranges, self._chunk_rows)

        def column(name: str, stored: Any, dtype: Any, key: str | None = None) -> NDArray[Any]:
            # A column that is not stored (no token counts) or not requested is all zeros.
            if stored is None or not ranges or (only is not None and (key or name) not in only):
                return np.zeros(rows, dtype)
            if self._cache.max_bytes:
                values = [self._cached(name, stored, *own) for own in ranges]
            else:
                values = [part for own in reads for part in self._read_together(stored, own)]
            # Without a copy for the usual case of one range.
            joined = values[0] if len(values) == 1 else np.concatenate(values)
            return joined.astype(dtype, copy=False)

        numbers = {name: column(f"numbers/{name}", stored, np.float64) for name, stored in self._numbers.items()}
        for name, source in SIZE_NUMBERS.items():
            key = f"numbers/{name}"
            if only is not None and key in only:
                sizes = column(source, self._columns.get(source), np.float64, key)
                # Every row has bytes, so 0 means that the format has no byte range for it.
                numbers[name] = np.where(sizes == 0, np.nan, sizes) if name == "bytes" else sizes

        combo = column("combo", self._columns.get("combo"), np.int32)
        check_range("samples/combo", combo, 0, self._num_combos - 1)
        return SampleColumns(
            combo=combo,
            length=column("length", self._columns.get("length"), np.int64),
            tokens=column("tokens", self._columns.get("tokens"), np.int64),
            numbers=numbers,
        )

    def _cached(self, name: str, stored: Any, start: int, stop: int) -> NDArray[Any]:
        return self._cache.get((name, start, stop), lambda: self._read_together(stored, [(start, stop)])[0])

    def _read_together(self, stored: Any, ranges: Sequence[tuple[int, int]]) -> list[NDArray[Any]]:
        """Return the values of ascending ranges, which are read in one call."""
        # HDF5 decompresses whole chunks; a block begins at a chunk, so little is decompressed in vain.
        first = ranges[0][0]
        values: NDArray[Any] = stored[first : ranges[-1][1]]
        self.bytes_read += values.nbytes
        return [values[start - first : stop - first] for start, stop in ranges]


def _merge_nearby(ranges: Sequence[tuple[int, int]], chunk_rows: int) -> list[list[tuple[int, int]]]:
    """Group ascending ranges that are read in one call; ranges without a gap become one.

    Blocks begin at a chunk, so a gap that is shorter than a chunk holds nothing but the rest of a chunk.
    """
    reads: list[list[tuple[int, int]]] = []
    end = None
    for start, stop in ranges:
        if end is None or not 0 <= start - end < chunk_rows:
            reads.append([(start, stop)])
        elif start == end:
            reads[-1][-1] = reads[-1][-1][0], stop
        else:
            reads[-1].append((start, stop))
        end = stop
    return reads
