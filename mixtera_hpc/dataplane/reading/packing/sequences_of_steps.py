"""The content of the steps of one rank: the sequences of its part of each batch, and their micro-batches."""

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.packing.check_packing import COST_OF_TRANSFORM
from mixtera_hpc.core.chunk_plan import ChunkPlan
from mixtera_hpc.core.packing.micro_batches import fill_micro_batches
from mixtera_hpc.core.packing.sequences_ahead import SequencesAhead
from mixtera_hpc.core.slots.chunk_order import ChunkOrder
from mixtera_hpc.core.slots.step_slots import StepSlots
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.packing.balanced_positions import slot_costs
from mixtera_hpc.dataplane.reading.packing.sequence_documents import SequenceDocuments
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.step_sequences import ChunkSteps, StepContent, slots_of_steps

__all__ = ["PlannedSteps", "SequencesOfSteps"]

Ints = NDArray[np.int64]


class PlannedSteps(NamedTuple):
    """Some training steps of a plan."""

    plan: ChunkPlan
    steps: range


class SequencesOfSteps:
    """Computes the content of steps. Not thread-safe: one per reading thread."""

    def __init__(self, source: Source, batch_slice: BatchSlice, documents: SequenceDocuments) -> None:
        """Compute nothing yet.

        Args:
            source: the data.
            batch_slice: the part of every global batch that belongs to the rank.
            documents: looks up documents, for `dataplane.balance` and costs.
        """
        self._source = source
        self._slice = batch_slice
        self._documents = documents
        self._sequences = SequencesAhead(source.lanes)
        self._order: tuple[ChunkPlan, ChunkOrder] | None = None
        """The order of the plan that was used last."""

    def of(self, planned: Sequence[PlannedSteps]) -> list[StepContent]:
        """Return the contents of some steps of one plan, or of plans that follow each other."""
        version = self._source.stream_version
        chunks = [
            ChunkSteps(self._order_of(plan), plan.first_step, [version.data_step(step) for step in steps])
            for plan, steps in planned
        ]
        schedule = self._source.planner.batch_schedule
        sizes = [schedule.size_at(data_step) for chunk in chunks for data_step in chunk.steps]
        plane = self._source.config.dataplane
        if plane.sample_budget is None or plane.sample_cost == COST_OF_TRANSFORM:
            slots = slots_of_steps(self._source, chunks, self._slice, self._documents)
            micro_batches: list[tuple[slice, ...]] = [()] * len(sizes)
            if plane.sample_budget is not None:
                # Whole batches, until the function has given the costs.
                micro_batches = [(slice(0, self._slice.size_of(size)),) for size in sizes]
        else:
            # The number of micro-batches is that of the rank that needs most.
            whole = slots_of_steps(self._source, chunks, BatchSlice(), self._documents)
            costs = slot_costs(self._source, self._documents, whole.steps())
            micro_batches = [
                self._rows_of_micro_batches(of_step, size) for of_step, size in zip(costs, sizes, strict=True)
            ]
            own = [self._slice.positions(size) for size in sizes]
            slots = StepSlots.of_steps([step.select(rows) for step, rows in zip(whole.steps(), own, strict=True)])
        domain = slots.together.domain.astype(np.int64)
        number = self._sequences.sequences(slots.together)
        every_step = chain.from_iterable(steps for _, steps in planned)
        return [
            _content_of(step, self._slice.size_of(size), domain[begin:end], number[begin:end], rows)
            for step, size, (begin, end), rows in zip(
                every_step, sizes, pairwise(slots.borders), micro_batches, strict=True
            )
        ]

    def _order_of(self, plan: ChunkPlan) -> ChunkOrder:
        # Workers ask for several step ranges of one plan.
        if self._order is None or self._order[0] is not plan:
            self._order = plan, self._source.planner.order(plan)
        return self._order[1]

    def _rows_of_micro_batches(self, costs: NDArray[np.float64], batch_size: int) -> tuple[slice, ...]:
        """Return the rows of the micro-batches of this rank, given the costs of all samples of a step."""
        padded = np.zeros(batch_size)
        padded[: len(costs)] = costs
        own = self._slice.positions(batch_size)
        budget = self._source.config.dataplane.sample_budget or 0.0
        return fill_micro_batches(padded, self._slice.size_of(batch_size), own.start, budget)


def _content_of(step: int, size: int, domain: Ints, number: Ints, micro_batches: tuple[slice, ...]) -> StepContent:
    """Return the content of a step; the last step of the data may have fewer sequences than `size`."""
    if len(domain) == size:
        return StepContent(step, size, domain, number, micro_batches)
    domain_ids = np.full(size, -1, np.int64)
    sequence = np.full(size, -1, np.int64)
    domain_ids[: len(domain)] = domain
    sequence[: len(domain)] = number
    return StepContent(step, len(domain), domain_ids, sequence, micro_batches)
