"""Parts of all units → one set of tables, in the order of shards and rows, whoever scanned what and when.

Dictionaries are sorted and combos follow them, so nothing depends on the order in which values were met. Costs O(blocks)
memory; sample columns pass through one unit at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.properties import ComboTable, Kind, Property
from mixtera_hpc.core.tables import BlockTable, Histogram, Zones
from mixtera_hpc.formats.format import Field
from mixtera_hpc.index.layout import first_rows, first_samples, rows_per_chunk, tokens_of_blocks, with_zero
from mixtera_hpc.index.parts import PartRecord
from mixtera_hpc.index.scan import Combo

__all__ = ["Merged", "merge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """All tables but that of the shards, and the way to the samples."""

    properties: dict[str, Property]
    combos: ComboTable
    blocks: BlockTable
    histogram: Histogram
    chunk_rows: int
    translate: list[NDArray[np.int64]]
    """Per unit: the combo that each local code stands for."""
    maxima: dict[str, int]
    """Largest value of every integer sample column that some unit has."""

    def samples(self, records: Sequence[PartRecord]) -> Iterator[dict[str, NDArray[Any]]]:
        """The sample columns unit by unit: `combo`, `length` and `tokens` where stored, and numbers as `numbers/NAME`."""
        for record, translate in zip(records, self.translate, strict=True):
            columns = {name.removeprefix("samples/"): v for name, v in record.load("samples/", "numbers/").items()}
            columns["combo"] = translate[columns["combo"]]
            for name in self.maxima:
                columns.setdefault(name, np.zeros(record.num_rows, np.int64))
            yield columns


def merge(fields: Sequence[Field], records: Sequence[PartRecord], shard_of_unit: NDArray[np.int64]) -> Merged:
    """Put the parts together.

    Args:
        fields: the properties, sorted by name.
        records: one per unit, in canonical order; at least one.
        shard_of_unit: the shard of each unit, ascending.
    """
    names = [f.name for f in fields if f.kind is not Kind.NUMBER]
    combos = sorted({combo for record in records for combo in record.combos})
    properties = {f.name: Property(name=f.name, kind=f.kind, values=_dictionary(f, names, combos)) for f in fields}
    position = {combo: i for i, combo in enumerate(combos)}
    translate = [np.array([position[c] for c in record.combos], np.int64) for record in records]
    parts = [_translated(record, table) for record, table in zip(records, translate, strict=True)]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    shard = np.repeat(shard_of_unit, [len(part["blocks/rows"]) for part in parts])
    histogram = Histogram(
        indptr=with_zero(np.cumsum(columns["blocks/count"])),
        combo=columns["cells/combo"].astype(np.int32),
        rows=columns["cells/rows"].astype(np.int32),
        tokens=columns["cells/tokens"],
    )
    numbers = [f.name for f in fields if f.kind is Kind.NUMBER]
    zones = {name: _zones(columns, name) for name in numbers}
    chunk_rows = rows_per_chunk(columns["blocks/rows"])
    return Merged(
        properties=properties,
        combos=_combo_table(names, combos, properties),
        blocks=_block_table(shard, columns, histogram, chunk_rows, zones),
        histogram=histogram,
        chunk_rows=chunk_rows,
        translate=translate,
        maxima=_maxima(records, len(combos)),
    )


def _translated(record: PartRecord, translate: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """The block columns of one unit, its histogram in global combos, ascending within each block."""
    part = record.load("blocks/", "cells/", "zones/")
    block = np.repeat(np.arange(len(part["blocks/rows"])), part["blocks/count"])
    combo = translate[part["cells/combo"]]
    order = np.lexsort((combo, block))
    cells = {name: part[f"cells/{name}"][order] for name in ("rows", "tokens")} | {"combo": combo[order]}
    found = {name: values.astype(np.int64) for name, values in part.items() if name.startswith("blocks/")}
    found |= {f"cells/{name}": values.astype(np.int64) for name, values in cells.items()}
    return found | {name: values for name, values in part.items() if name.startswith("zones/")}


def _dictionary(field: Field, names: Sequence[str], combos: Sequence[Combo]) -> tuple[str, ...]:
    if field.kind is Kind.NUMBER:
        return ()
    column = names.index(field.name)
    return tuple(sorted({value for combo in combos for value in combo[column]}))


def _combo_table(names: Sequence[str], combos: Sequence[Combo], properties: Mapping[str, Property]) -> ComboTable:
    indptr, codes = {}, {}
    for column, name in enumerate(names):
        code = {value: i for i, value in enumerate(properties[name].values)}
        indptr[name] = with_zero(np.cumsum([len(combo[column]) for combo in combos], dtype=np.int64))
        codes[name] = np.array([code[value] for combo in combos for value in combo[column]], np.int32)
    return ComboTable(
        num_combos=len(combos), properties={name: properties[name] for name in names}, indptr=indptr, codes=codes
    )


def _zones(columns: Mapping[str, NDArray[Any]], name: str) -> Zones:
    low, high, has_null = (columns[f"zones/{part}/{name}"] for part in ("low", "high", "has_null"))
    return Zones(low=low, high=high, has_null=has_null.astype(np.bool_))


def _block_table(
    shard: NDArray[np.int64],
    columns: Mapping[str, NDArray[np.int64]],
    histogram: Histogram,
    chunk_rows: int,
    zones: Mapping[str, Zones],
) -> BlockTable:
    rows = columns["blocks/rows"]
    return BlockTable(
        shard=shard.astype(np.int32),
        first_row=first_rows(shard, rows),
        rows=rows.astype(np.int32),
        offset=columns["blocks/offset"],
        length=columns["blocks/length"],
        tokens=tokens_of_blocks(histogram),
        first_sample=first_samples(rows, chunk_rows)[:-1],
        zones=zones,
    )


def _maxima(records: Sequence[PartRecord], num_combos: int) -> dict[str, int]:
    found = {"combo": num_combos - 1}
    for name in ("length", "tokens"):
        known = [m for record in records if (m := record.maximum(name)) is not None]
        if known:
            found[name] = max(known)
    return found
