"""Estimate how much a job decodes, and how much it reads from the file system, for data in large units.

Domains with the same number of epochs per step pass through the blocks together, and a block is decoded once for all of
them. Other domains move through their blocks at their own speed: serving one epoch of such a domain decodes all its
blocks, other domains included. That is the lower bound, Σ weight / share in general, and 1 where all domains have their
natural weights. Ranks that share lanes, and too little memory, add to it. Price: one pass over the blocks of all
domains; nothing for formats that read single rows.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.processes.block_memory import SHARED_SHARE
from mixtera_hpc.dataplane.reading.residency.resident_rows import MAX_ROW_SHARE
from mixtera_hpc.dataplane.reading.residency.rows_ahead import ALL_FIT, decoded_blocks
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.formats.decoded_sizes import decodes_blocks

__all__ = ["DecodeCost", "JobShape", "check_decode_cost", "check_job", "cost_with_more_lanes", "decode_cost"]

Floats = NDArray[np.float64]

ROW_OVERHEAD = 1.2
"""Memory of a row that stays in memory, per decoded byte."""
SAME_SPEED = 0.02
"""Domains whose epochs per step differ by less, relatively, count as moving together."""
BLOCKS_PER_LANE = 2.5
"""Blocks (or windows) of each lane that the shared memory must hold, so that domains with the same speed decode each
block once: they are not exactly at the same place, because their shares differ from block to block."""
AHEAD_PER_LANE = 1.5
"""The same for a process that decodes for itself, which keeps only rows that are needed; in the size of blocks."""

LANES_PER_NODE = 4
"""Lanes per node that are proposed. Then a quarter of all units is decoded twice, by nodes that divide a lane. More
lanes need more memory."""
CLEARLY_LESS = 0.8
"""Another number of lanes is proposed if at most this part of the bytes is decoded with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobShape:
    """The processes that read."""

    num_groups: int
    """Ranks with batches of their own."""
    copies: int
    """Processes that read the same lanes: model-parallel peers, and worker processes."""
    readers_per_node: int
    num_nodes: int | None = None
    """Nodes whose processes share decoded blocks, and read lanes that others do not read; None if none are shared."""

    @classmethod
    def of_job(cls, source: Source, num_ranks: int, ranks_per_node: int) -> "JobShape":
        """Return the shape of a job of `num_ranks`."""
        plane = source.config.dataplane
        workers = plane.workers or 1
        readers = 1 if plane.delivery == "lead" else plane.model_parallel_size
        ranks_per_node = max(min(ranks_per_node, num_ranks), 1)
        copies = readers * workers
        num_nodes: int | None = None
        if ranks_per_node * workers > 1:
            # Peers of a group that are on other nodes read the same lanes.
            copies = -(-readers // ranks_per_node)
            num_nodes = max(-(-num_ranks // ranks_per_node) // copies, 1)
        return cls(
            num_groups=max(num_ranks // plane.model_parallel_size, 1),
            copies=copies,
            readers_per_node=ranks_per_node * workers,
            num_nodes=num_nodes,
        )

    @property
    def num_decoders(self) -> int:
        """Nodes or ranks that decode for themselves."""
        return self.num_groups if self.num_nodes is None else self.num_nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCost:
    """The bytes that all ranks together decode and read."""

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
    if not any(map(decodes_blocks, set(source.index.shard_formats))):
        return None
    sizes = _DomainBytes.of_source(source)
    epochs = served_per_step / np.maximum(source.layout.epoch_items(), 1)
    served = float(epochs @ (sizes.own + sizes.single))
    if not sizes.decoded.any() or not served:
        return None
    cache_bytes = source.config.data.cache_bytes
    shared_bytes = 0.0 if shape.num_nodes is None else cache_bytes * SHARED_SHARE
    budget = (cache_bytes - shared_bytes) / shape.readers_per_node
    single = float(epochs @ sizes.single)
    groups = _groups_by_speed(source)
    together = np.array([_bytes_of_group(source, sizes, epochs, group) for group in groups])
    bound = (float(together[:, 0].sum()) + single) / served
    # Blocks that all fit into the memory of a process are decoded once and served from there.
    if sizes.collection <= max(budget, shared_bytes) * ALL_FIT:
        return DecodeCost(lower_bound=bound, amplification=1.0, read_bytes_per_step=0.0, memory_bytes=sizes.collection)

    rows_memory = _memory(source, sizes, shape)
    blocks_memory = _blocks_memory(source, sizes, shape)
    share = _share_together(shape, budget - rows_memory, shared_bytes, blocks_memory)
    weight = epochs * (sizes.own + sizes.single) / served
    weight_of_group = np.array([weight[group].sum() for group in groups])
    alone = np.stack([epochs * sizes.decoded, epochs * sizes.on_disk]) * _decodes_of_domains(source, weight, shape)
    as_groups = together.T * _decodes_of_domains(source, weight_of_group, shape)
    decoded, on_disk = share * as_groups.sum(axis=1) + (1 - share) * alone.sum(axis=1)
    repeats = _decodes_for_memory(source, rows_memory, budget)
    return DecodeCost(
        lower_bound=bound,
        amplification=(float(decoded) * repeats + single) / served,
        read_bytes_per_step=float(on_disk) * repeats + single,
        memory_bytes=_node_memory(rows_memory, blocks_memory, shape),
    )


def cost_with_more_lanes(source: Source, served_per_step: Floats, shape: JobShape) -> tuple[int, DecodeCost] | None:
    """Return a number of lanes with which the job decodes clearly less, and its cost; None if there is none.

    The number of lanes belongs to the identity of a run, so its default cannot depend on the number of nodes.
    """
    lanes = LANES_PER_NODE * shape.num_decoders
    now = decode_cost(source, served_per_step, shape)
    if now is None or shape.num_decoders == 1 or lanes <= source.lanes.lanes:
        return None
    if source.layout.order.shuffle == "sequence":
        return None
    cost = decode_cost(source.with_lanes(lanes), served_per_step, shape)
    if cost is None or cost.amplification > CLEARLY_LESS * now.amplification:
        return None
    return (lanes, cost) if cost.memory_bytes <= source.config.data.cache_bytes else None


def _share_together(shape: JobShape, ahead_bytes: float, shared_bytes: float, blocks_memory: float) -> float:
    """Return the share of the decoding that domains with the same speed do together; between 0 and 1.

    Args:
        shape: the processes that read.
        ahead_bytes: memory of a process for rows that are needed later.
        shared_bytes: memory for blocks that the processes of a node share.
        blocks_memory: see `_blocks_memory`.
    """
    if shape.num_nodes is None:
        # The rows that are needed first stay, so the first bytes of memory save most.
        return math.sqrt(min(max(ahead_bytes / blocks_memory, 0.0), 1.0))
    # With shared blocks for one place per lane, domains decode alone; with `BLOCKS_PER_LANE`, together.
    per_lane = shared_bytes / blocks_memory * BLOCKS_PER_LANE
    return min(max((per_lane - 1) / (BLOCKS_PER_LANE - 1), 0.0), 1.0)


def _node_memory(rows_memory: float, blocks_memory: float, shape: JobShape) -> float:
    """Return the `data.cache_bytes` with which every block is decoded once, given the memory of a reader."""
    if shape.num_nodes is None:
        return (rows_memory + blocks_memory) * shape.readers_per_node
    # Rows and shared blocks have parts of a fixed size.
    return max(rows_memory * shape.readers_per_node / (1 - SHARED_SHARE), blocks_memory / SHARED_SHARE)


def check_job(source: Source, num_ranks: int, ranks_per_node: int) -> None:
    """Refuse a job that decodes more than `data.max_amplification` with the weights of its first step.

    Raises:
        ConfigError: names the cures.
    """
    shape = JobShape.of_job(source, num_ranks, ranks_per_node)
    served_per_step = source.weights * source.planner.batch_schedule.size_at(0) * source.grid.stride
    check_decode_cost(source, decode_cost(source, served_per_step, shape))


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
    config = source.config
    memory = ""
    if cost.memory_bytes > config.data.cache_bytes:
        memory = (
            f" data.cache_bytes={config.data.cache_bytes} per node is too small: set "
            f"data.cache_bytes={cost.memory_bytes:.0f}, or lower dataplane.window_bytes or dataplane.lanes."
        )
    raise ConfigError(
        f"This job would decode {cost.amplification:,.1f} bytes for every byte served, more than "
        f"data.max_amplification={limit:g}; at least {cost.lower_bound:.1f} are needed with this layout of the data.\n"
        f" {memory} With more ranks than lanes ({source.lanes.lanes}), set dataplane.lanes to the number of ranks "
        "before the run begins. For tokens, write them once with mixtera-hpc tokenize. Or raise data.max_amplification."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _DomainBytes:
    """Bytes of one epoch of each domain; shape (K,)."""

    decoded: Floats
    """Decoded for it: its blocks, other domains included, in formats that decode whole blocks."""
    on_disk: Floats
    """The same blocks on disk."""
    own: Floats
    """Decoded bytes of the domain's own rows in these blocks."""
    single: Floats
    """Bytes of the domain's rows in formats that read single rows."""
    num_blocks: Floats
    collection: float
    """All blocks of the index that are decoded as a whole."""
    block_decoded: Floats
    """Decoded bytes of every block of the index; 0 in formats that read single rows. Shape (num_blocks,)."""
    block_on_disk: Floats
    """Bytes of each block on disk; shape (num_blocks,)."""

    @classmethod
    def of_source(cls, source: Source) -> "_DomainBytes":
        table = source.layout.table
        blocks = source.blocks
        is_decoded = decoded_blocks(source)
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
            block_decoded=decoded * is_decoded,
            block_on_disk=length * is_decoded,
        )


def _lanes_per_reader(source: Source, num_readers: int) -> float:
    """Return the mean number of lanes that each of several readers of different lanes touches."""
    lanes = source.lanes.lanes
    if num_readers == 1:
        return float(lanes)
    return min(lanes / num_readers + 1, lanes)


def _memory(source: Source, sizes: _DomainBytes, shape: JobShape) -> float:
    """Return the memory that one process needs for the rows of the windows in use."""
    mean_block = sizes.decoded / np.maximum(sizes.num_blocks, 1)
    # A domain has no more windows than blocks.
    window = np.maximum(mean_block, source.layout.order.window_bytes if source.lanes.lanes > 1 else 0)
    in_use = np.minimum(_lanes_per_reader(source, shape.num_groups) * window, sizes.decoded)
    share = sizes.own / np.maximum(sizes.decoded, 1)
    return float((in_use * share).sum()) * ROW_OVERHEAD


def _blocks_memory(source: Source, sizes: _DomainBytes, shape: JobShape) -> float:
    """Return the memory that one process or node needs for the blocks that domains decode together."""
    mean_block = float(sizes.decoded.sum() / max(sizes.num_blocks.sum(), 1))
    window = max(mean_block, source.layout.order.window_bytes if source.lanes.lanes > 1 else 0)
    per_lane = AHEAD_PER_LANE if shape.num_nodes is None else BLOCKS_PER_LANE
    return min(_lanes_per_reader(source, shape.num_decoders) * window * per_lane, sizes.collection)


def _groups_by_speed(source: Source) -> list[NDArray[np.intp]]:
    """Return groups of domains that pass through their streams at the same number of epochs per step."""
    if source.layout.order.shuffle == "sequence":
        # Sequences are at random places, so no two domains need the same block at one time.
        return list(np.arange(source.num_domains)[:, None])
    speed = source.weights / np.maximum(source.layout.epoch_items(), 1)
    order = np.argsort(speed)
    ordered = speed[order]
    is_faster = ordered[1:] > ordered[:-1] * (1 + SAME_SPEED)
    return np.split(order, np.flatnonzero(is_faster) + 1)


def _bytes_of_group(
    source: Source, sizes: _DomainBytes, epochs: Floats, group: NDArray[np.intp]
) -> tuple[float, float]:
    """Return the bytes per step of the blocks of a group, each decoded once for all its domains; and those on disk."""
    if len(group) == 1:
        return float((epochs * sizes.decoded)[group[0]]), float((epochs * sizes.on_disk)[group[0]])
    table = source.layout.table
    blocks = np.concatenate([table.block[source.layout.entries(int(domain))] for domain in group])
    is_needed = np.bincount(blocks, minlength=len(sizes.block_decoded)) > 0
    speed = float(epochs[group].max())
    return speed * float(sizes.block_decoded[is_needed].sum()), speed * float(sizes.block_on_disk[is_needed].sum())


def _decodes_of_domains(source: Source, weight: Floats, shape: JobShape) -> Floats:
    """Return how often a block is decoded for domains with these weights; shape of `weight`."""
    if source.layout.order.shuffle == "sequence":
        return _decodes_per_block(source) * float(shape.copies)
    if shape.num_decoders == 1:
        return np.full(len(weight), float(shape.copies))
    if source.lanes.lanes == 1:
        # Without lanes, every rank needs every block.
        return np.full(len(weight), float(shape.num_decoders * shape.copies))
    # Inside a lane the sequences are sorted by domain, so a border between ranks divides one domain of one lane.
    borders_per_lane = shape.num_decoders / source.lanes.lanes
    repeats: Floats = (1 + borders_per_lane * weight) * shape.copies
    return repeats


def _decodes_per_block(source: Source) -> Floats:
    """Return how many sequences of random places need a block of each domain; shape (K,)."""
    num_blocks = np.maximum(np.diff(source.layout.table.indptr), 1)
    sequences = source.layout.epoch_items() / source.grid.stride
    # A sequence needs the block in which it begins and those whose borders it crosses.
    decodes: Floats = np.maximum((sequences + num_blocks) / num_blocks, 1.0)
    return decodes


def _decodes_for_memory(source: Source, rows_memory: float, budget: float) -> float:
    """Return how often a process decodes a block because its rows do not fit."""
    if source.layout.order.shuffle == "sequence":
        return 1.0
    # The part of a window that stays is halved until all parts fit. The memory may be 0: at least one byte is assumed.
    shortage = rows_memory / max(budget * MAX_ROW_SHARE, 1.0)
    return 2.0 ** math.ceil(math.log2(shortage)) if shortage > 1 else 1.0
