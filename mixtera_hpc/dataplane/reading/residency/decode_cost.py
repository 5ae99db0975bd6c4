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
from mixtera_hpc.dataplane.reading.residency.domain_bytes import DomainBytes
from mixtera_hpc.dataplane.reading.residency.job_shape import JobShape
from mixtera_hpc.dataplane.reading.residency.resident_rows import MAX_ROW_SHARE
from mixtera_hpc.dataplane.reading.residency.rows_ahead import ALL_FIT
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.formats.decoded_sizes import decodes_blocks

__all__ = ["DecodeCost", "cost_with_more_lanes", "decode_cost"]

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
    sizes = DomainBytes.of_source(source)
    epochs = served_per_step / np.maximum(source.layout.epoch_items(), 1)
    if not sizes.decoded.any() or not epochs @ (sizes.own + sizes.single):
        return None
    return _CostModel(source=source, shape=shape, sizes=sizes, epochs=epochs).cost()


def cost_with_more_lanes(source: Source, served_per_step: Floats, shape: JobShape) -> tuple[int, DecodeCost] | None:
    """Return a number of lanes with which the job decodes clearly less, and its cost; None if there is none.

    The number of lanes belongs to the identity of a run, so its default cannot depend on the number of nodes.
    """
    lanes = LANES_PER_NODE * shape.num_decoders
    now = decode_cost(source, served_per_step, shape)
    if now is None or shape.num_decoders == 1 or lanes <= source.lanes.lanes:
        return None
    if _is_at_random_places(source):
        return None
    cost = decode_cost(source.with_lanes(lanes), served_per_step, shape)
    if cost is None or cost.amplification > CLEARLY_LESS * now.amplification:
        return None
    return (lanes, cost) if cost.memory_bytes <= source.config.data.cache_bytes else None


def _is_at_random_places(source: Source) -> bool:
    """Return True if consecutive sequences of a domain are at random places of its epoch."""
    return source.layout.order.shuffle == "sequence"


@dataclass(frozen=True, slots=True, kw_only=True)
class _CostModel:
    """The model of the cost of one job."""

    source: Source
    shape: JobShape
    sizes: DomainBytes
    epochs: Floats
    """Epochs of each domain that a step serves; shape (K,)."""

    def cost(self) -> DecodeCost:
        """Return the cost of a step."""
        sizes = self.sizes
        served_bytes = sizes.own + sizes.single
        served = float(self.epochs @ served_bytes)
        single = float(self.epochs @ sizes.single)
        groups = self._groups_by_speed()
        together = np.array([self._bytes_of_group(group) for group in groups])
        bound = (float(together[:, 0].sum()) + single) / served
        # Blocks that all fit into the memory of a process are decoded once and served from there.
        if sizes.collection <= max(self._reader_bytes, self._shared_bytes) * ALL_FIT:
            return DecodeCost(
                lower_bound=bound, amplification=1.0, read_bytes_per_step=0.0, memory_bytes=sizes.collection
            )

        rows_memory = self._rows_memory()
        blocks_memory = self._blocks_memory()
        share = self._share_together(self._reader_bytes - rows_memory, blocks_memory)
        weight = self.epochs * served_bytes / served
        weight_of_group = np.array([weight[group].sum() for group in groups])
        alone = np.stack([self.epochs * sizes.decoded, self.epochs * sizes.on_disk]) * self._decodes_of_domains(weight)
        as_groups = together.T * self._decodes_of_domains(weight_of_group)
        decoded, on_disk = share * as_groups.sum(axis=1) + (1 - share) * alone.sum(axis=1)
        repeats = self._decodes_for_memory(rows_memory)
        return DecodeCost(
            lower_bound=bound,
            amplification=(float(decoded) * repeats + single) / served,
            read_bytes_per_step=float(on_disk) * repeats + single,
            memory_bytes=self._node_memory(rows_memory, blocks_memory),
        )

    @property
    def _shared_bytes(self) -> float:
        """Memory for blocks that the processes of a node share."""
        return 0.0 if self.shape.num_nodes is None else self.source.config.data.cache_bytes * SHARED_SHARE

    @property
    def _reader_bytes(self) -> float:
        """Memory of each process that reads."""
        return (self.source.config.data.cache_bytes - self._shared_bytes) / self.shape.readers_per_node

    def _groups_by_speed(self) -> list[NDArray[np.intp]]:
        """Return groups of domains that pass through their streams at the same number of epochs per step."""
        if _is_at_random_places(self.source):
            # Sequences are at random places, so no two domains need the same block at one time.
            return list(np.arange(self.source.num_domains)[:, None])
        speed = self.source.weights / np.maximum(self.source.layout.epoch_items(), 1)
        order = np.argsort(speed)
        ordered = speed[order]
        is_faster = ordered[1:] > ordered[:-1] * (1 + SAME_SPEED)
        return np.split(order, np.flatnonzero(is_faster) + 1)

    def _bytes_of_group(self, group: NDArray[np.intp]) -> tuple[float, float]:
        """Return the bytes per step of the blocks of a group, decoded and on disk; each counts once for all domains."""
        sizes = self.sizes
        if len(group) == 1:
            epochs = self.epochs[group[0]]
            return float(epochs * sizes.decoded[group[0]]), float(epochs * sizes.on_disk[group[0]])
        table = self.source.layout.table
        blocks = np.concatenate([table.block[self.source.layout.entries(int(domain))] for domain in group])
        is_needed = np.bincount(blocks, minlength=len(sizes.block_decoded)) > 0
        speed = float(self.epochs[group].max())
        return speed * float(sizes.block_decoded[is_needed].sum()), speed * float(sizes.block_on_disk[is_needed].sum())

    @property
    def _min_window_bytes(self) -> int:
        """Bytes of a window whose blocks are smaller; 0 without lanes, where one window at a time is in use."""
        return self.source.layout.order.window_bytes if self.source.lanes.lanes > 1 else 0

    def _lanes_per_reader(self, num_readers: int) -> float:
        """Return the mean number of lanes that each of several readers of different lanes touches."""
        lanes = self.source.lanes.lanes
        if num_readers == 1:
            return float(lanes)
        return min(lanes / num_readers + 1, lanes)

    def _rows_memory(self) -> float:
        """Return the memory that one process needs for the rows of the windows in use."""
        mean_block = self.sizes.decoded / np.maximum(self.sizes.num_blocks, 1)
        # A domain has no more windows than blocks.
        window = np.maximum(mean_block, self._min_window_bytes)
        in_use = np.minimum(self._lanes_per_reader(self.shape.num_groups) * window, self.sizes.decoded)
        share = self.sizes.own / np.maximum(self.sizes.decoded, 1)
        return float((in_use * share).sum()) * ROW_OVERHEAD

    def _blocks_memory(self) -> float:
        """Return the memory that one process or node needs for the blocks that domains decode together."""
        mean_block = float(self.sizes.decoded.sum() / max(self.sizes.num_blocks.sum(), 1))
        window = max(mean_block, self._min_window_bytes)
        per_lane = AHEAD_PER_LANE if self.shape.num_nodes is None else BLOCKS_PER_LANE
        return min(self._lanes_per_reader(self.shape.num_decoders) * window * per_lane, self.sizes.collection)

    def _share_together(self, ahead_bytes: float, blocks_memory: float) -> float:
        """Return the share of the decoding that domains with the same speed do together; between 0 and 1.

        Args:
            ahead_bytes: memory of a process for rows that are needed later.
            blocks_memory: see `_blocks_memory`.
        """
        if self.shape.num_nodes is None:
            # The rows that are needed first stay, so the first bytes of memory save most.
            return math.sqrt(min(max(ahead_bytes / blocks_memory, 0.0), 1.0))
        # With shared blocks for one place per lane, domains decode alone; with `BLOCKS_PER_LANE`, together.
        per_lane = self._shared_bytes / blocks_memory * BLOCKS_PER_LANE
        return min(max((per_lane - 1) / (BLOCKS_PER_LANE - 1), 0.0), 1.0)

    def _node_memory(self, rows_memory: float, blocks_memory: float) -> float:
        """Return the `data.cache_bytes` with which every block is decoded once, given the memory of a reader."""
        if self.shape.num_nodes is None:
            return (rows_memory + blocks_memory) * self.shape.readers_per_node
        # Rows and shared blocks have parts of a fixed size.
        return max(rows_memory * self.shape.readers_per_node / (1 - SHARED_SHARE), blocks_memory / SHARED_SHARE)

    def _decodes_of_domains(self, weight: Floats) -> Floats:
        """Return how often a block is decoded for domains with these weights; shape of `weight`."""
        if _is_at_random_places(self.source):
            return self._decodes_per_block() * float(self.shape.copies)
        if self.shape.num_decoders == 1:
            return np.full(len(weight), float(self.shape.copies))
        if self.source.lanes.lanes == 1:
            # Without lanes, every rank needs every block.
            return np.full(len(weight), float(self.shape.num_decoders * self.shape.copies))
        # Inside a lane the sequences are sorted by domain, so a border between ranks divides one domain of one lane.
        borders_per_lane = self.shape.num_decoders / self.source.lanes.lanes
        repeats: Floats = (1 + borders_per_lane * weight) * self.shape.copies
        return repeats

    def _decodes_per_block(self) -> Floats:
        """Return how many sequences of random places need a block of each domain; shape (K,)."""
        num_blocks = np.maximum(np.diff(self.source.layout.table.indptr), 1)
        sequences = self.source.layout.epoch_items() / self.source.grid.stride
        # A sequence needs the block in which it begins and those whose borders it crosses.
        decodes: Floats = np.maximum((sequences + num_blocks) / num_blocks, 1.0)
        return decodes

    def _decodes_for_memory(self, rows_memory: float) -> float:
        """Return how often a process decodes a block because its rows do not fit."""
        if _is_at_random_places(self.source):
            return 1.0
        # The part of a window that stays is halved until all parts fit. At least one byte of memory is assumed.
        shortage = rows_memory / max(self._reader_bytes * MAX_ROW_SHARE, 1.0)
        return 2.0 ** math.ceil(math.log2(shortage)) if shortage > 1 else 1.0
