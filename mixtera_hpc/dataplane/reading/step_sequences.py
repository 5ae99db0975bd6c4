"""The sequences of batches, in the order of their positions: those that a plan serves.

With lanes, the sequences of a step follow from the counts of the domains at its borders, without the plan's slots.
Price per step: a few numpy operations on numbers per domain and per lane, and on the sequences of the rank's lanes, for
any number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.packing.check_packing import balance_group
from mixtera_hpc.core.planner import ChunkPlan
from mixtera_hpc.core.slots.chunk_order import ChunkOrder
from mixtera_hpc.core.slots.segment_order import Slots
from mixtera_hpc.core.slots.step_slots import StepSlots
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.packing.balanced_positions import balance_slots
from mixtera_hpc.dataplane.reading.packing.sequence_documents import SequenceDocuments
from mixtera_hpc.dataplane.reading.source import Source

__all__ = ["StepContent", "planned_slots", "slots_of_plan", "slots_of_steps"]

Ints = NDArray[np.int64]


def planned_slots(
    source: Source, order: ChunkOrder, first_step: int, steps: Sequence[int], positions: Sequence[slice]
) -> StepSlots:
    """Return the sequences at some positions of the batches of a chunk, in the order of the plan and the lanes.

    Args:
        source: the data.
        order: the order of the chunk.
        first_step: first data step of the chunk.
        steps: ascending data steps of the chunk. The last step of the data may have fewer sequences.
        positions: of each batch; both ends are given.
    """
    schedule = source.planner.batch_schedule
    sizes = [schedule.size_at(step) for step in steps]
    if len(steps) and steps[-1] - steps[0] == len(steps) - 1:
        # Nearly always a step begins where the one before it ends.
        borders = list(accumulate(sizes, initial=schedule.slots(first_step, steps[0])))
        begins = borders[:-1]
    else:
        begins = [schedule.slots(first_step, step) for step in steps]
        borders = begins + [begin + size for begin, size in zip(begins, sizes, strict=True)]
    if source.lanes.lanes == 1:
        # Without lanes a batch has the order of the plan, and only the slots that are wanted are computed.
        ranges = [(begin + own.start, begin + own.stop) for begin, own in zip(begins, positions, strict=True)]
        return order.slots(ranges)
    counts = order.cursors + order.counts_before(np.array(borders, np.int64))
    return source.lanes.positions(counts[: len(steps)], counts[-len(steps) :], positions)


def slots_of_steps(
    source: Source,
    order: ChunkOrder,
    first_step: int,
    steps: Sequence[int],
    batch_slice: BatchSlice,
    documents: SequenceDocuments,
) -> StepSlots:
    """Return the domains and served numbers of the sequences that a rank gets of the batches of a chunk.

    Args:
        source: the data.
        order: the order of the chunk.
        first_step: first data step of the chunk.
        steps: ascending data steps of the chunk. The last step of the data may have fewer sequences.
        batch_slice: the part of each batch.
        documents: looks up documents, for `dataplane.balance`.
    """
    plane = source.config.dataplane
    sizes = [source.planner.batch_schedule.size_at(step) for step in steps]
    part_of = {size: batch_slice.positions(size) for size in set(sizes)}
    positions = [part_of[size] for size in sizes]
    if plane.balance != ("attention" if source.layout.in_tokens else "cost"):
        return planned_slots(source, order, first_step, steps, positions)
    # Whole groups of positions are ordered together.
    groups = [balance_group(plane, size) for size in sizes]
    around = [
        slice(own.start // group * group, -(-own.stop // group) * group)
        for own, group in zip(positions, groups, strict=True)
    ]
    planned = planned_slots(source, order, first_step, steps, around)
    balanced = balance_slots(source, documents, groups, planned.steps())
    inside = [
        slice(own.start - whole.start, own.stop - whole.start) for own, whole in zip(positions, around, strict=True)
    ]
    return StepSlots.of_steps([slots.select(own) for slots, own in zip(balanced, inside, strict=True)])


def slots_of_plan(source: Source, plan: ChunkPlan, documents: SequenceDocuments | None = None) -> Slots:
    """Return the domain and the served number of the sequence at each position of each batch of `plan`.

    Args:
        source: the data.
        plan: the plan of a chunk.
        documents: looks up documents, for `dataplane.balance`; None makes a new one.
    """
    order = source.planner.order(plan)
    documents = SequenceDocuments(source, source.streams()) if documents is None else documents
    data_steps = range(plan.first_step, plan.first_step + plan.num_steps)
    return slots_of_steps(source, order, plan.first_step, data_steps, BatchSlice(), documents).together


@dataclass(frozen=True, slots=True)
class StepContent:
    """The sequences that this rank has to read for one step."""

    step: int
    """Training step."""
    num_sequences: int
    """Rows of the batch that are sequences; those behind them are padding."""
    domain_ids: NDArray[np.int64]
    """Domain of each row of the batch; -1 for padding."""
    sequence: Ints
    """Number of each row's sequence in the stream of its domain; -1 for padding."""
    micro_batches: tuple[slice, ...] = ()
    """Rows of each micro-batch, with `dataplane.sample_budget`."""

    @property
    def is_padding(self) -> NDArray[np.bool_]:
        """Mask of the rows that stand for no sequence; shape (B,)."""
        return self.domain_ids < 0
