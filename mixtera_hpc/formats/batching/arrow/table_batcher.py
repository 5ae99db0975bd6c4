"""`TableBatcher`: batches of properties and texts from the tables of Parquet and Arrow files."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mixtera_hpc.errors import ConfigError, DataError
from mixtera_hpc.formats.base import BlockRanges, Column, RowBatch, ScanSpec, null_column
from mixtera_hpc.formats.batching.arrow.column_paths import check_single_form, column_at, type_at
from mixtera_hpc.formats.batching.arrow.property_columns import property_column
from mixtera_hpc.formats.batching.arrow.python_objects import rows_of, texts_and_problems, undecodable_rows
from mixtera_hpc.formats.batching.arrow.value_types import TEXT_TYPES
from mixtera_hpc.formats.shard_errors import MAX_BAD_ROWS, bad_rows_error

__all__ = ["TableBatcher"]


class TableBatcher:
    """Turns the tables of one unit into batches, and collects rows whose text cannot be read.

    Raises:
        DataError: the schema has no usable text column, or has two columns of one name.
    """

    def __init__(self, path: Path, schema: Any, spec: ScanSpec) -> None:
        self._path = path
        self._spec = spec
        self._bad: list[tuple[int, str]] = []
        _check_unique_names(schema.names, path)
        if spec.text is not None:
            _check_text_column(schema, spec.text, path)
        for field in spec.properties:
            check_single_form(schema, field.path, path)
        if spec.text is not None:
            check_single_form(schema, spec.text, path)
        self.properties = {field.path for field in spec.properties if type_at(schema, field.path) is not None}
        """Paths of the properties that the file has."""

    def batch(self, rows: int, first_row: int, table: Any, blocks: BlockRanges) -> RowBatch | None:
        """Build the batch of the next rows. Return None after a bad row, unless bad rows are skipped.

        Args:
            rows: number of rows.
            first_row: number of the first one in the shard.
            table: the needed columns of these rows; None if no column is needed.
            blocks: the blocks that end with these rows.
        """
        texts, bad = self._texts(table)
        if self._spec.check_rows and table is not None:
            # A row that is bad twice keeps the problem of its text.
            bad = sorted((dict(undecodable_rows(table)) | dict(bad)).items())
        # Collect no more bad rows than the error will name.
        if bad and not self._spec.skip_bad:
            self._bad += [(first_row + row, problem) for row, problem in bad[: MAX_BAD_ROWS - len(self._bad)]]
        if self._bad:
            return None

        columns: dict[str, Column] = {}
        for field in self._spec.properties:
            values = column_at(table, field.path)
            if values is None:
                columns[field.name] = null_column(field.kind, rows)
            else:
                columns[field.name] = property_column(values, field, self._path)
        raw_rows = rows_of(table, self._path) if self._spec.whole_rows else None
        return RowBatch(rows=rows, blocks=blocks, columns=columns, documents=texts, raw_rows=raw_rows, bad=tuple(bad))

    def check(self) -> None:
        """Raise the error for the bad rows of the unit, if there are any.

        Raises:
            DataError: there are bad rows.
        """
        if self._bad:
            raise bad_rows_error(self._path, self._bad)

    def _texts(self, table: Any) -> tuple[list[str] | None, list[tuple[int, str]]]:
        """Return the texts, if the spec asks for them, and (row, problem) for every row of `table` without one."""
        if self._spec.documents and self._spec.text is None:
            raise ConfigError("Texts are needed, but data.text is null. Set it, or remove dataplane.tokenizer.")
        text = column_at(table, self._spec.text) if self._spec.text is not None else None
        if text is None:
            return None, []

        # A null entry of the dictionary does not count in `null_count` of the rows: decode the dictionary first.
        if pa.types.is_dictionary(text.type) and text.dictionary.null_count:
            text = pc.cast(text, text.type.value_type)
        missing = np.flatnonzero(text.is_null().to_numpy(zero_copy_only=False)) if text.null_count else ()
        bad = [(int(row), f"{self._spec.text!r} is null") for row in missing]
        if not self._spec.documents:
            return None, bad

        texts, undecodable = texts_and_problems(text)
        bad = sorted([*bad, *undecodable])
        for row, _ in bad:
            texts[row] = ""
        return texts, bad


def _check_unique_names(names: list[str], path: Path) -> None:
    """Refuse a file with two columns of one name."""
    for name in names:
        if names.count(name) > 1:
            raise DataError(
                f"{path} has several columns {name!r}.\n  Rename them, or exclude the file with data.exclude."
            )


def _check_text_column(schema: Any, text: str, path: Path) -> None:
    """Refuse a file without a text column at the path `text`."""
    text_type = type_at(schema, text)
    if text_type is None:
        columns = ", ".join(schema.names[:20])
        raise DataError(
            f"{path} has no column {text!r}, which data.text names. Its columns are: {columns}.\n"
            "  Set data.text to one of them, or exclude the file with data.exclude."
        )
    # A dictionary-encoded column counts as a column of its values. A column of nulls has bad rows only.
    value_type = text_type.value_type if pa.types.is_dictionary(text_type) else text_type
    if value_type not in TEXT_TYPES and not pa.types.is_null(value_type):
        raise DataError(
            f"{path}: column {text!r}, which data.text names, has type {text_type}; text is required.\n"
            "  Set data.text to another column, or exclude the file with data.exclude."
        )
