"""Name single documents in a query: `documents({'train/a.jsonl': [17, 30]})`, by the path of a shard and rows of it.

`resume --drop-documents` records what it drops in this form. To a query the number of a document in the index is one
more number property, whose name no expression can contain. Price: only blocks with named documents are read.
"""

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.index_tables import BlockTable, IndexTables, SampleColumns, Zones
from mixtera_hpc.core.query.conditions import Condition
from mixtera_hpc.core.query.predicate import Entries, MatchMask
from mixtera_hpc.errors import ConfigError, did_you_mean

__all__ = [
    "DOCUMENT_NUMBER",
    "NamedDocuments",
    "add_document_numbers",
    "add_document_zones",
    "documents_expression",
]

DOCUMENT_NUMBER = "document number"
"""Name of the number property. It is not an identifier, so it cannot collide with a user's property."""

Ints = NDArray[np.int64]


class NamedDocuments:
    """The function `documents` of the query language, over one index."""

    def __init__(self, shard_paths: Sequence[str], blocks: BlockTable) -> None:
        """Use the shards and blocks of an index."""
        self._paths = shard_paths
        self._blocks = blocks

    def compile(self, arguments: Sequence[ast.expr]) -> Condition:
        """Return a condition for the documents that the arguments of a call name.

        Raises:
            ConfigError: the argument is not a mapping of shards to rows, or the index has no such document.
        """
        numbers = self._numbers(_parse_arguments(arguments))

        def evaluate(entries: Entries) -> MatchMask:
            low = entries.low[DOCUMENT_NUMBER]
            high = entries.high[DOCUMENT_NUMBER]
            # Named documents among those of the entry, which are low, low + 1, …, high.
            count = np.searchsorted(numbers, high, side="right") - np.searchsorted(numbers, low, side="left")
            return MatchMask(count > 0, count == high - low + 1)

        return Condition(evaluate, frozenset({DOCUMENT_NUMBER}))

    def _numbers(self, rows_by_shard: Mapping[str, list[int]]) -> Ints:
        """Return the numbers of documents, ascending, each once."""
        shard_of_path = {path: shard for shard, path in enumerate(self._paths)}
        # The blocks of every shard are neighbours in `by_shard`, ordered by their rows.
        blocks = self._blocks
        by_shard = np.lexsort((blocks.first_row, blocks.shard))
        shards = blocks.shard[by_shard]
        numbers = [np.zeros(0, np.int64)]
        for path, rows in rows_by_shard.items():
            if path not in shard_of_path:
                near = did_you_mean(path, list(self._paths))
                raise ConfigError(f"query.where: documents() names {path!r}, which is not a shard of the index.{near}")
            first, stop = np.searchsorted(shards, [shard_of_path[path], shard_of_path[path] + 1])
            numbers.append(self._numbers_in(path, by_shard[first:stop], np.array(rows, np.int64)))
        return np.unique(np.concatenate(numbers))

    def _numbers_in(self, path: str, own: NDArray[np.intp], rows: Ints) -> Ints:
        """Return the numbers of some rows of one shard; `own` are the blocks of the shard, ordered by their rows."""
        blocks = self._blocks
        order = np.searchsorted(blocks.first_row[own], rows, side="right") - 1
        holding = own[np.maximum(order, 0)] if len(own) else np.zeros(len(rows), np.intp)
        row_in_block = rows - blocks.first_row[holding]
        is_missing = (order < 0) | (row_in_block >= blocks.rows[holding])
        if is_missing.any():
            raise ConfigError(
                f"query.where: documents() names row {rows[int(np.argmax(is_missing))]} of {path}, which has rows 0 to "
                f"{int(blocks.rows[own].sum()) - 1} in the index."
            )
        return np.asarray(blocks.first_sample[holding] + row_in_block)


def documents_expression(documents: Iterable[tuple[str, int]]) -> str:
    """Return the query that matches documents, given by shard and row."""
    rows: dict[str, set[int]] = {}
    for shard, row in documents:
        rows.setdefault(shard, set()).add(row)
    return f"documents({ {shard: sorted(rows[shard]) for shard in sorted(rows)} })"


def add_document_zones(tables: IndexTables) -> IndexTables:
    """Return `tables` with the zones of `DOCUMENT_NUMBER`, which are exact."""
    blocks = tables.blocks
    first = blocks.first_sample.astype(np.float64)
    zone = Zones(low=first, high=first + blocks.rows - 1, has_null=np.zeros(len(blocks), np.bool_))
    return replace(tables, blocks=replace(blocks, zones={**blocks.zones, DOCUMENT_NUMBER: zone}))


def add_document_numbers(columns: SampleColumns, blocks: BlockTable, chosen: NDArray[np.int32]) -> SampleColumns:
    """Return `columns` with the number of every document as `DOCUMENT_NUMBER`.

    Args:
        columns: the samples of the blocks `chosen`, concatenated.
        blocks: all blocks of the index.
        chosen: block numbers.
    """
    rows = blocks.rows[chosen].astype(np.int64)
    # The position among `columns` at which each block would have begun with document 0.
    origins = np.cumsum(rows) - rows - blocks.first_sample[chosen]
    numbers = (np.arange(int(rows.sum())) - np.repeat(origins, rows)).astype(np.float64)
    return replace(columns, numbers={**columns.numbers, DOCUMENT_NUMBER: numbers})


def _parse_arguments(arguments: Sequence[ast.expr]) -> dict[str, list[int]]:
    """Return the rows of every shard that a call names."""
    value: Any = None
    if len(arguments) == 1 and isinstance(arguments[0], ast.Dict):
        try:
            value = ast.literal_eval(arguments[0])
        except (ValueError, TypeError):
            value = None
    if not isinstance(value, dict) or not all(_is_rows_of_shard(*entry) for entry in value.items()):
        raise ConfigError("query.where: write documents({'train/a.jsonl': [17, 30]}): a list of rows for every shard.")
    return value


def _is_rows_of_shard(path: Any, rows: Any) -> bool:
    return isinstance(path, str) and isinstance(rows, list) and all(type(row) is int and row >= 0 for row in rows)
