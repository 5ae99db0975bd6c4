"""What a step touches on disk, on average over all ranks: expected from the order's shape, without expanding a step.

A domain's documents of one step come from one window of its shuffled blocks, or from neighbours where rows are not shuffled. Price:
one pass over the blocks of all domains.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.source import Source

__all__ = ["StepFootprint", "step_footprint"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFootprint:
    """Of one step."""

    documents: float
    blocks: float
    """At most: one that several domains need counts for each."""
    shards: float
    """At most, where nothing is shuffled: domains then go through the same shards together."""
    read_amplification: float
    """Bytes of these blocks per byte of the documents: what is read where blocks can only be read whole (compressed files,
    Parquet) and none is kept. Rows of plain JSONL are read by themselves: 1."""


def step_footprint(source: Source, served_per_step: Floats) -> StepFootprint:
    """What a step touches that serves so many items of each domain; shape (K,)."""
    table, blocks = source.layout.table, source.blocks
    domain = np.repeat(np.arange(source.num_domains), np.diff(table.indptr))
    rows, num_blocks = table.totals()[0], np.maximum(np.diff(table.indptr), 1)
    # The first item of a run of sequences lies in some document; every further document adds its own items.
    runs = np.minimum(served_per_step / source.grid.length, 1)
    documents = runs + (served_per_step - runs) * rows / np.maximum(source.layout.epoch_items(), 1)
    documents = np.minimum(documents, rows)
    touched = _blocks_touched(source, documents, num_blocks, rows)
    length = np.bincount(domain, blocks.length[table.block], minlength=source.num_domains)
    share = blocks.length[table.block] / np.maximum(blocks.rows[table.block], 1) * table.rows
    used = documents * np.bincount(domain, share, minlength=source.num_domains) / np.maximum(rows, 1)
    return StepFootprint(
        documents=float(documents.sum()),
        blocks=float(touched.sum()),
        shards=_shards_touched(source, domain, touched / num_blocks),
        read_amplification=max(float((touched * length / num_blocks).sum() / max(used.sum(), 1e-9)), 1.0),
    )


def _blocks_touched(
    source: Source, documents: Floats, num_blocks: NDArray[np.int64], rows: NDArray[np.int64]
) -> Floats:
    """Distinct blocks that the documents of each domain lie in; shape (K,)."""
    order = source.layout.order
    neighbours = np.where(documents > 0, np.maximum(documents - 1, 0) * num_blocks / np.maximum(rows, 1) + 1, 0.0)
    if order.shuffle != "window":
        return np.minimum(np.minimum(neighbours, documents), num_blocks)
    window = np.minimum(order.window, num_blocks).astype(np.float64)
    per_window = window * rows / num_blocks
    windows = np.maximum(documents / np.maximum(per_window, 1), 1)
    inside = window * -np.expm1(documents / windows * np.log1p(-1 / np.maximum(window, 1.0 + 1e-9)))
    return np.minimum(np.minimum(windows * inside, documents), num_blocks)


def _shards_touched(source: Source, domain: NDArray[np.int64], chance: Floats) -> float:
    """Distinct shards, when every block of a domain is touched with the same chance."""
    shard = source.blocks.shard[source.layout.table.block]
    missed = np.bincount(shard, np.log1p(-np.minimum(chance, 1 - 1e-12))[domain])
    return float(np.sum(1 - np.exp(missed)))
