"""What a mixture will serve over a whole run, without expanding a single step: O(domains) per exhausted domain."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.planner import Planner, PlannerState
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.trace.footprint import StepFootprint, step_footprint

__all__ = ["MixtureDomainForecast", "MixtureForecast", "forecast_mixture"]

NEVER = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureDomainForecast:
    """One domain over the whole run."""

    name: str
    weight: float
    items: int
    """Tokens (special tokens included) or samples of one epoch."""
    served: int
    """Items served."""
    epochs: float
    runs_out_at_step: int | None
    """The step in which its last epoch ends, or, where nothing limits them, its first; None when that is beyond the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureForecast:
    """The whole run."""

    unit: str
    steps_asked: int
    num_steps: int
    """Fewer than asked when the data ends before."""
    bytes_per_step: float
    """Read from disk by all ranks together, for the documents that are used."""
    step: StepFootprint
    """What a step touches, on average."""
    domains: list[MixtureDomainForecast]


def forecast_mixture(source: Source, num_steps: int) -> MixtureForecast:
    """Plan `num_steps` steps. Chunks that follow each other with the same weights are planned as one: what is served by
    their end does not depend on what happens inside."""
    state, stretches = _planned(source, num_steps)
    items, weights = source.layout.epoch_items(), source.weights
    out = _run_out(stretches, _sequences(source), source.planner.global_batch_size)
    out[(weights == 0) & (out == 0)] = NEVER  # Nothing is there, and nothing is wished for.
    served = state.cursors * source.grid.stride
    return MixtureForecast(
        unit=source.config.mixture.unit,
        steps_asked=num_steps,
        num_steps=state.step,
        bytes_per_step=float(_bytes_per_item(source) @ served) / max(state.step, 1),
        step=step_footprint(source, served / max(state.step, 1)),
        domains=[
            MixtureDomainForecast(
                name=name,
                weight=float(weights[d]),
                items=int(items[d]),
                served=int(served[d]),
                epochs=float(served[d] / items[d]) if items[d] else 0.0,
                runs_out_at_step=None if out[d] == NEVER else int(out[d]),
            )
            for d, name in enumerate(source.names)
        ],
    )


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Slots in which every domain is served at a constant rate."""

    first_slot: int
    before: NDArray[np.int64]
    """Sequences served of each domain; shape (K,)."""
    counts: NDArray[np.int64]
    """Sequences in this stretch."""


def _planned(source: Source, num_steps: int) -> tuple[PlannerState, list[_Stretch]]:
    """The state after `num_steps`, or where the data ends, and how it came to that."""
    state, found, size = PlannerState.start(source.num_domains), [], source.planner.global_batch_size
    for weights, length in _weights(source, num_steps):
        planner = replace(source.planner, chunk_steps=length)
        plan, after = planner.plan(state, weights)
        if plan.last:  # Slot by slot, for what ends the data does so inside a step that is not served any more.
            planner = replace(planner, global_batch_size=1, chunk_steps=length * size)
            plan = planner.decide(state, weights)
        slot, before = state.step * size, state.cursors
        for counts in planner.segment_counts(plan):
            found.append(_Stretch(slot, before, counts))
            slot, before = slot + int(counts.sum()), before + counts
        state = after
        if plan.last:
            break
    return state, found


def _sequences(source: Source) -> NDArray[np.float64]:
    """Sequences that every domain has: of all its epochs, or of one where nothing limits them; shape (K,)."""
    capacity = source.planner.capacity
    return np.where(capacity < Planner.UNLIMITED, capacity, source.layout.epoch_items() / source.grid.stride)


def _weights(source: Source, num_steps: int) -> Iterator[tuple[NDArray[np.float64], int]]:
    """Weights, and for how many steps they stay."""
    mixer, chunk_steps = source.mixer(learn=False), source.planner.chunk_steps
    if source.config.mixture.kind != "schedule":
        yield source.weights, num_steps
        return
    now, length = source.weights, 0
    for chunk in range(-(-num_steps // chunk_steps)):
        weights = mixer.weights_of(chunk)
        if weights is not None and not np.array_equal(weights, now):
            yield now, length
            now, length = weights, 0
        length += min(chunk_steps, num_steps - chunk * chunk_steps)
    yield now, length


def _run_out(stretches: list[_Stretch], has: NDArray[np.float64], batch_size: int) -> NDArray[np.int64]:
    """The step in which each domain is served the last of the sequences it has, `NEVER` where it is not; shape (K,)."""
    steps = np.where(has > 0, NEVER, 0)
    for stretch in stretches:
        missing = has - stretch.before
        gone = np.flatnonzero((missing > 0) & (missing <= stretch.counts))
        slots = np.ceil(missing[gone] / stretch.counts[gone] * int(stretch.counts.sum())).astype(np.int64)
        steps[gone] = (stretch.first_slot + slots - 1) // batch_size
    return steps


def _bytes_per_item(source: Source) -> NDArray[np.float64]:
    """Mean bytes on disk of an item of each domain, from the blocks it lies in; shape (K,)."""
    table, blocks = source.layout.table, source.blocks
    per_row = blocks.length[table.block] / np.maximum(blocks.rows[table.block], 1)
    domain = np.repeat(np.arange(source.num_domains), np.diff(table.indptr))
    total = np.bincount(domain, per_row * table.rows, minlength=source.num_domains)
    return total / np.maximum(source.layout.epoch_items(), 1)
