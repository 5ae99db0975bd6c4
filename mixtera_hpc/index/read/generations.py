"""Cut the tables of an index down to an earlier generation: shards that a refresh added since are left out.

A refresh preserves what the index began with, so an earlier state is a prefix of every table. Only the dictionaries
are made again, from the values that occurred then. The cost is that of opening the index.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.index_tables import BLOCK_COLUMNS, BlockTable, Histogram, IndexTables, ShardTable, Zones
from mixtera_hpc.core.properties import ComboTable, Property
from mixtera_hpc.index.layout import Generation

__all__ = ["tables_of_generation"]


def tables_of_generation(tables: IndexTables, generation: Generation) -> IndexTables:
    """Return the tables as they were in `generation`."""
    # New combos are appended by a refresh, so the earlier ones are the first.
    combos = _first_combos(tables.combos, generation.combos)
    histogram = _first_cells(tables.histogram, generation)
    return replace(
        tables,
        properties={name: combos.properties.get(name, prop) for name, prop in tables.properties.items()},
        combos=combos,
        shards=_first_shards(tables.shards, generation.shards),
        blocks=_first_blocks(tables.blocks, generation.blocks),
        histogram=histogram,
        # Bad rows are in no histogram, so this counts the rows that can be read.
        num_samples=int(histogram.rows.sum(dtype=np.int64)),
    )


def _first_combos(combos: ComboTable, count: int) -> ComboTable:
    """Return the first `count` combos, with dictionaries of only the values that occur in them."""
    properties: dict[str, Property] = {}
    codes: dict[str, NDArray[np.int32]] = {}
    indptr: dict[str, NDArray[np.int64]] = {}
    for name, prop in combos.properties.items():
        indptr[name] = combos.indptr[name][: count + 1]
        # Values are renumbered to the ones in use; sorting is preserved, as in a build of these shards alone.
        used, code = np.unique(combos.codes[name][: indptr[name][-1]], return_inverse=True)
        codes[name] = code.astype(np.int32)
        properties[name] = replace(prop, values=tuple(prop.values[i] for i in used.tolist()))
    # The combo of bad rows may have been added by a later generation.
    bad = combos.bad if combos.bad < count else -1
    return ComboTable(num_combos=count, properties=properties, indptr=indptr, codes=codes, bad=bad)


def _first_cells(histogram: Histogram, generation: Generation) -> Histogram:
    return Histogram(
        indptr=histogram.indptr[: generation.blocks + 1],
        combo=histogram.combo[: generation.cells],
        rows=histogram.rows[: generation.cells],
        tokens=histogram.tokens[: generation.cells],
    )


def _first_shards(shards: ShardTable, count: int) -> ShardTable:
    return ShardTable(
        path=shards.path[:count],
        format=shards.format[:count],
        rows=shards.rows[:count],
        size_bytes=shards.size_bytes[:count],
        mtime_ns=shards.mtime_ns[:count],
        fingerprint=shards.fingerprint[:count],
        dataset=shards.dataset[:count],
    )


def _first_blocks(blocks: BlockTable, count: int) -> BlockTable:
    zones = {
        name: Zones(low=zone.low[:count], high=zone.high[:count], has_null=zone.has_null[:count])
        for name, zone in blocks.zones.items()
    }
    return BlockTable(**{name: getattr(blocks, name)[:count] for name in BLOCK_COLUMNS}, zones=zones)
