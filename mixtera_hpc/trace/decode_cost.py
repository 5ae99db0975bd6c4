"""Estimate how much a job decodes, and how much it reads from the file system, for data in large units.

Each domain moves through its blocks at its own speed. So serving one epoch of a domain decodes all its blocks, other
domains included: that is the lower bound. Ranks that share lanes, and too little memory, add to it. Price: one pass
over the blocks of all domains.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.stored.stored_rows import blocks_with_rows
from mixtera_hpc.dataplane.reading.stored.token_gather import blocks_with_tokens
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.formats.decoded_sizes import decodes_blocks

__all__ = ["DecodeCost", "JobShape", "check_decode_cost", "decode_cost"]

Floats = NDArray[np.float64]

OBJECT_OVERHEAD = 1.5
"""Memory of a row as an object, per byte on disk when decoded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobShape:
    """The processes that read."""

    num_groups: int
    """Ranks with batches of their own."""
    copies: int
    """Processes that read the same lanes: model-parallel peers, and worker processes."""
    readers_per_node: int

    @classmethod
    def of_job(cls, source: Source, num_ranks: int, ranks_per_node: int) -> "JobShape":
        """Return the shape of a job of `num_ranks`."""
        plane = source.config.dataplane
        workers = plane.workers or 1
        readers = 1 if plane.delivery == "lead" else plane.model_parallel_size
        return cls(
            num_groups=max(num_ranks // plane.model_parallel_size, 1),
            copies=readers * workers,
            readers_per_node=max(min(ranks_per_node, num_ranks), 1) * workers,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCost:
    """What all ranks together decode and read."""

    lower_bound: float
    """Bytes decoded per byte served with one rank and enough memory."""
    amplification: float
    """Bytes decoded per byte served."""
    read_bytes_per_step: float
    """Bytes read from the file system."""
    memory_bytes: float
    """Memory that each node needs to decode every unit once."""


def decode_cost(source: Source, served_per_step: Floats, shape: JobShape) -> DecodeCost | None:
    """Estimate the cost of steps that serve `served_per_step` items of each domain; None if nothing is decoded."""
    sizes = _DomainBytes.of_source(source)
    epochs = served_per_step / np.maximum(source.layout.epoch_items(), 1)
    served = float(epochs @ (sizes.own + sizes.single))
    if not sizes.decoded.any() or not served:
        return None
    budget = source.config.data.cache_bytes / shape.readers_per_node
    repeats = _repeats(source, served_per_step, shape) * _memory_repeats(source, sizes, shape, budget)
    decoded = float(epochs @ sizes.decoded)
    bound = (decoded + float(epochs @ sizes.single)) / served
    # Blocks that all fit into the memory of a process are decoded once and served from there.
    if sizes.collection <= budget / 4:
        return DecodeCost(lower_bound=bound, amplification=1.0, read_bytes_per_step=0.0, memory_bytes=sizes.collection)
    memory = _memory(source, sizes, shape) * shape.readers_per_node
    return DecodeCost(
        lower_bound=bound,
        amplification=float(epochs @ (sizes.decoded * repeats + sizes.single)) / served,
        read_bytes_per_step=float(epochs @ (sizes.on_disk * repeats + sizes.single)),
        memory_bytes=memory,
    )


def check_decode_cost(source: Source, cost: DecodeCost | None) -> None:
    """Refuse data that costs more than `data.max_amplification`.

    Raises:
        ConfigError: names the cures.
    """
    limit = source.config.data.max_amplification
    if cost is None or cost.amplification <= limit:
        return
    if source.layout.order.shuffle == "sequence":
        raise ConfigError(
            f"dataplane.shuffle=sequence would decode {cost.amplification:,.0f} bytes for every byte served, more than "
            f"data.max_amplification={limit:g}: every sequence decodes whole blocks of files that hold no single rows."
            "\n  Write the tokens once with mixtera-hpc tokenize, or set dataplane.shuffle=window. Or raise "
            "data.max_amplification."
        )
    raise ConfigError(
        f"This job would decode {cost.amplification:,.0f} bytes for every byte served, more than "
        f"data.max_amplification={limit:g}; at least {cost.lower_bound:.1f} are needed with this layout of the data.\n"
        "  Set dataplane.lanes to the number of ranks or more. Give each node "
        f"data.cache_bytes={cost.memory_bytes:.0f}, or lower dataplane.window_bytes. For tokens, write them once with "
        "mixtera-hpc tokenize. Or raise data.max_amplification."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _DomainBytes:
    """Bytes of one epoch of each domain; shape (K,)."""

    decoded: Floats
    """Decoded for it: its blocks, other domains included, in formats that decode whole blocks."""
    on_disk: Floats
    """The same blocks on disk."""
    own: Floats
    """Its own rows in these blocks, decoded."""
    single: Floats
    """Its rows in formats that read single rows."""
    num_blocks: Floats
    collection: float
    """All blocks of the index that are decoded as a whole."""

    @classmethod
    def of_source(cls, source: Source) -> "_DomainBytes":
        table = source.layout.table
        blocks = source.blocks
        is_decoded = np.array([decodes_blocks(name) for name in source.index.shard_formats], np.bool_)[blocks.shard]
        # Documents of a token store are copied one by one.
        is_decoded &= ~blocks_with_tokens(source)
        # A frame of a row store has rows of one domain only, most often.
        is_decoded &= ~blocks_with_rows(source)
        length = blocks.length.astype(np.float64)
        decoded = length * source.layout.expansion[blocks.shard]
        share = table.rows / np.maximum(blocks.rows[table.block], 1)
        domain = np.repeat(np.arange(source.num_domains), np.diff(table.indptr))
        whole = is_decoded[table.block]

        def sums(values: Floats) -> Floats:
            return np.bincount(domain, values, minlength=source.num_domains).astype(np.float64)

        return cls(
            decoded=sums(decoded[table.block] * whole),
            on_disk=sums(length[table.block] * whole),
            own=sums(decoded[table.block] * share * whole),
            single=sums(length[table.block] * share * ~whole),
            num_blocks=sums(whole.astype(np.float64)),
            collection=float(decoded[is_decoded].sum()),
        )


def _lanes_per_rank(source: Source, shape: JobShape) -> float:
    """Return the mean number of lanes that a rank touches."""
    lanes = source.lanes.lanes
    if shape.num_groups == 1:
        return float(lanes)
    return min(lanes / shape.num_groups + 1, lanes)


def _memory(source: Source, sizes: _DomainBytes, shape: JobShape) -> float:
    """Return the memory that one process needs for the rows of the windows in use."""
    mean_block = sizes.decoded / np.maximum(sizes.num_blocks, 1)
    # A domain has no more windows than blocks.
    window = np.maximum(mean_block, source.layout.order.window_bytes if source.lanes.lanes > 1 else 0)
    in_use = np.minimum(_lanes_per_rank(source, shape) * window, sizes.decoded)
    share = sizes.own / np.maximum(sizes.decoded, 1)
    return float((in_use * share).sum()) * OBJECT_OVERHEAD


def _repeats(source: Source, served_per_step: Floats, shape: JobShape) -> Floats:
    """Return how often a block is decoded for each domain; shape (K,)."""
    if source.layout.order.shuffle == "sequence":
        return _decodes_per_block(source) * float(shape.copies)
    if shape.num_groups == 1:
        return np.full(len(served_per_step), float(shape.copies))
    if source.lanes.lanes == 1:
        # Without lanes, every rank needs every block.
        return np.full(len(served_per_step), float(shape.num_groups * shape.copies))
    # Inside a lane the sequences are sorted by domain, so a border between ranks divides one domain of one lane.
    borders_per_lane = shape.num_groups / source.lanes.lanes
    weight = served_per_step / max(served_per_step.sum(), 1e-9)
    repeats: Floats = (1 + borders_per_lane * weight) * shape.copies
    return repeats


def _decodes_per_block(source: Source) -> Floats:
    """Return how many sequences of random places need a block of each domain; shape (K,)."""
    num_blocks = np.maximum(np.diff(source.layout.table.indptr), 1)
    sequences = source.layout.epoch_items() / source.grid.stride
    # A sequence needs the block in which it begins and those whose borders it crosses.
    decodes: Floats = np.maximum((sequences + num_blocks) / num_blocks, 1.0)
    return decodes


def _memory_repeats(source: Source, sizes: _DomainBytes, shape: JobShape, budget: float) -> float:
    """Return how often a process decodes a block because its rows do not fit."""
    if source.layout.order.shuffle == "sequence":
        return 1.0
    # Three quarters of the budget hold rows. The part of a window that stays is halved until all parts fit.
    shortage = _memory(source, sizes, shape) / (budget * 3 / 4)
    return 2.0 ** math.ceil(math.log2(shortage)) if shortage > 1 else 1.0
