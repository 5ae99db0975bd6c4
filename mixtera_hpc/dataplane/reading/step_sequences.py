"""The sequences of batches, in the order of their positions: those that a plan serves.

With lanes, the sequences of a step follow from the counts of the domains at its borders, without the plan's slots.
Price per step: a few numpy operations on numbers per domain and per lane, and on the sequences of the rank's lanes, for
any number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.packing.check_packing import balance_group
from mixtera_hpc.core.chunk_plan import ChunkPlan
from mixtera_hpc.core.slots.batch_schedule import BatchSchedule
from mixtera_hpc.core.slots.chunk_order import ChunkOrder, counts_of_chunks, slots_of_chunks
from mixtera_hpc.core.slots.segment_order import Slots
from mixtera_hpc.core.slots.step_slots import StepSlots
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.packing.balanced_positions import balance_slots
from mixtera_hpc.dataplane.reading.packing.sequence_documents import SequenceDocuments
from mixtera_hpc.dataplane.reading.source import Source

__all__ = [
    "ChunkSteps",
    "StepContent",
    "is_last_chunk",
    "planned_slots",
    "slots_of_plan",
    "slots_of_steps",
    "training_steps_of",
]

Ints = NDArray[np.int64]


class ChunkSteps(NamedTuple):
    """Some data steps of one chunk."""

    order: ChunkOrder
    first_step: int
    """First data step of the chunk."""
    steps: Sequence[int]
    """Ascending data steps. The last step of the data may have fewer sequences."""


def planned_slots(source: Source, chunks: Sequence[ChunkSteps], positions: Sequence[slice]) -> StepSlots:
    """Return the sequences at some positions of the batches of chunks, in the order of the plan and the lanes.

    Args:
        source: the data.
        chunks: the steps, of one chunk or of chunks that follow each other.
        positions: of each batch; both ends are given.
    """
    schedule = source.planner.batch_schedule
    orders = [chunk.order for chunk in chunks]
    begins, borders = zip(*(_slot_borders(schedule, chunk) for chunk in chunks), strict=True)
    if source.lanes.lanes == 1:
        # Without lanes a batch has the order of the plan, and only the slots that are wanted are computed.
        rest = iter(positions)
        ranges = [
            [(begin + own.start, begin + own.stop) for begin, own in zip(chunk, islice(rest, len(chunk)), strict=True)]
            for chunk in begins
        ]
        return slots_of_chunks(orders, ranges)
    counts = counts_of_chunks(orders, [np.array(of_chunk, np.int64) for of_chunk in borders])
    first = [own[: len(chunk)] for own, chunk in zip(counts, begins, strict=True)]
    stop = [own[len(own) - len(chunk) :] for own, chunk in zip(counts, begins, strict=True)]
    return source.lanes.positions(np.concatenate(first), np.concatenate(stop), positions)


def _slot_borders(schedule: BatchSchedule, chunk: ChunkSteps) -> tuple[list[int], list[int]]:
    """Return the first slot of each of n steps, counted in the chunk, and the slots at which they begin and end.

    The first n of the latter are those at which they begin, the last n those at which they end.
    """
    steps = chunk.steps
    sizes = [schedule.size_at(step) for step in steps]
    if len(steps) and steps[-1] - steps[0] == len(steps) - 1:
        # Nearly always a step begins where the one before it ends.
        borders = list(accumulate(sizes, initial=schedule.slots(chunk.first_step, steps[0])))
        return borders[:-1], borders
    begins = [schedule.slots(chunk.first_step, step) for step in steps]
    return begins, begins + [begin + size for begin, size in zip(begins, sizes, strict=True)]


def slots_of_steps(
    source: Source, chunks: Sequence[ChunkSteps], batch_slice: BatchSlice, documents: SequenceDocuments
) -> StepSlots:
    """Return the domains and served numbers of the sequences that a rank gets of the batches of chunks.

    Args:
        source: the data.
        chunks: the steps, of one chunk or of chunks that follow each other.
        batch_slice: the part of each batch.
        documents: looks up documents, for `dataplane.balance`.
    """
    plane = source.config.dataplane
    sizes = [source.planner.batch_schedule.size_at(step) for chunk in chunks for step in chunk.steps]
    part_of = {size: batch_slice.positions(size) for size in set(sizes)}
    positions = [part_of[size] for size in sizes]
    if plane.balance != ("attention" if source.layout.in_tokens else "cost"):
        return planned_slots(source, chunks, positions)
    # Whole groups of positions are ordered together.
    groups = [balance_group(plane, size) for size in sizes]
    around = [
        slice(own.start // group * group, -(-own.stop // group) * group)
        for own, group in zip(positions, groups, strict=True)
    ]
    planned = planned_slots(source, chunks, around)
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
    return slots_of_steps(source, [ChunkSteps(order, plan.first_step, data_steps)], BatchSlice(), documents).together


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


def training_steps_of(source: Source, plan: ChunkPlan, first_step: int) -> range:
    """Return the training steps that `plan` serves, without those before `first_step`."""
    version = source.stream_version
    first_of_plan = version.step_at(plan.first_step)
    return range(max(first_step, first_of_plan), version.step_at(plan.first_step + plan.num_steps))


def is_last_chunk(source: Source, plan: ChunkPlan) -> bool:
    """Return True if nothing is read, nor compared, after a plan."""
    return plan.last or source.config.training.num_steps - 1 in training_steps_of(source, plan, 0)
