"""Scan a shard with every property of the configuration, wherever its value comes from.

A format reads rows. This module adds the properties of the shard's path (`path_properties`), calls the user's parser
(`user_functions`), and applies patterns to values. A constant column costs nothing per row, and a pattern is matched
once per distinct value.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mixtera_hpc.config.schema import DataSetKeys
from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import USER_CODE_ERRORS, ConfigError, DataError, UserError
from mixtera_hpc.formats.base import Column, ParserSpec, PropertyField, RowBatch, ScanSpec, ScanUnit, Vocabulary
from mixtera_hpc.formats.batching.row_paths import check_path_forms
from mixtera_hpc.formats.batching.row_type import RowType
from mixtera_hpc.formats.category_codes import Categories, map_categories
from mixtera_hpc.formats.chat_rows import is_chat
from mixtera_hpc.formats.composed_text import ComposedText, is_composed
from mixtera_hpc.formats.path_properties import is_path_property, path_property_value
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.formats.shard_errors import MAX_BAD_ROWS, bad_rows_error, check_whole_file
from mixtera_hpc.formats.user_functions import import_function, source_digest
from mixtera_hpc.tokens.chat_template import ChatTemplate

__all__ = ["ShardFile", "scan_shard", "scan_spec_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """A shard and the name of its format."""

    root: Path
    path: str
    """Relative to `root`."""
    format: str


def scan_spec_of(
    data: DataSetKeys,
    *,
    documents: bool,
    whole_rows: bool = False,
    vocabulary: Vocabulary | None = None,
    chat: ChatTemplate | None = None,
) -> ScanSpec:
    """Build the scan spec of a data set; properties are sorted by name.

    Args:
        data: the configuration of the data set.
        documents: whether texts are needed, to count their tokens or to call functions on them.
        whole_rows: whether whole rows are needed, to call functions on them.
        vocabulary: the vocabulary of token ids on disk.
        chat: the template of conversations.

    Raises:
        ConfigError: two paths contradict each other, or the parser cannot be imported.
    """
    properties = tuple(
        PropertyField(name=name, path=config.path, kind=Kind(config.kind), pattern=config.pattern)
        for name, config in sorted(data.properties.items())
        if config.path is not None
    )
    spec = ScanSpec(
        text=data.text,
        properties=properties,
        documents=documents,
        skip_bad=data.on_bad_sample == "skip",
        whole_rows=whole_rows,
        parser=_parser_spec(data.parser) if data.parser is not None else None,
        vocabulary=vocabulary,
        max_block_bytes=data.max_block_bytes,
    )
    if data.text is not None and is_composed(data.text):
        spec = replace(spec, text_digest=ComposedText.of(data.text).digest, chat=chat if is_chat(data.text) else None)
    # Refuse paths that contradict each other before any shard is read.
    RowType(replace(spec, text=None if is_composed(spec.text) else spec.text, properties=_row_properties(spec)))
    return spec


def _parser_spec(path: str) -> ParserSpec:
    return ParserSpec(path=path, fingerprint=source_digest(import_function(path, "data.parser")))


def scan_shard(shard: ShardFile, unit: ScanUnit, spec: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
    """Read the rows of one unit, as `Format.scan` does, with all properties.

    Raises:
        DataError: rows cannot be read, or the parser fails on them.
        ConfigError: a pattern for numbers matches something else, or the parser returns a value that cannot be stored.
    """
    parser = _ParserRunner(shard, unit, spec) if spec.parser else None
    file_format = load_format(shard.format)
    composer = None
    if spec.text is not None and is_composed(spec.text) and not file_format.holds_tokens:
        composer = _TextComposer(shard, unit, spec)
    # With a parser, the format returns whole rows and no properties; with a composed text, no documents.
    format_spec = replace(
        spec,
        properties=() if parser else _row_properties(spec),
        whole_rows=parser is not None or composer is not None or spec.whole_rows,
        text=None if is_composed(spec.text) else spec.text,
        documents=spec.documents and not is_composed(spec.text),
    )
    path = shard.root / shard.path
    if unit.start == 0:
        check_whole_file(path, unit.stop, shard.format, may_be_empty=file_format.may_be_empty)
    batches = file_format.scan(path, unit, format_spec, block_rows)
    for batch in batches:
        parsed = parser.apply(batch) if parser else batch
        parsed = composer.apply(parsed) if composer else parsed
        columns = {field.name: _column(field, parsed, shard) for field in spec.properties}
        # Whole rows are dropped as soon as they are parsed, because they are large.
        yield replace(parsed, columns=columns, raw_rows=parsed.raw_rows if spec.whole_rows else None)
    if parser:
        parser.check()
    if composer:
        composer.check()


def _row_properties(spec: ScanSpec) -> tuple[PropertyField, ...]:
    """Return the properties that come from rows, or from the parser's result.

    A number with a pattern is read as text first: its digits are only a part of the value.
    """
    properties = []
    for field in spec.properties:
        if is_path_property(field.path):
            continue
        is_matched_number = field.pattern and field.kind is Kind.NUMBER
        properties.append(replace(field, kind=Kind.CATEGORY) if is_matched_number else field)
    return tuple(properties)


def _column(field: PropertyField, batch: RowBatch, shard: ShardFile) -> Column:
    """Return the column of a property, with its pattern applied and in its kind."""
    column: Column
    if is_path_property(field.path):
        column = _constant_column(field, batch.rows, shard)
    else:
        column = batch.columns[field.name]

    # Only categories can have a pattern: numbers were read as text for it.
    if field.pattern is not None and isinstance(column, Categories):
        search = re.compile(field.pattern).search
        column = map_categories(column, lambda value: _first_group(search(value)))
    if field.kind is Kind.NUMBER and isinstance(column, Categories):
        column = _to_numbers(field, column, shard)
    return column


def _constant_column(field: PropertyField, rows: int, shard: ShardFile) -> Categories:
    """Return the column of a path property: one code for all rows."""
    value = path_property_value(field.path, shard.path, shard.format)
    return Categories([() if value is None else (value,)], np.zeros(rows, np.int32))


def _first_group(match: "re.Match[str] | None") -> str | None:
    """Return the first group of a match, or the whole match if the pattern has no group."""
    if match is None:
        return None
    group: str | None = match.group(1 if match.re.groups else 0)
    return group


def _to_numbers(field: PropertyField, column: Categories, shard: ShardFile) -> Column:
    """Convert texts to numbers.

    Raises:
        ConfigError: a text is not a number.
    """
    try:
        numbers = [float(values[0]) if values else np.nan for values in column.values]
    except ValueError as error:
        raise ConfigError(
            f"{shard.path}: data.properties.{field.name} has kind number, but {error}.\n"
            "  Change its pattern so that it matches digits only."
        ) from None
    # The extra NaN keeps the float64 type if there are no values.
    return np.array([*numbers, np.nan])[column.code]


def _joined_forms(
    first: Mapping[str, Collection[int]], second: Mapping[str, Collection[int]]
) -> dict[str, tuple[int, ...]]:
    """Return the forms of dotted paths that had values in either."""
    return {path: tuple(sorted({*first.get(path, ()), *second.get(path, ())})) for path in {**first, **second}}


class _TextComposer:
    """Makes the documents of one unit from whole rows, and collects the rows that have none."""

    def __init__(self, shard: ShardFile, unit: ScanUnit, spec: ScanSpec) -> None:
        self._path = shard.root / shard.path
        self._unit = unit
        self._spec = spec
        self._composed = ComposedText.of(spec.text or "", spec.chat)
        self._forms: dict[str, set[int]] = {}
        self._rows = 0
        self._bad: list[tuple[int, str]] = []

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

        # Positions in the batch become rows of the unit.
        if not self._spec.skip_bad:
            self._bad += [(self._rows + row, problem) for row, problem in failed]
            failed = []
        self._rows += batch.rows
        if len(self._bad) >= MAX_BAD_ROWS:
            self.check()
        bad = tuple(sorted([*batch.bad, *failed]))
        return replace(
            batch,
            documents=documents if self._spec.documents else None,
            bad=bad,
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
        """Raise the error for rows without a document, if there are any.

        Raises:
            DataError: some rows have no document.
        """
        if not self._bad:
            return
        error = bad_rows_error(self._path, self._bad[:MAX_BAD_ROWS])
        if self._unit.start:
            error.add_note(f"rows are counted from the first one that begins at byte {self._unit.start} or later")
        raise error


class _ParserRunner:
    """Calls the user's parser on the rows of one unit, and collects the rows on which it fails."""

    def __init__(self, shard: ShardFile, unit: ScanUnit, spec: ScanSpec) -> None:
        self._shard = shard
        self._unit = unit
        self._skip_bad = spec.skip_bad
        self._name = spec.parser.path if spec.parser else ""
        self._parse = import_function(self._name, "data.parser")
        self._type = RowType(ScanSpec(text=None, properties=_row_properties(spec)))
        self._blank = self._type.blank()
        self._rows = 0
        self._bad: list[tuple[int, str]] = []

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

        # Positions in the batch become rows of the unit.
        if not self._skip_bad:
            self._bad += [(self._rows + number, problem) for number, problem in failed]
            failed = []
        self._rows += batch.rows
        if len(self._bad) >= MAX_BAD_ROWS:
            self.check()
        columns = self._columns(rows)
        # Known once the columns have been taken out of the rows.
        forms = self._type.path_forms()
        check_path_forms(self._shard.root / self._shard.path, forms)
        bad = tuple(sorted([*batch.bad, *failed]))
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
        """Raise the error for the rows on which the parser failed, if there are any.

        Raises:
            DataError: the parser failed on some rows.
        """
        if not self._bad:
            return
        path = str(self._shard.root / self._shard.path)
        error = DataError(
            f"data.parser {self._name} fails on rows of {path}, or returns what data.properties does not expect.\n"
            "  Repair it, or skip these rows with data.on_bad_sample=skip."
        )
        # The unit does not know how many rows come before it.
        where = f" of those that begin at byte {self._unit.start} or later" if self._unit.start else ""
        for row, problem in self._bad[:MAX_BAD_ROWS]:
            error.add_note(f"shard={path!r} row={row}{where}: {problem}")
        raise error
