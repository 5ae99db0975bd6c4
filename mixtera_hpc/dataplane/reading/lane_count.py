"""The number of lanes of a run that does not set `dataplane.lanes`.

A rank of a large job reads little more than its own part of the data if few nodes share a lane. A node of four ranks
with 8 sequences each serves 32 sequences of a step, so there is one lane for every 32 sequences of the largest global
batch. Where rows are decoded in large units, a node also keeps the rows of a window of each of its lanes in memory. A
job may have one node, so there are no more lanes than windows that fit into the default memory of one.

The number belongs to the identity of a run. It depends on the global batch, which does too, and on the index, and not
on the number of nodes, nor on stores beside the index. Rank 0 computes it. Price: for global batches of 1,024 and more,
a few sums over the blocks of all domains.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.batch_ramp import batch_schedule_of
from mixtera_hpc.config.schema import DataPlaneConfig
from mixtera_hpc.dataplane.reading.stream_layout import StreamLayout
from mixtera_hpc.formats.decoded_sizes import decodes_blocks

__all__ = ["default_lanes", "lanes_in_use", "lanes_of_batch"]

Floats = NDArray[np.float64]

SEQUENCES_PER_LANE = 32
"""With 64, a rank of 1,024 with 8 sequences of stored tokens costs 1.5 times as much as a rank alone; with 32, 1.0."""

MIN_LANES = 16
MAX_LANES = 1024
"""A rank that reads all lanes has windows of each domain in each of them. With 1,024 lanes, it takes 1.3 times the time
of 256."""

MAX_WINDOW_BYTES = 640 << 20
"""Decoded bytes of the windows of all lanes, of the rows that are served. With 1.2 bytes of memory for each, they fit
into the default `data.cache_bytes` of one node: half of it is for shared blocks, and a fourth of the rest for rows that
are kept ahead."""


def default_lanes(plane: DataPlaneConfig, layout: StreamLayout, shard_formats: Sequence[str]) -> int:
    """Return the number of lanes for the global batch and the data; a power of two.

    Args:
        plane: the settings of the data plane.
        layout: the blocks of all domains.
        shard_formats: format of every shard.
    """
    # Without windows there are no lanes, and the number has no effect.
    if plane.shuffle != "window":
        return MIN_LANES
    lanes = lanes_of_batch(plane)
    if lanes > MIN_LANES and any(map(decodes_blocks, shard_formats)):
        sizes = _DecodedSizes.of(layout, shard_formats)
        while lanes > MIN_LANES and sizes.window_bytes(lanes) > MAX_WINDOW_BYTES:
            lanes //= 2
    return lanes


def lanes_in_use(plane: DataPlaneConfig) -> int | None:
    """Return the number of lanes of an open data plane; None for orders without lanes."""
    return plane.lanes if plane.shuffle == "window" else None


def lanes_of_batch(plane: DataPlaneConfig) -> int:
    """Return the number of lanes for the largest global batch; a power of two."""
    largest = batch_schedule_of(plane).largest
    power = 1 << max(largest // SEQUENCES_PER_LANE, 1).bit_length() - 1
    return min(max(power, MIN_LANES), MAX_LANES)


@dataclass(frozen=True, slots=True)
class _DecodedSizes:
    """Decoded bytes of the blocks of each domain that are decoded as a whole; shape (num_domains,) each."""

    all_rows: Floats
    """Bytes of the blocks, with the rows of all domains."""
    own_rows: Floats
    """Bytes of the domain's own rows in them."""
    window: Floats
    """Bytes of a window, with the rows of all domains: at least one block."""

    @classmethod
    def of(cls, layout: StreamLayout, shard_formats: Sequence[str]) -> "_DecodedSizes":
        """Return the sizes of the domains of a layout."""
        blocks = layout.blocks
        table = layout.table
        is_decoded = np.array([decodes_blocks(name) for name in shard_formats], np.bool_)
        block_bytes = blocks.length * layout.expansion[blocks.shard] * is_decoded[blocks.shard]
        of_entry = block_bytes[table.block]
        share = table.rows / np.maximum(blocks.rows[table.block], 1)
        domain = np.repeat(np.arange(table.num_domains), np.diff(table.indptr))

        def sums(values: Floats) -> Floats:
            return np.bincount(domain, values, minlength=table.num_domains).astype(np.float64)

        all_rows = sums(of_entry)
        mean_block = all_rows / np.maximum(sums((of_entry > 0).astype(np.float64)), 1)
        return cls(all_rows, sums(of_entry * share), np.maximum(mean_block, layout.order.window_bytes))

    def window_bytes(self, lanes: int) -> float:
        """Return the bytes of the rows of one window of each lane, of all domains."""
        # A domain has no more windows than blocks.
        in_use = np.minimum(lanes * self.window, self.all_rows)
        return float((in_use * self.own_rows / np.maximum(self.all_rows, 1)).sum())
