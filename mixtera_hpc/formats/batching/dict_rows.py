"""Rows that a format has as dicts → batches: for formats whose rows are not written as one piece of JSON or one table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.formats.base import MAX_BAD_ROWS, BlockRanges, RowBatch, ScanSpec, bad_rows
from mixtera_hpc.formats.batching.row_type import RowType

__all__ = ["BadRow", "RowScanner"]


class BadRow(msgspec.Struct, frozen=True):
    """Stands where a row cannot be read."""

    problem: str


class RowScanner:
    """Checks the rows of one unit against what is wanted of them, and remembers those that do not have it."""

    def __init__(self, fields: ScanSpec, path: Path, first_row: int = 0) -> None:
        self._fields, self._path = fields, path
        self._type = RowType(fields)
        self._blank = self._type.blank()
        self._bad: list[tuple[int, str]] = []
        self._rows = first_row

    def batch(self, rows: Sequence[Any], blocks: BlockRanges, lengths: NDArray[np.int64]) -> RowBatch | None:
        """A batch of dicts and `BadRow`s; None once a row was bad, unless bad rows are skipped."""
        decoded, bad = [], []
        for number, row in enumerate(rows):
            try:
                problem = row.problem if isinstance(row, BadRow) else None
                decoded.append(self._blank if problem else msgspec.convert(row, self._type.struct))
            except msgspec.ValidationError as error:
                decoded.append(self._blank)
                problem = str(error)
            if problem:
                bad.append((number, problem))
        if not self._fields.skip_bad:
            self._bad += [(self._rows + number, problem) for number, problem in bad]
            bad = []
        self._rows += len(rows)
        return None if self._bad else self._batch(rows, decoded, blocks, lengths, bad)

    @property
    def has_enough(self) -> bool:
        """Whether so many bad rows were found that more would not help."""
        return len(self._bad) >= MAX_BAD_ROWS

    def check(self) -> None:
        """Raise for the bad rows found.

        Raises:
            DataError: there are any.
        """
        if self._bad:
            raise bad_rows(self._path, self._bad[:MAX_BAD_ROWS])

    def _batch(self, rows: Sequence[Any], decoded: list[Any], blocks: BlockRanges, lengths: Any, bad: Any) -> RowBatch:
        return RowBatch(
            rows=len(rows),
            blocks=blocks,
            columns=self._type.columns(decoded),
            lengths=lengths,
            documents=self._type.documents(decoded) if self._fields.documents else None,
            raw=list(rows) if self._fields.rows else None,
            bad=tuple(bad),
        )
