"""Concatenate the tables of several indexes, renumbering shards, combos and sample positions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.index_tables import BLOCK_COLUMNS, BlockTable, Histogram, IndexTables, ShardTable, Zones
from mixtera_hpc.core.properties import ComboTable, Kind, Property
from mixtera_hpc.index.layout import DATASET, prepend_zero

__all__ = ["first_samples", "first_shards", "join_tables"]

ComboValues = dict[str, tuple[str, ...]]
"""Property → values of one combo."""


def join_tables(tables: Sequence[IndexTables], names: Sequence[str]) -> tuple[IndexTables, list[NDArray[np.int64]]]:
    """Join tables of several indexes.

    Args:
        tables: of every index.
        names: the `dataset` of every index, for samples that do not have that property.

    Returns:
        The joined tables; and for each index an array: own combo number → joined combo number.
    """
    combos, joined_combos = _join_combos(tables, names)
    # Every index that has a number property has zones of it.
    numbers = sorted({name for t in tables for name in t.blocks.zones})
    properties = {name: Property(name=name, kind=Kind.NUMBER) for name in numbers} | dict(combos.properties)
    joined = IndexTables(
        properties=dict(sorted(properties.items())),
        combos=combos,
        shards=_join_shards([t.shards for t in tables]),
        blocks=_join_blocks(tables, numbers),
        histogram=_join_histograms([t.histogram for t in tables], joined_combos),
        num_samples=sum(t.num_samples for t in tables),
        # One index without counts makes all sums of tokens wrong.
        has_tokens=all(t.has_tokens for t in tables),
    )
    return joined, joined_combos


def first_shards(shards: Sequence[ShardTable]) -> list[int]:
    """Return the joined number of the first shard of each index."""
    counts = [len(table.path) for table in shards]
    return _offsets(counts)


def first_samples(blocks: Sequence[BlockTable]) -> list[int]:
    """Return the joined position of the first sample of each index."""
    # The position behind the last row; the padding behind it is never addressed.
    lengths = [int(b.first_sample[-1]) + int(b.rows[-1]) if len(b) else 0 for b in blocks]
    return _offsets(lengths)


def _offsets(lengths: Sequence[int]) -> list[int]:
    """Return the sum of all lengths before each one."""
    ends = np.cumsum(lengths, dtype=np.int64)
    offsets: list[int] = prepend_zero(ends)[:-1].tolist()
    return offsets


def _join_combos(tables: Sequence[IndexTables], names: Sequence[str]) -> tuple[ComboTable, list[NDArray[np.int64]]]:
    """Concatenate the combos of all indexes, except that bad rows have one combo together."""
    kinds = {DATASET: Kind.CATEGORY}
    for table in tables:
        kinds |= {name: prop.kind for name, prop in table.combos.properties.items()}

    combos: list[ComboValues | None] = []
    joined_numbers = []
    bad = -1
    for table, name in zip(tables, names, strict=True):
        numbers = []
        for number in range(table.combos.num_combos):
            is_bad = number == table.combos.bad
            if is_bad and bad >= 0:
                numbers.append(bad)
                continue
            if is_bad:
                bad = len(combos)
            numbers.append(len(combos))
            combos.append(None if is_bad else _values_of(table.combos, number, name))
        joined_numbers.append(np.array(numbers, np.int64))
    return _combo_table(kinds, combos, bad), joined_numbers


def _values_of(combos: ComboTable, number: int, dataset: str) -> ComboValues:
    """Return all values of a combo; `dataset` unless it has one of its own."""
    own = {name: combos.values(name, number) for name in combos.properties}
    # The index's own `dataset`, if any, replaces the name of its file.
    return {DATASET: (dataset,)} | own


def _combo_table(kinds: Mapping[str, Kind], combos: Sequence[ComboValues | None], bad: int) -> ComboTable:
    properties: dict[str, Property] = {}
    indptr: dict[str, NDArray[np.int64]] = {}
    codes: dict[str, NDArray[np.int32]] = {}
    for name, kind in sorted(kinds.items()):
        values_of_combo = [() if combo is None else combo.get(name, ()) for combo in combos]
        dictionary = sorted({value for values in values_of_combo for value in values})
        code = {value: i for i, value in enumerate(dictionary)}
        # Values per combo in CSR form: those of combo c are codes[indptr[c]:indptr[c + 1]].
        properties[name] = Property(name=name, kind=kind, values=tuple(dictionary))
        indptr[name] = prepend_zero(np.cumsum([len(values) for values in values_of_combo], dtype=np.int64))
        codes[name] = np.array([code[value] for values in values_of_combo for value in values], np.int32)
    return ComboTable(num_combos=len(combos), properties=properties, indptr=indptr, codes=codes, bad=bad)


def _join_shards(shards: Sequence[ShardTable]) -> ShardTable:
    return ShardTable(
        path=tuple(path for s in shards for path in s.path),
        format=tuple(name for s in shards for name in s.format),
        rows=np.concatenate([s.rows for s in shards]),
        size_bytes=np.concatenate([s.size_bytes for s in shards]),
        mtime_ns=np.concatenate([s.mtime_ns for s in shards]),
        fingerprint=tuple(digest for s in shards for digest in s.fingerprint),
    )


def _join_blocks(tables: Sequence[IndexTables], numbers: Sequence[str]) -> BlockTable:
    blocks = [t.blocks for t in tables]
    shard_offsets = first_shards([t.shards for t in tables])
    sample_offsets = first_samples(blocks)
    # Only these two columns refer to other tables.
    shifted: dict[str, list[NDArray[Any]]] = {
        "shard": [b.shard + offset for b, offset in zip(blocks, shard_offsets, strict=True)],
        "first_sample": [b.first_sample + offset for b, offset in zip(blocks, sample_offsets, strict=True)],
    }
    columns: dict[str, Any] = {}
    for name in BLOCK_COLUMNS:
        values = shifted.get(name, [getattr(b, name) for b in blocks])
        columns[name] = np.concatenate(values).astype(getattr(blocks[0], name).dtype, copy=False)
    return BlockTable(**columns, zones={name: _join_zones(blocks, name) for name in numbers})


def _join_zones(blocks: Sequence[BlockTable], name: str) -> Zones:
    # A number that an index lacks is null in all its blocks, so that `x is None` selects them.
    zones = [b.zones.get(name) or _null_zones(len(b)) for b in blocks]
    return Zones(
        low=np.concatenate([z.low for z in zones]),
        high=np.concatenate([z.high for z in zones]),
        has_null=np.concatenate([z.has_null for z in zones]),
    )


def _null_zones(count: int) -> Zones:
    """Return the zones of blocks in which a number is null everywhere."""
    return Zones(low=np.full(count, np.nan), high=np.full(count, np.nan), has_null=np.ones(count, np.bool_))


def _join_histograms(histograms: Sequence[Histogram], joined_combos: Sequence[NDArray[np.int64]]) -> Histogram:
    # Combos stay ascending within a block: numbering preserves their order, and bad rows are in no histogram.
    combos = [joined[h.combo] for joined, h in zip(joined_combos, histograms, strict=True)]
    cells_per_block = np.concatenate([np.diff(h.indptr) for h in histograms])
    return Histogram(
        indptr=prepend_zero(np.cumsum(cells_per_block)),
        combo=np.concatenate(combos).astype(np.int32),
        rows=np.concatenate([h.rows for h in histograms]),
        tokens=np.concatenate([h.tokens for h in histograms]),
    )
