"""Estimate what a step touches on disk, on average over all ranks, without expanding a step.

The documents of a domain in one step come from one window of its shuffled blocks per lane, or from neighbouring blocks
if rows are not shuffled. The estimate follows from the sizes of windows and blocks. Price: one pass over the blocks of
all domains.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.source import Source

__all__ = ["StepFootprint", "step_footprint"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFootprint:
    """Expected reads of one step, all ranks together."""

    documents: float
    blocks: float
    """An upper bound: a block that several domains need counts for each of them."""
    shards: float
    """An upper bound if nothing is shuffled: all domains then pass through the same shards together."""
    read_amplification: float
    """Bytes of these blocks per byte of the documents. This is what formats cost that can read blocks only as a whole
    (compressed files, Parquet), without a cache. Rows of plain JSONL are read one by one, with small gaps between
    them: at most 1.25."""


def step_footprint(source: Source, served_per_step: Floats) -> StepFootprint:
    """Estimate the footprint of a step that serves `served_per_step` items of each domain; shape (K,)."""
    table = source.layout.table
    blocks = source.blocks
    domain = np.repeat(np.arange(source.num_domains), np.diff(table.indptr))
    rows = table.totals()[0]
    num_blocks = np.maximum(np.diff(table.indptr), 1)

    # Every lane serves a run of neighbouring sequences; shuffled sequences are runs of one. The first item of a run is
    # in one document, and each further document adds its own items.
    max_runs = np.inf if source.layout.order.shuffle == "sequence" else source.lanes.lanes
    runs = np.minimum(served_per_step / source.grid.length, max_runs)
    documents = runs + (served_per_step - runs) * rows / np.maximum(source.layout.epoch_items(), 1)
    documents = np.minimum(documents, rows)
    lanes = np.clip(served_per_step / source.grid.length, 1, max_runs)
    if source.layout.order.shuffle == "window":
        # Lanes beyond the number of windows read the same blocks.
        lanes = np.minimum(lanes, np.maximum(num_blocks / _blocks_per_window(source), 1))
    touched = lanes * _touched_blocks(source, documents / lanes, num_blocks, rows)

    # Bytes of whole blocks against the share of them that the documents of the domain take.
    block_bytes = blocks.length[table.block]
    domain_bytes = np.bincount(domain, block_bytes, minlength=source.num_domains)
    row_bytes = block_bytes / np.maximum(blocks.rows[table.block], 1) * table.rows
    used = documents * np.bincount(domain, row_bytes, minlength=source.num_domains) / np.maximum(rows, 1)
    amplification = float((touched * domain_bytes / num_blocks).sum() / max(used.sum(), 1e-9))
    return StepFootprint(
        documents=float(documents.sum()),
        blocks=float(touched.sum()),
        shards=_touched_shards(source, domain, touched / num_blocks),
        read_amplification=max(amplification, 1.0),
    )


def _touched_blocks(
    source: Source, documents: Floats, num_blocks: NDArray[np.int64], rows: NDArray[np.int64]
) -> Floats:
    """Return the expected number of distinct blocks that the documents of one lane lie in; shape (K,)."""
    order = source.layout.order
    if order.shuffle != "window":
        # Consecutive documents: every block holds rows / num_blocks of them.
        blocks_spanned = np.maximum(documents - 1, 0) * num_blocks / np.maximum(rows, 1) + 1
        neighbours = np.where(documents > 0, blocks_spanned, 0.0)
        return np.minimum(np.minimum(neighbours, documents), num_blocks)

    # Documents come from random blocks of a window: a block is missed with probability (1 - 1/window)^documents.
    window = np.minimum(_blocks_per_window(source), num_blocks)
    rows_per_window = window * rows / num_blocks
    windows = np.maximum(documents / np.maximum(rows_per_window, 1), 1)
    log_missed = documents / windows * np.log1p(-1 / np.maximum(window, 1.0 + 1e-9))
    hit_per_window = window * -np.expm1(log_missed)
    touched: Floats = np.minimum(np.minimum(windows * hit_per_window, documents), num_blocks)
    return touched


def _blocks_per_window(source: Source) -> Floats:
    """Return the mean number of blocks in a window of each domain; shape (K,)."""
    layout = source.layout
    block_bytes = [layout.block_bytes(domain) for domain in range(source.num_domains)]
    means = np.array([sizes.mean() if len(sizes) else 1.0 for sizes in block_bytes])
    blocks: Floats = np.maximum(layout.order.window_bytes / np.maximum(means, 1.0), 1.0)
    return blocks


def _touched_shards(source: Source, domain: NDArray[np.int64], chance: Floats) -> float:
    """Return the expected number of distinct shards, if `chance` is the probability of each block of a domain."""
    shard = source.blocks.shard[source.layout.table.block]
    # Log of the probability that no block of the shard is touched; clipped so that a certain hit stays finite.
    log_missed = np.bincount(shard, np.log1p(-np.minimum(chance, 1 - 1e-12))[domain])
    return float(np.sum(1 - np.exp(log_missed)))
