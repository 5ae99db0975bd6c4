"""An index as it was before its last refreshes: shards that were added since are left out.

A refresh keeps what an index begins with, so an earlier state is a prefix of every table; only dictionaries are made again,
of the values that occurred then. Costs what opening costs.
"""

from dataclasses import replace

import numpy as np

from mixtera_hpc.core.index_tables import BLOCK_COLUMNS, BlockTable, Histogram, IndexTables, ShardTable, Zones
from mixtera_hpc.core.properties import ComboTable, Property
from mixtera_hpc.index.layout import Generation

__all__ = ["tables_of_generation"]


def tables_of_generation(tables: IndexTables, generation: Generation) -> IndexTables:
    """The tables as they were."""
    combos = _combos(tables.combos, generation.combos)
    blocks = slice(0, generation.blocks)
    histogram = Histogram(
        indptr=tables.histogram.indptr[: generation.blocks + 1],
        combo=tables.histogram.combo[: generation.cells],
        rows=tables.histogram.rows[: generation.cells],
        tokens=tables.histogram.tokens[: generation.cells],
    )
    numbers = {name: prop for name, prop in tables.properties.items() if name not in combos.properties}
    return replace(
        tables,
        properties={name: {**numbers, **combos.properties}[name] for name in tables.properties},
        combos=combos,
        shards=_shards(tables.shards, generation.shards),
        blocks=_blocks(tables.blocks, blocks),
        histogram=histogram,
        num_samples=int(histogram.rows.sum(dtype=np.int64)),
    )


def _combos(combos: ComboTable, count: int) -> ComboTable:
    """The first combos, and dictionaries of the values they have."""
    properties, codes, indptr = {}, {}, {}
    for name, prop in combos.properties.items():
        indptr[name] = combos.indptr[name][: count + 1]
        found = combos.codes[name][: indptr[name][-1]]
        used, code = np.unique(found, return_inverse=True)
        codes[name] = code.astype(np.int32)
        properties[name] = Property(name=name, kind=prop.kind, values=tuple(prop.values[i] for i in used.tolist()))
    bad = combos.bad if combos.bad < count else -1
    return ComboTable(num_combos=count, properties=properties, indptr=indptr, codes=codes, bad=bad)


def _shards(shards: ShardTable, count: int) -> ShardTable:
    return ShardTable(
        path=shards.path[:count],
        format=shards.format[:count],
        rows=shards.rows[:count],
        size_bytes=shards.size_bytes[:count],
        mtime_ns=shards.mtime_ns[:count],
        fingerprint=shards.fingerprint[:count],
        dataset=shards.dataset[:count],
    )


def _blocks(blocks: BlockTable, part: slice) -> BlockTable:
    zones = {
        name: Zones(low=zone.low[part], high=zone.high[part], has_null=zone.has_null[part])
        for name, zone in blocks.zones.items()
    }
    return BlockTable(**{name: getattr(blocks, name)[part] for name in BLOCK_COLUMNS}, zones=zones)
