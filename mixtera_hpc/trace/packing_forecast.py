"""Forecast what packing and balancing do: documents that sequences cut, and the cost of ranks next to their mean.

Both are exact for a sample: the first group of sequences of the heaviest domains, and the first steps of a run. Price:
the sample columns of the windows that these sequences lie in; no data is read.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.packing.check_packing import balance_group
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.core.packing.balance import balanced_order, max_over_mean
from mixtera_hpc.core.packing.best_fit import Fragments, concatenate, count_cut, pack_best_fit
from mixtera_hpc.dataplane.reading.packing.balanced_positions import slot_costs
from mixtera_hpc.dataplane.reading.packing.sequence_documents import SequenceDocuments
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.step_sequences import ChunkSteps, planned_slots

__all__ = ["BalanceForecast", "PackingForecast", "forecast_balance", "forecast_packing"]

MAX_DOMAINS = 16
MAX_SEQUENCES = 2048
"""Sequences whose documents are looked up, at least one step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingForecast:
    """Documents that are cut, of those that begin in the sample."""

    concat: float
    """Share that does not lie in one sequence as a whole with `dataplane.pack=concat`."""
    best_fit: float
    """The same share with `dataplane.pack=best_fit`."""
    documents_per_sequence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceForecast:
    """The attention cost of the costliest data-parallel rank of a step, divided by the mean; the mean over steps."""

    num_ranks: int
    planned: float
    """In the order of the plan, `dataplane.balance=none`."""
    balanced: float
    """With `dataplane.balance=attention`."""


def forecast_packing(source: Source) -> PackingForecast | None:
    """Count the documents that both ways of packing cut; None for samples, and where no domain has two sequences."""
    if not source.layout.in_tokens:
        return None
    documents = SequenceDocuments(source, source.streams())
    weights = source.weights
    heaviest = np.argsort(-weights, kind="stable")[:MAX_DOMAINS].tolist()
    shares = np.zeros(4)
    for domain in heaviest:
        shares += weights[domain] * _counts_per_sequence(source, documents, domain)
    cut_concat, cut_best_fit, num_documents, weight = shares.tolist()
    if not num_documents:
        return None
    return PackingForecast(
        concat=cut_concat / num_documents,
        best_fit=cut_best_fit / num_documents,
        documents_per_sequence=num_documents / weight,
    )


def forecast_balance(source: Source, num_ranks: int) -> BalanceForecast | None:
    """Compute the cost of each rank in the first steps; None for samples, one rank, or no whole group of positions."""
    plane = source.config.dataplane
    plan, _ = source.planner.plan(PlannerState.start(source.num_domains), source.weights)
    schedule = source.planner.batch_schedule
    size = schedule.size_at(plan.first_step)
    group = balance_group(plane, size)
    if not source.layout.in_tokens or num_ranks < 2 or size % num_ranks or group < 2:
        return None
    last = plan.first_step + min(plan.num_steps, max(MAX_SEQUENCES // size, 1))
    # A batch ramp may change the size of later steps.
    data_steps = [step for step in range(plan.first_step, last) if schedule.size_at(step) == size]
    chunk = ChunkSteps(source.planner.order(plan), plan.first_step, data_steps)
    slots = planned_slots(source, [chunk], [slice(0, size)] * len(data_steps))
    steps = [of_step for of_step in slots.steps() if len(of_step.domain) == size]
    if not steps:
        return None
    costs = np.stack(slot_costs(source, SequenceDocuments(source, source.streams()), steps))
    grouped = costs.reshape(-1, group)
    balanced = np.take_along_axis(grouped, balanced_order(grouped), axis=1).reshape(costs.shape)
    return BalanceForecast(
        num_ranks=num_ranks,
        planned=max_over_mean(costs, num_ranks),
        balanced=max_over_mean(balanced, num_ranks),
    )


def _counts_per_sequence(source: Source, documents: SequenceDocuments, domain: int) -> NDArray[np.float64]:
    """Return, per sequence of the first group of a domain: documents cut by both packings, documents, and 1.

    All are 0 for a domain with fewer than two sequences.
    """
    if not source.layout.epoch_items()[domain]:
        return np.zeros(4)
    grid = source.grid
    first, num_whole = (int(value[0]) for value in source.lanes.whole_sequences(domain, np.zeros(1, np.int64)))
    count = min(num_whole, source.config.dataplane.pack_group)
    if count < 2:
        return np.zeros(4)
    parts = documents.in_stream_order(domain, first, count)
    lengths = parts.last - parts.first
    begins = parts.first == 0

    def num_cut(fragments: Fragments) -> int:
        is_cut = count_cut(fragments, len(lengths), grid.stride, grid.length)
        return int(((is_cut | (parts.last < parts.size)) & begins).sum())

    packed = pack_best_fit(lengths, grid.stride, grid.length - grid.stride)
    counts = [num_cut(concatenate(lengths)), num_cut(packed), int(begins.sum())]
    return np.array([*counts, count], np.float64) / count
