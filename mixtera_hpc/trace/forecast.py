"""Forecast what a mixture will serve over a whole run, without expanding a step.

Price: O(domains) per exhausted domain, per change of weights, of which at most `MAX_SAMPLED_CHUNKS` are considered, and
per two million sequences, of which a forecast has at most `MAX_SEQUENCES`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.core.planner import Planner
from mixtera_hpc.core.slots.batch_schedule import BatchSchedule
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.trace.footprint import StepFootprint, step_footprint

__all__ = ["MixtureDomainForecast", "MixtureForecast", "forecast_mixture", "longest_forecast", "sampled_chunks"]

MAX_SEQUENCES = 1 << 35
"""Sequences of the longest forecast of data that does not end; it takes some seconds."""
NO_LIMIT = 1 << 62

MAX_SAMPLED_CHUNKS = 4096
"""Chunks at which the weights of a schedule are computed. A longer run is taken to have the weights of the middle of
each interval between them."""

NEVER = -1
"""Stands for the step of a domain that does not run out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureDomainForecast:
    """One domain over the whole run."""

    name: str
    weight: float
    """Initial weight."""
    items: int
    """Tokens (special tokens included) or samples of one epoch."""
    served: int
    """Items served."""
    epochs: float
    """Passes over the domain."""
    runs_out_at_step: int | None
    """The step in which the last epoch of the domain ends, or, without a limit, its first epoch; None if that is after
    the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureForecast:
    """Forecast of what a mixture serves over the whole run."""

    unit: str
    """`tokens` or `samples`."""
    steps_asked: int
    num_steps: int
    """Fewer than `steps_asked` if the data ends earlier."""
    left_over: int
    """Sequences at the end of the data that do not fill a global batch; 0 if the data does not end."""
    bytes_per_step: float
    """Bytes read from disk by all ranks together, for the documents that are used."""
    step: StepFootprint
    """Mean number of documents, blocks and shards that a step reads."""
    domains: list[MixtureDomainForecast]


def forecast_mixture(source: Source, num_steps: int) -> MixtureForecast:
    """Forecast `num_steps` steps of a new run.

    Consecutive chunks with the same weights are planned as one. The sequences served until the end of the last chunk do
    not depend on the bounds between them.

    Raises:
        ConfigError: these are more steps than `longest_forecast`.
    """
    if num_steps > (limit := longest_forecast(source)):
        raise ConfigError(
            f"A forecast of {num_steps} steps is too long: at most {limit} steps of this batch are forecast.\n"
            f"  Set plan.steps={limit}, or less."
        )
    state, segments = _plan_segments(source, num_steps)
    items = source.layout.epoch_items()
    weights = source.weights
    # The sum is below 1 after drops: the other domains take the share of an empty domain.
    total_weight = weights.sum() or 1.0

    schedule = source.planner.batch_schedule
    run_out = _run_out_steps(segments, _available_sequences(source), schedule)
    # An empty domain with weight 0 does not run out.
    run_out[(weights == 0) & (run_out == 0)] = NEVER

    served = state.cursors * source.grid.stride
    return MixtureForecast(
        unit=source.config.mixture.unit,
        steps_asked=num_steps,
        num_steps=state.step,
        left_over=_unserved_sequences(segments, state, schedule),
        bytes_per_step=float(_bytes_per_item(source) @ served) / max(state.step, 1),
        step=step_footprint(source, served / max(state.step, 1)),
        domains=[
            MixtureDomainForecast(
                name=name,
                weight=float(weights[d] / total_weight),
                items=int(items[d]),
                served=int(served[d]),
                epochs=float(served[d] / items[d]) if items[d] else 0.0,
                runs_out_at_step=None if run_out[d] == NEVER else int(run_out[d]),
            )
            for d, name in enumerate(source.names)
        ],
    )


@dataclass(frozen=True, slots=True)
class _ConstantRateSegment:
    """Consecutive slots in which every domain is served at a constant rate."""

    first_slot: int
    before: NDArray[np.int64]
    """Sequences of each domain served before the segment; shape (K,)."""
    counts: NDArray[np.int64]
    """Sequences of each domain served in the segment; shape (K,)."""


def _plan_segments(source: Source, num_steps: int) -> tuple[PlannerState, list[_ConstantRateSegment]]:
    """Return the state after `num_steps`, or where the data ends, and the segments up to there."""
    state = PlannerState.start(source.num_domains)
    schedule = source.planner.batch_schedule
    segments = []
    for weights, length in _constant_weights(source, num_steps):
        planner = replace(source.planner, chunk_steps=length)
        plan, after = planner.plan(state, weights)
        if plan.last:
            # The data ends inside a step that is not served any more. Plan single slots, to find in which slot.
            num_slots = schedule.slots(state.step, state.step + length)
            planner = replace(planner, batch_schedule=BatchSchedule.constant(1), chunk_steps=num_slots)
            plan = planner.decide(state, weights)
        slot = schedule.sequences_before(state.step)
        before = state.cursors
        for counts in planner.segment_counts(plan):
            segments.append(_ConstantRateSegment(slot, before, counts))
            slot += int(counts.sum())
            before = before + counts
        state = after
        if plan.last:
            break
    return state, segments


def _unserved_sequences(segments: list[_ConstantRateSegment], state: PlannerState, schedule: BatchSchedule) -> int:
    """Return the sequences after the last full step, served with padding or not at all."""
    num_sequences = sum(int(segment.counts.sum()) for segment in segments)
    return schedule.locate(num_sequences)[1] if num_sequences != schedule.sequences_before(state.step) else 0


def _available_sequences(source: Source) -> NDArray[np.float64]:
    """Return the sequences of every domain: of all its epochs, or of one epoch without a limit; shape (K,)."""
    capacity = source.planner.capacity
    return np.where(capacity < Planner.UNLIMITED, capacity, source.layout.epoch_items() / source.grid.stride)


def _constant_weights(source: Source, num_steps: int) -> Iterator[tuple[NDArray[np.float64], int]]:
    """Yield weights, and the number of steps for which they stay the same."""
    if source.config.mixture.kind != "schedule":
        yield source.weights, num_steps
        return
    mixer = source.mixer(learn=False)
    chunk_steps = source.planner.chunk_steps
    current = source.weights
    length = 0
    num_chunks = -(-num_steps // chunk_steps)  # Division that rounds up.
    stride = sampled_chunks(source, num_steps)
    for first in range(0, num_chunks, stride):
        weights = mixer.weights_of(min(first + stride // 2, num_chunks - 1))
        if weights is not None and not np.array_equal(source.without_dropped_domains(weights), current):
            if length:
                yield current, length
            current = source.without_dropped_domains(weights)
            length = 0
        length += min(stride * chunk_steps, num_steps - first * chunk_steps)
    yield current, length


def longest_forecast(source: Source) -> int:
    """Return the largest number of steps that `forecast_mixture` takes."""
    num_available = source.planner.capacity.sum(dtype=np.float64)
    # Data that ends before is forecast to its end, however many steps are asked for.
    return NO_LIMIT if num_available <= MAX_SEQUENCES else source.planner.batch_schedule.locate(MAX_SEQUENCES)[0]


def sampled_chunks(source: Source, num_steps: int) -> int:
    """Return the number of chunks that a forecast of a schedule takes to have the same weights; 1 for short runs."""
    if source.config.mixture.kind != "schedule":
        return 1
    return max(1, -(-num_steps // (source.planner.chunk_steps * MAX_SAMPLED_CHUNKS)))


def _run_out_steps(
    segments: list[_ConstantRateSegment], available: NDArray[np.float64], schedule: BatchSchedule
) -> NDArray[np.int64]:
    """Return the step in which each domain is served its last sequence, `NEVER` if it does not run out; shape (K,)."""
    steps = np.where(available > 0, NEVER, 0)
    for segment in segments:
        remaining = available - segment.before
        run_out = np.flatnonzero((remaining > 0) & (remaining <= segment.counts))
        # A domain is served at a constant rate, so its last sequence lies at this share of the slots of the segment.
        share = remaining[run_out] / segment.counts[run_out]
        slots = np.ceil(share * int(segment.counts.sum())).astype(np.int64)
        steps[run_out] = [schedule.locate(segment.first_slot + slot - 1)[0] for slot in slots.tolist()]
    return steps


def _bytes_per_item(source: Source) -> NDArray[np.float64]:
    """Return the mean bytes on disk per item of each domain, from the blocks that it lies in; shape (K,)."""
    # Blocks know their bytes and rows only; a domain that has some rows of a block gets their share of its bytes.
    table = source.layout.table
    blocks = source.blocks
    bytes_per_row = blocks.length[table.block] / np.maximum(blocks.rows[table.block], 1)
    domain = np.repeat(np.arange(source.num_domains), np.diff(table.indptr))
    total_bytes = np.bincount(domain, bytes_per_row * table.rows, minlength=source.num_domains)
    return total_bytes / np.maximum(source.layout.epoch_items(), 1)
