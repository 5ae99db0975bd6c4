"""The order of the sequences inside a step with `dataplane.balance`: equal cost for all ranks.

The positions of a batch are ordered in fixed groups, so every rank computes the order of the groups that it has a part
of, from the lengths of their documents alone, and the content of a position does not depend on the number of ranks.
Price per rank: the documents of its whole groups are looked up in the index, not only those of its own sequences.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.packing.balance import attention_costs, balanced_order
from mixtera_hpc.core.slots.segment_order import Slots
from mixtera_hpc.core.slots.step_slots import StepSlots
from mixtera_hpc.dataplane.reading.packing.sequence_documents import SequenceDocuments
from mixtera_hpc.dataplane.reading.source import Source

__all__ = ["balance_slots", "slot_costs"]

Ints = NDArray[np.int64]

UNITS_PER_COST = 1024


def balance_slots(
    source: Source, documents: SequenceDocuments, group_sizes: Sequence[int], steps: Sequence[Slots]
) -> list[Slots]:
    """Return the sequences of each step in balanced order.

    Args:
        source: the data.
        documents: looks up documents.
        group_sizes: positions of each step that are ordered together.
        steps: sequences in the order of the plan, whole groups. A group with fewer sequences, at the end of the data,
            keeps its order.
    """
    costs = slot_costs(source, documents, steps)
    balanced = []
    for slots, of_step, group_size in zip(steps, costs, group_sizes, strict=True):
        whole = len(of_step) // group_size * group_size
        chosen = np.arange(len(of_step))
        if whole:
            first = np.arange(0, whole, group_size)[:, None]
            # Costs of samples are balanced as integers, so that every machine computes the same order.
            units = of_step if of_step.dtype == np.int64 else np.rint(of_step * UNITS_PER_COST).astype(np.int64)
            chosen[:whole] = (balanced_order(units[:whole].reshape(-1, group_size)) + first).reshape(-1)
        balanced.append(slots.select(chosen))
    return balanced


def slot_costs(source: Source, documents: SequenceDocuments, steps: Sequence[Slots]) -> list[NDArray[Any]]:
    """Return the cost of every sequence of each step, or of every sample.

    The attention cost of a sequence is the sum of the squares of its document lengths, an integer; the cost of a sample
    is its `dataplane.sample_cost`, a float.
    """
    slots = StepSlots.of_steps(steps)
    domain = slots.together.domain
    number = source.lanes.sequences(slots.together)
    order = np.lexsort((number, domain))
    parts = documents.documents(domain[order], number[order])

    if source.layout.in_tokens:
        # Every sequence has the same number of tokens, so the position of a part tells its sequence.
        lengths = parts.last - parts.first
        sequence = (np.cumsum(lengths) - lengths) // source.grid.length
        sorted_costs: NDArray[Any] = attention_costs(lengths, sequence, len(order))
    else:
        sorted_costs = documents.sample_costs(parts)
    costs = np.empty_like(sorted_costs)
    costs[order] = sorted_costs
    return np.split(costs, slots.borders[1:-1])
