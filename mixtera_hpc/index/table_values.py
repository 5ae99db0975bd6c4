"""Refuse tables with values out of range: checksums show that bytes are as they were written, not that they are right.

Price: one pass over the tables when an index is opened.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.index_tables import BlockTable, Histogram, IndexTables, ShardTable
from mixtera_hpc.core.properties import ComboTable
from mixtera_hpc.index.layout import Generation

__all__ = ["check_generations", "check_range", "check_tables"]

MAX_OFFSET = 1 << 62
"""Bytes. Sums of two offsets still fit into 64 bits."""


def check_range(column: str, values: NDArray[Any], low: int, high: int) -> None:
    """Raise ValueError, which names `column`, unless all values are at least `low` and at most `high`."""
    if not len(values):
        return
    # There may be a hundred million unsigned values: they have one bound only.
    extremes = [values.max()] if values.dtype.kind == "u" and low <= 0 else [values.min(), values.max()]
    for value in map(int, extremes):
        if not low <= value <= high:
            raise ValueError(f"{column} holds {value}, expected {low} to {high}")


def check_tables(tables: IndexTables) -> None:
    """Raise ValueError, which names the column, if a table cannot be that of an index."""
    _check_shards(tables.shards)
    _check_blocks(tables.blocks, len(tables.shards.path))
    _check_combos(tables.combos)
    _check_histogram(tables.histogram, len(tables.blocks), tables.combos.num_combos)
    if int(tables.histogram.rows.sum(dtype=np.int64)) != tables.num_samples:
        raise ValueError("histogram/rows and samples do not add up")


def check_generations(generations: Sequence[Generation], tables: IndexTables) -> None:
    """Raise ValueError, which names the column, if `tables` cannot begin with the tables of a generation."""
    lengths = {
        "shards": len(tables.shards.path),
        "blocks": len(tables.blocks),
        "cells": len(tables.histogram.combo),
        "combos": tables.combos.num_combos,
        "samples": int(tables.blocks.rows.sum(dtype=np.int64)),
    }
    for name, length in lengths.items():
        values = np.array([getattr(generation, name) for generation in generations], np.int64)
        check_range(f"generations/{name}", values, 0, length)
    for generation in generations:
        cells = int(tables.histogram.indptr[generation.blocks])
        if generation.cells != cells:
            raise ValueError(f"generations/cells holds {generation.cells}, expected {cells}")


def _check_shards(shards: ShardTable) -> None:
    count = len(shards.path)
    for name in ("format", "rows", "size_bytes", "mtime_ns", "fingerprint"):
        _check_length(f"shards/{name}", getattr(shards, name), count)
    for name in ("rows", "size_bytes"):
        check_range(f"shards/{name}", getattr(shards, name), 0, MAX_OFFSET)


def _check_blocks(blocks: BlockTable, num_shards: int) -> None:
    for name in ("rows", "offset", "length"):
        _check_length(f"blocks/{name}", getattr(blocks, name), len(blocks))
    check_range("blocks/shard", blocks.shard, 0, num_shards - 1)
    check_range("blocks/rows", blocks.rows, 0, np.iinfo(np.int32).max)
    check_range("blocks/offset", blocks.offset, 0, MAX_OFFSET)
    check_range("blocks/length", blocks.length, 0, MAX_OFFSET)
    for name, zones in blocks.zones.items():
        for field in ("low", "high", "has_null"):
            _check_length(f"zones/{name}/{field}", getattr(zones, field), len(blocks))


def _check_combos(combos: ComboTable) -> None:
    if not -1 <= combos.bad < combos.num_combos:
        raise ValueError(f"combos has bad={combos.bad}, but {combos.num_combos} combos")
    for name, prop in combos.properties.items():
        _check_bounds(f"combos/{name}", combos.indptr[name], combos.num_combos, len(combos.codes[name]))
        check_range(f"combos/{name}/code", combos.codes[name], 0, len(prop.values) - 1)


def _check_histogram(histogram: Histogram, num_blocks: int, num_combos: int) -> None:
    for name in ("rows", "tokens"):
        _check_length(f"histogram/{name}", getattr(histogram, name), len(histogram.combo))
    _check_bounds("histogram", histogram.indptr, num_blocks, len(histogram.combo))
    check_range("histogram/combo", histogram.combo, 0, num_combos - 1)


def _check_bounds(group: str, bounds: NDArray[np.int64], count: int, num_values: int) -> None:
    """Check the bounds of `count` ranges, which cover `num_values` values."""
    _check_length(f"{group}/count", bounds[1:], count)
    check_range(f"{group}/count", np.diff(bounds), 0, num_values)
    if bounds[-1] != num_values:
        raise ValueError(f"{group}/count adds up to {bounds[-1]}, but there are {num_values} values")


def _check_length(column: str, values: Any, count: int) -> None:
    if len(values) != count:
        raise ValueError(f"{column} has {len(values)} values, expected {count}")
