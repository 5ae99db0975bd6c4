"""A shard → batches with every property the configuration names, wherever it comes from.

A format knows rows; this adds what the path says (`origin`), what the user's function makes of a row (`parser`), and takes
patterns out of values. Constant columns cost nothing per row; patterns are matched once per distinct value.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mixtera_hpc.config.schema import DataConfig
from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import ConfigError, DataError, UserError
from mixtera_hpc.formats.base import (
    MAX_BAD_ROWS,
    Column,
    ParserSpec,
    PropertyField,
    RowBatch,
    ScanSpec,
    ScanUnit,
    Vocabulary,
)
from mixtera_hpc.formats.batching.row_type import RowType
from mixtera_hpc.formats.category_codes import Categories, map_categories
from mixtera_hpc.formats.path_properties import is_path_property, path_property_value
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.formats.user_functions import import_function, source_digest

__all__ = ["ShardFile", "scan_shard", "scan_spec_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """A shard and the name of its format."""

    root: Path
    path: str
    """Relative to `root`."""
    format: str


def scan_spec_of(data: DataConfig, *, documents: bool, vocabulary: Vocabulary | None = None) -> ScanSpec:
    """What a configuration wants of every row; properties sorted by name.

    Args:
        documents: whether texts are wanted, to count their tokens or for functions over them.
        vocabulary: what token ids on disk are held against.

    Raises:
        ConfigError: a path looks inside what another takes as a value, or both take it as values of different kinds; a parser
            that cannot be imported.
    """
    properties = tuple(
        PropertyField(name=name, path=spec.path, kind=Kind(spec.kind), pattern=spec.pattern)
        for name, spec in sorted(data.properties.items())
        if spec.path is not None
    )
    fields = ScanSpec(
        text=data.text,
        properties=properties,
        documents=documents,
        skip_bad=data.on_bad_sample == "skip",
        parser=_parser(data.parser) if data.parser is not None else None,
        vocabulary=vocabulary,
        max_block_bytes=data.max_block_bytes,
    )
    RowType(replace(fields, properties=_row_fields(fields)))  # Paths that clash are refused before a shard is read.
    return fields


def _parser(path: str) -> ParserSpec:
    return ParserSpec(path=path, fingerprint=source_digest(import_function(path, "data.parser")))


def scan_shard(shard: ShardFile, unit: ScanUnit, fields: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
    """Read the rows of one unit, as `Format.scan` does, with all properties.

    Raises:
        DataError: rows that cannot be read, or that the parser fails on.
        ConfigError: a pattern that is to find numbers finds others, or a parser returns what no file can hold: no fault of the data.
    """
    inner = replace(fields, properties=() if fields.parser else _row_fields(fields), rows=fields.parser is not None)
    parsed = _Parsed(shard, unit, fields) if fields.parser else None
    for found in load_format(shard.format).scan(shard.root / shard.path, unit, inner, block_rows):
        batch = parsed.add(found) if parsed else found
        yield replace(batch, columns={f.name: _column(f, batch, shard) for f in fields.properties}, raw=None)
    if parsed:
        parsed.check()


def _row_fields(fields: ScanSpec) -> tuple[PropertyField, ...]:
    """The properties that rows (or what a parser makes of them) have; with a pattern they are read as text."""
    rows = (f for f in fields.properties if not is_path_property(f.path))
    return tuple(replace(f, kind=Kind.CATEGORY) if f.pattern and f.kind is Kind.NUMBER else f for f in rows)


def _column(field: PropertyField, batch: RowBatch, shard: ShardFile) -> Column:
    column = batch.columns[field.name] if not is_path_property(field.path) else _constant(field, batch.rows, shard)
    if field.pattern is not None and isinstance(column, Categories):
        search = re.compile(field.pattern).search
        column = map_categories(column, lambda value: _first_group(search(value)))
    if field.kind is Kind.NUMBER and isinstance(column, Categories):
        return _numbers(field, column, shard)
    return column


def _constant(field: PropertyField, rows: int, shard: ShardFile) -> Categories:
    value = path_property_value(field.path, shard.path, shard.format)
    return Categories([() if value is None else (value,)], np.zeros(rows, np.int32))


def _first_group(match: "re.Match[str] | None") -> str | None:
    if match is None:
        return None
    found: str | None = match.group(1 if match.re.groups else 0)
    return found


def _numbers(field: PropertyField, column: Categories, shard: ShardFile) -> Column:
    try:
        values = [float(value[0]) if value else np.nan for value in column.values]
    except ValueError as error:
        raise ConfigError(
            f"{shard.path}: data.properties.{field.name} is of kind number, but {error}.\n  Make its pattern match digits only."
        ) from None
    return np.array([*values, np.nan])[column.code]


class _Parsed:
    """Runs the user's parser over the rows of one unit."""

    def __init__(self, shard: ShardFile, unit: ScanUnit, fields: ScanSpec) -> None:
        self._shard, self._unit, self._skip = shard, unit, fields.skip_bad
        self._name = fields.parser.path if fields.parser else ""
        self._parser = import_function(self._name, "data.parser")
        self._type = RowType(ScanSpec(text=None, properties=_row_fields(fields)))
        self._blank = self._type.blank()
        self._rows = 0
        self._bad: list[tuple[int, str]] = []

    def add(self, batch: RowBatch) -> RowBatch:
        """The batch with the columns of what the parser returns."""
        known, found, rows = {row for row, _ in batch.bad}, [], []
        for number, raw in enumerate(batch.raw or []):
            try:
                rows.append(self._blank if number in known else self._parse(raw))
            except UserError:
                raise
            except Exception as error:
                rows.append(self._blank)
                found.append((number, f"{self._name}: {type(error).__name__}: {error}"))
        if not self._skip:
            self._bad += [(self._rows + number, problem) for number, problem in found]
            found = []
        self._rows += batch.rows
        if len(self._bad) >= MAX_BAD_ROWS:
            self.check()
        return replace(batch, columns=self._columns(rows), bad=tuple(sorted([*batch.bad, *found])))

    def _columns(self, rows: list[Any]) -> dict[str, Column]:
        try:
            return self._type.columns(rows)
        except ValueError as error:
            raise ConfigError(
                f"data.parser {self._name} returned a value for a row of {self._shard.path} that cannot be stored: {error}.\n"
                "  Make it return texts of valid characters, and numbers."
            ) from None

    def check(self) -> None:
        """Raise for the rows that the parser failed on."""
        if not self._bad:
            return
        where = f" of those that begin at byte {self._unit.start} or later" if self._unit.start else ""
        path = str(self._shard.root / self._shard.path)
        error = DataError(
            f"data.parser {self._name} fails on rows of {path}, or returns what data.properties does not expect.\n"
            "  Repair it, or leave these rows out with data.on_bad_sample=skip."
        )
        for row, problem in self._bad[:MAX_BAD_ROWS]:
            error.add_note(f"shard={path!r} row={row}{where}: {problem}")
        raise error

    def _parse(self, raw: Any) -> Any:
        return msgspec.convert(self._parser(raw), self._type.struct)
