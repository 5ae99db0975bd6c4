"""Values that functions make from whole rows: documents of a composed text, and properties of the user's parser.

Each unit of a shard has runners of its own. They collect the rows on which a function fails, and end the scan when
there are enough of them for a message.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import msgspec

from mixtera_hpc.errors import USER_CODE_ERRORS, ConfigError, DataError, UserError
from mixtera_hpc.formats.base import Column, RowBatch, ScanSpec, ScanUnit
from mixtera_hpc.formats.batching.row_paths import check_path_forms
from mixtera_hpc.formats.batching.row_type import RowType
from mixtera_hpc.formats.composed_text import ComposedText
from mixtera_hpc.formats.shard_errors import MAX_BAD_ROWS, bad_rows_error
from mixtera_hpc.formats.shard_file import ShardFile
from mixtera_hpc.formats.user_functions import import_function

__all__ = ["ParserRunner", "TextComposer"]

RowProblem = tuple[int, str]
"""Position of a row, and its problem."""


class _FailedRows:
    """The rows of one unit on which a function has failed."""

    def __init__(self, *, skips: bool, error_of: Callable[[list[RowProblem]], DataError]) -> None:
        """Begin without rows.

        Args:
            skips: True if failed rows are skipped.
            error_of: returns the error for some failed rows, whose positions are those in the unit.
        """
        self._skips = skips
        self._error_of = error_of
        self._num_rows = 0
        """Rows of the batches so far."""
        self._failed: list[RowProblem] = []

    def add(self, batch: RowBatch, failed: list[RowProblem]) -> tuple[RowProblem, ...]:
        """Take the failed rows of the next batch; return those of its rows that are skipped.

        Raises:
            DataError: many rows have failed.
        """
        if self._skips:
            return tuple(sorted([*batch.bad, *failed]))
        # Positions in the batch become rows of the unit.
        self._failed += [(self._num_rows + row, problem) for row, problem in failed]
        self._num_rows += batch.rows
        if len(self._failed) >= MAX_BAD_ROWS:
            self.check()
        return tuple(sorted(batch.bad))

    def check(self) -> None:
        """Raise DataError if rows have failed that are not skipped."""
        if self._failed:
            raise self._error_of(self._failed[:MAX_BAD_ROWS])


class TextComposer:
    """Makes the documents of one unit from whole rows."""

    def __init__(self, shard: ShardFile, unit: ScanUnit, spec: ScanSpec) -> None:
        """Prepare the text of `spec`."""
        self._path = shard.full_path
        self._unit = unit
        self._spec = spec
        self._composed = ComposedText.of(spec.text or "", spec.chat)
        self._forms: dict[str, set[int]] = {}
        self._failed = _FailedRows(skips=spec.skip_bad, error_of=self._error_of)

    def apply(self, batch: RowBatch) -> RowBatch:
        """Return the batch with its documents.

        Raises:
            DataError: many rows have no document.
        """
        # Rows that the format could not read have no value.
        already_bad = {row for row, _ in batch.bad}
        readable = [row for row in range(batch.rows) if row not in already_bad]
        raw_rows = batch.raw_rows or []
        rows = [raw_rows[row] for row in readable]
        texts, problems = self._composed.make(rows)
        self._add_forms(rows)
        failed = [(readable[number], problem) for number, problem in problems]
        documents = [""] * batch.rows
        for row, text in zip(readable, texts, strict=True):
            documents[row] = text

        return replace(
            batch,
            documents=documents if self._spec.documents else None,
            bad=self._failed.add(batch, failed),
            path_forms=_joined_forms(batch.path_forms, self._forms),
        )

    def _add_forms(self, rows: list[Any]) -> None:
        """Note the forms of dotted paths that have values.

        Raises:
            ShardLayoutError: two forms of one path have values.
        """
        for path, numbers in self._composed.path_forms(rows).items():
            self._forms.setdefault(path, set()).update(numbers)
        check_path_forms(self._path, self._forms)

    def check(self) -> None:
        """Raise DataError if rows without a document are not skipped."""
        self._failed.check()

    def _error_of(self, failed: list[RowProblem]) -> DataError:
        error = bad_rows_error(self._path, failed)
        if self._unit.start:
            error.add_note(f"rows are counted from the first one that begins at byte {self._unit.start} or later")
        return error


class ParserRunner:
    """Calls the user's parser on the rows of one unit."""

    def __init__(self, shard: ShardFile, unit: ScanUnit, spec: ScanSpec) -> None:
        """Import the parser of `spec`, which returns the properties of `spec`."""
        self._shard = shard
        self._unit = unit
        self._name = spec.parser.path if spec.parser else ""
        self._parse = import_function(self._name, "data.parser")
        self._type = RowType(ScanSpec(text=None, properties=spec.properties))
        self._blank = self._type.blank()
        self._failed = _FailedRows(skips=spec.skip_bad, error_of=self._error_of)

    def apply(self, batch: RowBatch) -> RowBatch:
        """Return the batch with the columns of the parser's results.

        Raises:
            DataError: the parser has failed on many rows.
        """
        # Rows that the format could not read have no value to parse.
        already_bad = {row for row, _ in batch.bad}
        rows = []
        failed = []
        for number, raw in enumerate(batch.raw_rows or []):
            row, problem = (self._blank, "") if number in already_bad else self._parse_row(raw)
            rows.append(row)
            if problem:
                failed.append((number, problem))

        bad = self._failed.add(batch, failed)
        columns = self._columns(rows)
        # Known once the columns have been taken out of the rows.
        forms = self._type.path_forms()
        check_path_forms(self._shard.full_path, forms)
        return replace(batch, columns=columns, bad=bad, path_forms=_joined_forms(batch.path_forms, forms))

    def _parse_row(self, raw: Any) -> tuple[Any, str]:
        """Return the parser's result for a row, and the problem (empty if there is none)."""
        try:
            row = msgspec.convert(self._parse(raw), self._type.struct)
            problems = self._type.problems([row])
            return (self._blank, f"{self._name}: {problems[0][1]}") if problems else (row, "")
        # A configuration error is no property of the row; anything else the user's code raises makes a bad row.
        except UserError:
            raise
        except USER_CODE_ERRORS as error:
            return self._blank, f"{self._name}: {type(error).__name__}: {error}"

    def _columns(self, rows: list[Any]) -> dict[str, Column]:
        try:
            return self._type.columns(rows)
        except ValueError as error:
            raise ConfigError(
                f"data.parser {self._name} returned a value for a row of {self._shard.path} that cannot be stored: "
                f"{error}.\n"
                "  Change it to return numbers and texts of valid characters."
            ) from None

    def check(self) -> None:
        """Raise DataError if rows on which the parser failed are not skipped."""
        self._failed.check()

    def _error_of(self, failed: list[RowProblem]) -> DataError:
        path = str(self._shard.full_path)
        error = DataError(
            f"data.parser {self._name} fails on rows of {path}, or returns what data.properties does not expect.\n"
            "  Repair it, or skip these rows with data.on_bad_sample=skip."
        )
        # The unit does not know how many rows come before it.
        where = f" of those that begin at byte {self._unit.start} or later" if self._unit.start else ""
        for row, problem in failed:
            error.add_note(f"shard={path!r} row={row}{where}: {problem}")
        return error


def _joined_forms(
    first: Mapping[str, Collection[int]], second: Mapping[str, Collection[int]]
) -> dict[str, tuple[int, ...]]:
    """Return the forms of dotted paths that had values in either."""
    return {path: tuple(sorted({*first.get(path, ()), *second.get(path, ())})) for path in {**first, **second}}
