"""The samples of an index, block by block when they are asked for.

Every rank has a `SampleReader`, which touches the file when the first block is read and no sooner.
"""

import threading
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.index_tables import SampleColumns
from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.index.layout import children, read_texts
from mixtera_hpc.index.open_file import DAMAGE, damaged, open_file
from mixtera_hpc.index.read.column_cache import ColumnCache

__all__ = ["SampleReader"]


class SampleReader:
    """Reads per-sample columns; may be used by several threads at once, which then wait for each other."""

    def __init__(self, path: str | Path, fingerprint: str | None = None, keep_bytes: int = 0) -> None:
        """
        Args:
            fingerprint: the state of an index that the file must hold.
            keep_bytes: so much of what was read lately is kept.
        """
        self.path = Path(path)
        self._kept = ColumnCache(keep_bytes)
        self._fingerprint = fingerprint
        self._lock = threading.Lock()
        self._file: h5py.File | None = None
        self._columns: dict[str, Any] = {}
        self._numbers: dict[str, Any] = {}
        self.bytes_read = 0
        """Of columns, decompressed, as wide as they are stored."""

    def read(self, first_sample: int, rows: int) -> SampleColumns:
        """The samples of one block, from `BlockTable.first_sample` and `BlockTable.rows`.

        Raises:
            PropertyIndexError: the file is missing or damaged.
        """
        return self.read_many([first_sample], [rows])

    def read_many(
        self, first_samples: Sequence[int], rows: Sequence[int], only: Collection[str] | None = None
    ) -> SampleColumns:
        """The samples of several blocks, one after the other.

        Args:
            only: the columns that are looked at, numbers as `numbers/NAME`; others are zero. None reads them all.
        """
        spans = [(int(a), int(a) + int(n)) for a, n in zip(first_samples, rows, strict=True)]
        with self._lock:
            try:
                self._open()
                return self._read(spans, only)
            except DAMAGE as error:
                raise damaged(self.path, error) from None

    def column_types(self) -> dict[str, np.dtype[Any]]:
        """The integer columns that are stored, and as what."""
        with self._lock:
            try:
                self._open()
                return {name: column.dtype for name, column in self._columns.items()}
            except DAMAGE as error:
                raise damaged(self.path, error) from None

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file = None

    def _open(self) -> None:
        if self._file is None:
            self._file = open_file(self.path)
            self._check_state(self._file)
            self._columns = children(self._file["samples"])
            self._numbers = children(self._columns.pop("numbers"))

    def _check_state(self, file: h5py.File) -> None:
        """Refuse a file that took the place of the one whose tables are being read along."""
        if self._fingerprint in (None, *read_texts(file["generations"], "fingerprint")):
            return
        raise PropertyIndexError(
            f"{self.path} is another index than the one this began with: it was built again, derived, or refreshed after "
            "shards were changed or deleted.\n  Put the old file back to go on, or start a new run."
        )

    def _read(self, spans: Sequence[tuple[int, int]], only: Collection[str] | None) -> SampleColumns:
        rows, together = sum(b - a for a, b in spans), spans if self._kept.max_bytes else _neighbours_joined(spans)

        def column(name: str, stored: Any, dtype: Any) -> NDArray[Any]:
            if stored is None or not spans or (only is not None and name not in only):
                return np.zeros(rows, dtype)
            found = [self._kept.get((name, a, b), partial(self._from_file, stored, a, b)) for a, b in together]
            return (found[0] if len(found) == 1 else np.concatenate(found)).astype(dtype, copy=False)

        return SampleColumns(
            combo=column("combo", self._columns.get("combo"), np.int32),
            length=column("length", self._columns.get("length"), np.int64),
            tokens=column("tokens", self._columns.get("tokens"), np.int64),
            numbers={n: column(f"numbers/{n}", stored, np.float64) for n, stored in self._numbers.items()},
        )

    def _from_file(self, stored: Any, start: int, stop: int) -> NDArray[Any]:
        part: NDArray[Any] = stored[start:stop]
        self.bytes_read += part.nbytes
        return part


def _neighbours_joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Fewer, longer spans that cover the same."""
    found: list[tuple[int, int]] = []
    for a, b in spans:
        if found and found[-1][1] == a:
            a = found.pop()[0]
        found.append((a, b))
    return found
