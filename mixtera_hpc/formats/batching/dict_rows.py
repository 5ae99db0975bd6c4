"""Batches from rows that a format has as dicts: for formats whose rows are neither JSON lines nor Arrow tables."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.formats.base import BlockRanges, RowBatch, ScanSpec
from mixtera_hpc.formats.batching.row_paths import check_path_forms
from mixtera_hpc.formats.batching.row_type import RowType
from mixtera_hpc.formats.shard_errors import MAX_BAD_ROWS, bad_rows_error

__all__ = ["BadRow", "DictRowBatcher"]


class BadRow(msgspec.Struct, frozen=True):
    """Takes the place of a row that cannot be read."""

    problem: str


class DictRowBatcher:
    """Validates the rows of one unit against the spec, and collects the bad ones."""

    def __init__(self, spec: ScanSpec, path: Path, as_paths: Callable[[Any], Any] | None = None) -> None:
        """Prepare for one unit.

        Args:
            spec: what to return for every row.
            path: the shard.
            as_paths: returns a row as dotted paths see it; None if they see the row itself.
        """
        self._spec = spec
        self._as_paths = as_paths
        self._path = path
        self._type = RowType(spec)
        self._blank = self._type.blank()
        self._bad: list[tuple[int, str]] = []
        self._rows = 0

    def batch(self, rows: Sequence[Any], blocks: BlockRanges, lengths: NDArray[np.int64] | None) -> RowBatch | None:
        """Build a batch from dicts and `BadRow`s. Return None after a bad row, unless bad rows are skipped."""
        decoded = []
        bad = []
        for number, row in enumerate(rows):
            values, problem = self._convert(row)
            decoded.append(values)
            if problem:
                bad.append((number, problem))

        # Positions in the batch become rows of the unit; formats that use this class have one unit per shard.
        if not self._spec.skip_bad:
            self._bad += [(self._rows + number, problem) for number, problem in bad]
        self._rows += len(rows)
        if self._bad:
            return None
        texts = self._type.documents(decoded) if self._spec.documents else None
        columns = self._type.columns(decoded)
        path_forms = self._type.path_forms()
        check_path_forms(self._path, path_forms)
        return RowBatch(
            rows=len(rows),
            blocks=blocks,
            columns=columns,
            path_forms=path_forms,
            lengths=lengths,
            documents=texts,
            raw_rows=list(rows) if self._spec.whole_rows else None,
            bad=tuple(bad),
        )

    def _convert(self, row: Any) -> tuple[Any, str]:
        """Return the row as an instance of the row type, and the problem (empty if there is none)."""
        # A blank row keeps the positions of the rows after it.
        if isinstance(row, BadRow):
            return self._blank, row.problem
        try:
            decoded = msgspec.convert(self._as_paths(row) if self._as_paths else row, self._type.struct)
        except (msgspec.ValidationError, UnicodeDecodeError) as error:
            return self._blank, str(error)
        problems = self._type.problems([decoded])
        return (self._blank, problems[0][1]) if problems else (decoded, "")

    @property
    def should_stop(self) -> bool:
        """True after so many bad rows that the error will not name more."""
        return len(self._bad) >= MAX_BAD_ROWS

    def check(self) -> None:
        """Raise the error for the bad rows of the unit, if there are any.

        Raises:
            DataError: there are bad rows.
        """
        if self._bad:
            raise bad_rows_error(self._path, self._bad[:MAX_BAD_ROWS])
