"""Parts of all units → one set of tables, in the order of shards and rows, whoever scanned what and when.

Two passes: the first reads what every part says of itself, and settles dictionaries, combos, sizes and types; the second, while
the file is written, loads one part at a time. Nothing depends on the order in which values were met, and memory holds the
distinct combos, never a column. Parts may also come out of an older index: its combos keep their numbers, new ones follow.
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
"""Some 500 bytes each, in every process that plans: what stays below a gigabyte."""


class ResultSource(Protocol):
    """Some consecutive blocks of one shard, not loaded yet."""

    def summary(self) -> ScanSummary: ...
    def load(self) -> ScanResult: ...


PlacedSource = tuple[int | NDArray[np.int64], ResultSource]
"""Blocks, and the position of the shard they are in, or of each one's; pieces follow each other in index order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedTables:
    """What is known of all pieces together."""

    properties: dict[str, Property]
    combos: ComboTable
    position: dict[Combo | None, int]
    """The number of every combo."""
    rows: int
    bad_rows: int
    blocks: int
    cells: int
    chunk_rows: int
    padded_rows: int
    """Entries of a sample column: every block begins at a chunk."""
    maxima: dict[str, int]
    """Largest value of every integer array that some piece has, by name."""
    has_values: frozenset[str]
    """Properties that some sample has."""

    @property
    def numbers(self) -> list[str]:
        """The properties that are numbers, sorted."""
        return [name for name, prop in self.properties.items() if prop.kind is Kind.NUMBER]


@dataclass(frozen=True, slots=True, kw_only=True)
class TranslatedResult:
    """A piece in the numbers of the whole index."""

    blocks: dict[str, NDArray[np.int64]]
    cells: dict[str, NDArray[np.int64]]
    zones: dict[str, dict[str, NDArray[np.float64]]]
    samples: dict[str, NDArray[Any]]
    """`combo`, `length` and `tokens` where the index has them, and `numbers/NAME`; shape (rows,) each."""


def merge_results(
    fields: Sequence[PropertyField],
    pieces: Iterable[PlacedSource],
    known: Sequence[Combo | None] = (),
    chunk_rows: int = 0,
) -> MergedTables:
    """The first pass.

    Args:
        fields: the properties, sorted by name.
        known: combos that keep their order, and come first, as far as they occur.
        chunk_rows: rows of a chunk of the sample columns; 0 takes what blocks usually have.

    Raises:
        ConfigError: there are more combos than memory should hold.
    """
    names = [f.name for f in fields if f.kind is not Kind.NUMBER]
    totals, used, maxima = _MergeTotals(), set[Combo | None](), dict[str, int]()
    for _, piece in pieces:
        summary = piece.summary()
        totals.add(summary)
        used.update(summary.combos)
        if len(used) > MAX_COMBOS:
            raise _too_many(names, used)
        for name, largest in summary.maxima.items():
            maxima[name] = max(maxima.get(name, 0), largest)
    combos = [c for c in known if c in used]
    combos += sorted(c for c in used.difference(combos) if c is not None)
    combos += [None] if None in used and None not in combos else []
    chunk_rows = chunk_rows or totals.usual_block_rows()
    properties = {f.name: Property(name=f.name, kind=f.kind, values=_dictionary(f, names, combos)) for f in fields}
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
        maxima=maxima,
        has_values=frozenset(p.name for p in properties.values() if p.values),
    )


def translate_result(merged: MergedTables, part: ScanResult) -> TranslatedResult:
    """A loaded piece, its combos renumbered and ascending within each block."""
    translate = np.array([merged.position[c] for c in part.combos], np.int64)
    block = np.repeat(np.arange(len(part.blocks["rows"])), part.blocks["count"])
    combo = translate[part.cells["combo"]] if len(block) else np.zeros(0, np.int64)
    order = np.lexsort((combo, block))
    cells = {name: part.cells[name][order] for name in ("rows", "tokens")} | {"combo": combo[order]}
    samples: dict[str, NDArray[Any]] = {"combo": translate[part.samples["combo"]]} if part.num_rows else {}
    for name in ("combo", "length", "tokens"):
        if f"samples/{name}" in merged.maxima and name not in samples:
            samples[name] = part.samples.get(name, np.zeros(part.num_rows, np.int64))
    samples |= {f"numbers/{name}": part.numbers[name] for name in merged.numbers}
    return TranslatedResult(blocks=part.blocks, cells=cells, zones=part.zones, samples=samples)


def _too_many(names: Sequence[str], combos: Iterable[Combo | None]) -> ConfigError:
    values = {name: len({c[i] for c in combos if c is not None}) for i, name in enumerate(names)}
    largest = max(values, key=lambda name: values[name])
    return ConfigError(
        f"The categories of data.properties have more than {MAX_COMBOS:,} combinations of values, {largest} alone has "
        f"{values[largest]:,} or more; a category is for values that many samples share.\n"
        f"  Leave out data.properties.{largest}, give it a pattern that takes a part of it, or kind: number."
    )


class _MergeTotals:
    """Sums over pieces."""

    def __init__(self) -> None:
        self.rows = self.bad_rows = self.blocks = self.cells = 0
        self._block_rows: Counter[int] = Counter()

    def add(self, summary: ScanSummary) -> None:
        self.rows += summary.rows
        self.bad_rows += summary.bad_rows
        self.blocks += summary.blocks
        self.cells += summary.cells
        self._block_rows.update(summary.block_rows)

    def usual_block_rows(self) -> int:
        """The median, within the bounds of chunks."""
        rows = np.array(sorted(self._block_rows), np.int64)
        if not len(rows):
            return MIN_CHUNK_ROWS
        ends = np.cumsum([self._block_rows[int(n)] for n in rows])
        median = rows[np.searchsorted(ends, (ends[-1] + 1) // 2)]
        return int(np.clip(median, MIN_CHUNK_ROWS, MAX_CHUNK_ROWS))

    def padded_rows(self, chunk_rows: int) -> int:
        """Rows when every block is filled up to whole chunks."""
        return sum(-(-rows // chunk_rows) * chunk_rows * blocks for rows, blocks in self._block_rows.items())


def _dictionary(field: PropertyField, names: Sequence[str], combos: Sequence[Combo | None]) -> tuple[str, ...]:
    if field.kind is Kind.NUMBER:
        return ()
    column = names.index(field.name)
    return tuple(sorted({value for combo in combos if combo is not None for value in combo[column]}))


def _combo_table(names: Sequence[str], combos: Sequence[Combo | None], properties: dict[str, Property]) -> ComboTable:
    indptr, codes = {}, {}
    for column, name in enumerate(names):
        code = {value: i for i, value in enumerate(properties[name].values)}
        found = [() if combo is None else combo[column] for combo in combos]
        indptr[name] = prepend_zero(np.cumsum([len(values) for values in found], dtype=np.int64))
        codes[name] = np.array([code[value] for values in found for value in values], np.int32)
    return ComboTable(
        num_combos=len(combos),
        properties={name: properties[name] for name in names},
        indptr=indptr,
        codes=codes,
        bad=combos.index(None) if None in combos else -1,
    )
