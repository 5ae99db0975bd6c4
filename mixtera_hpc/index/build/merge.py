"""Merge the scan results of all units into one set of tables, in the order of shards and rows.

Two passes. The first reads the summary of every result and determines dictionaries, combos, sizes and types. The
second, while the file is written, loads one result at a time. The outcome does not depend on who scanned what and when,
and memory holds the distinct combos, never a column. Results may also come out of an older index: its combos keep their
numbers, new ones follow.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.properties import ComboTable, Kind, Property
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.formats.base import PropertyField
from mixtera_hpc.index.layout import MAX_CHUNK_ROWS, MIN_CHUNK_ROWS, prepend_zero
from mixtera_hpc.index.scan.scan_result import Combo, ScanResult, ScanSummary

__all__ = ["MergedTables", "PlacedSource", "ResultSource", "TranslatedResult", "merge_results", "translate_result"]

MAX_COMBOS = 1 << 20
"""About 500 bytes each, in every process that plans: this many stay below a gigabyte."""


class ResultSource(Protocol):
    """Some consecutive blocks that are not loaded yet: a log record, or blocks of an older index."""

    def summary(self) -> ScanSummary:
        """Return the summary of the blocks."""
        ...

    def load(self) -> ScanResult:
        """Load the blocks."""
        ...


PlacedSource = tuple[int | NDArray[np.int64], ResultSource]
"""The position of the shard that all blocks are in (or of each block's shard), and the blocks. Sources are in index
order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedTables:
    """Facts about all results together."""

    properties: dict[str, Property]
    combos: ComboTable
    position: dict[Combo | None, int]
    """Combo → its number."""
    rows: int
    bad_rows: int
    blocks: int
    cells: int
    chunk_rows: int
    """Rows per chunk of the sample columns."""
    padded_rows: int
    """Entries of a sample column: every block begins at a chunk."""
    maxima: dict[str, int]
    """Largest value of every integer array that some result has, by name."""
    has_values: frozenset[str]
    """Categorical properties that some sample has."""

    @property
    def numbers(self) -> list[str]:
        """Return the number properties, sorted."""
        return [name for name, prop in self.properties.items() if prop.kind is Kind.NUMBER]


@dataclass(frozen=True, slots=True, kw_only=True)
class TranslatedResult:
    """A loaded result with the combo numbers of the whole index."""

    blocks: dict[str, NDArray[np.int64]]
    cells: dict[str, NDArray[np.int64]]
    zones: dict[str, dict[str, NDArray[np.float64]]]
    samples: dict[str, NDArray[Any]]
    """`combo`, `length` and `tokens` if the index has them, and `numbers/NAME`; shape (rows,) each."""


def merge_results(
    fields: Sequence[PropertyField],
    sources: Iterable[PlacedSource],
    known: Sequence[Combo | None] = (),
    chunk_rows: int = 0,
) -> MergedTables:
    """Make the first pass over all results.

    Args:
        fields: the properties, sorted by name.
        sources: all results, in index order.
        known: combos that come first, in this order, as far as they occur.
        chunk_rows: rows per chunk of the sample columns; 0 takes the median number of rows of a block.

    Raises:
        ConfigError: there are more combos than memory should hold.
    """
    names = [field.name for field in fields if field.kind is not Kind.NUMBER]
    totals = _MergeTotals(names)
    # Summaries alone: a header of a few kB for each result.
    for _, source in sources:
        totals.add(source.summary())

    combos = _ordered_combos(totals.combos, known)
    properties = _properties(fields, names, combos)
    chunk_rows = chunk_rows or totals.median_block_rows()
    return MergedTables(
        properties=properties,
        combos=_combo_table(names, combos, properties),
        position={combo: i for i, combo in enumerate(combos)},
        rows=totals.rows,
        bad_rows=totals.bad_rows,
        blocks=totals.blocks,
        cells=totals.cells,
        chunk_rows=chunk_rows,
        padded_rows=totals.padded_rows(chunk_rows),
        maxima=totals.maxima,
        has_values=frozenset(prop.name for prop in properties.values() if prop.values),
    )


def translate_result(merged: MergedTables, result: ScanResult) -> TranslatedResult:
    """Renumber the combos of a loaded result, and sort the cells of each block by the new numbers."""
    new_number = np.array([merged.position[combo] for combo in result.combos], np.int64)
    block_of_cell = np.repeat(np.arange(len(result.blocks["rows"])), result.blocks["count"])
    # Indexing an empty array fails if there are no combos at all.
    combo = new_number[result.cells["combo"]] if len(block_of_cell) else np.zeros(0, np.int64)
    order = np.lexsort((combo, block_of_cell))  # By block, then combo.
    cells = {name: result.cells[name][order] for name in ("rows", "tokens")} | {"combo": combo[order]}

    samples: dict[str, NDArray[Any]] = {}
    if result.num_rows:
        samples["combo"] = new_number[result.samples["combo"]]
    # A column that only other results have is zero here.
    for name in ("combo", "length", "tokens"):
        if f"samples/{name}" in merged.maxima and name not in samples:
            samples[name] = result.samples.get(name, np.zeros(result.num_rows, np.int64))
    samples |= {f"numbers/{name}": result.numbers[name] for name in merged.numbers}
    return TranslatedResult(blocks=result.blocks, cells=cells, zones=result.zones, samples=samples)


class _MergeTotals:
    """Sums, maxima and combos over all results."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._block_rows: Counter[int] = Counter()  # Rows per block → number of blocks.
        self.combos: set[Combo | None] = set()
        self.maxima: dict[str, int] = {}
        self.rows = 0
        self.bad_rows = 0
        self.blocks = 0
        self.cells = 0

    def add(self, summary: ScanSummary) -> None:
        """Add one result.

        Raises:
            ConfigError: there are too many combos.
        """
        self.rows += summary.rows
        self.bad_rows += summary.bad_rows
        self.blocks += summary.blocks
        self.cells += summary.cells
        self._block_rows.update(summary.block_rows)
        for name, largest in summary.maxima.items():
            self.maxima[name] = max(self.maxima.get(name, 0), largest)
        self.combos.update(summary.combos)
        if len(self.combos) > MAX_COMBOS:
            raise _too_many_combos(self._names, self.combos)

    def median_block_rows(self) -> int:
        """Return the median number of rows of a block, within the bounds of a chunk."""
        sizes = np.array(sorted(self._block_rows), np.int64)
        if not len(sizes):
            return MIN_CHUNK_ROWS
        # Weighted median over the few different sizes.
        ends = np.cumsum([self._block_rows[int(size)] for size in sizes])
        median = sizes[np.searchsorted(ends, (ends[-1] + 1) // 2)]
        return int(np.clip(median, MIN_CHUNK_ROWS, MAX_CHUNK_ROWS))

    def padded_rows(self, chunk_rows: int) -> int:
        """Return the number of rows if every block is padded to whole chunks."""
        # Every block is rounded up to whole chunks.
        chunks = sum(-(-rows // chunk_rows) * blocks for rows, blocks in self._block_rows.items())
        return chunks * chunk_rows


def _ordered_combos(used: set[Combo | None], known: Sequence[Combo | None]) -> list[Combo | None]:
    """Return the combos in the order of their numbers: known ones, new ones sorted, bad rows last unless known."""
    # A refreshed index keeps its numbers, on which the histograms of earlier generations depend.
    combos = [combo for combo in known if combo in used]
    combos += sorted(combo for combo in used.difference(combos) if combo is not None)
    if None in used and None not in combos:
        combos.append(None)
    return combos


def _too_many_combos(names: Sequence[str], combos: Iterable[Combo | None]) -> ConfigError:
    # The property with the most values is the one to change.
    known = [combo for combo in combos if combo is not None]
    num_values = {name: len({combo[i] for combo in known}) for i, name in enumerate(names)}
    largest = max(num_values, key=lambda name: num_values[name])
    return ConfigError(
        f"The categories of data.properties have more than {MAX_COMBOS:,} combinations of values, {largest} alone has "
        f"{num_values[largest]:,} or more. A category is for values that many samples share.\n"
        f"  Remove data.properties.{largest}, give it a pattern that takes a part of it, or kind: number."
    )


def _properties(
    fields: Sequence[PropertyField], names: Sequence[str], combos: Sequence[Combo | None]
) -> dict[str, Property]:
    """Return all properties; the dictionary of a categorical one has the values that occur, sorted."""
    known = [combo for combo in combos if combo is not None]
    properties: dict[str, Property] = {}
    for field in fields:
        values: set[str] = set()
        if field.kind is not Kind.NUMBER:
            column = names.index(field.name)
            values = {value for combo in known for value in combo[column]}
        properties[field.name] = Property(name=field.name, kind=field.kind, values=tuple(sorted(values)))
    return properties


def _combo_table(names: Sequence[str], combos: Sequence[Combo | None], properties: dict[str, Property]) -> ComboTable:
    indptr: dict[str, NDArray[np.int64]] = {}
    codes: dict[str, NDArray[np.int32]] = {}
    for column, name in enumerate(names):
        code = {value: i for i, value in enumerate(properties[name].values)}
        values_of_combo = [() if combo is None else combo[column] for combo in combos]
        # Values per combo in CSR form: those of combo c are codes[indptr[c]:indptr[c + 1]].
        indptr[name] = prepend_zero(np.cumsum([len(values) for values in values_of_combo], dtype=np.int64))
        codes[name] = np.array([code[value] for values in values_of_combo for value in values], np.int32)
    return ComboTable(
        num_combos=len(combos),
        properties={name: properties[name] for name in names},
        indptr=indptr,
        codes=codes,
        bad=combos.index(None) if None in combos else -1,
    )
