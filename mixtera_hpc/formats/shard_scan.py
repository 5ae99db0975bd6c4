"""Scan a shard with every property of the configuration, wherever its value comes from.

A format reads rows. This module adds the properties of the shard's path (`path_properties`) and what functions make
from rows (`row_functions`), and applies patterns to values. A constant column costs nothing per row, and a pattern is
matched once per distinct value.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mixtera_hpc.config.schema import DataSetKeys
from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.formats.base import Column, ParserSpec, PropertyField, RowBatch, ScanSpec, ScanUnit, Vocabulary
from mixtera_hpc.formats.batching.row_type import RowType
from mixtera_hpc.formats.category_codes import Categories, map_categories
from mixtera_hpc.formats.chat_rows import is_chat
from mixtera_hpc.formats.composed_text import ComposedText, is_composed
from mixtera_hpc.formats.path_properties import is_path_property, path_property_value
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.formats.row_functions import ParserRunner, TextComposer
from mixtera_hpc.formats.shard_errors import check_whole_file
from mixtera_hpc.formats.shard_file import ShardFile
from mixtera_hpc.formats.user_functions import import_function, source_digest
from mixtera_hpc.tokens.chat_template import ChatTemplate

__all__ = ["scan_shard", "scan_spec_of"]


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
    row_properties = _row_properties(spec)
    parser = ParserRunner(shard, unit, replace(spec, properties=row_properties)) if spec.parser else None
    file_format = load_format(shard.format)
    composer = None
    if spec.text is not None and is_composed(spec.text) and not file_format.holds_tokens:
        composer = TextComposer(shard, unit, spec)
    # With a parser, the format returns whole rows and no properties; with a composed text, no documents.
    format_spec = replace(
        spec,
        properties=() if parser else row_properties,
        whole_rows=parser is not None or composer is not None or spec.whole_rows,
        text=None if is_composed(spec.text) else spec.text,
        documents=spec.documents and not is_composed(spec.text),
    )
    path = shard.full_path
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
