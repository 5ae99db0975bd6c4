"""Find every step, rank and position at which a document was served, from its shard and row.

Positions are exact, so nothing has to be searched: in every epoch that a run has reached, the block of the document has
one place in the block order of its domain, and the document has one place in its window. Price per epoch: one O(blocks)
permutation and the sample columns of one window. Price per sequence: one expanded chunk. The length of the run does not
matter.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mixtera_hpc.core.planner import ChunkPlan
from mixtera_hpc.core.slots.segment_order import Slots
from mixtera_hpc.dataplane.journal import AttemptRecord, History
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.errors import DataError, did_you_mean
from mixtera_hpc.trace.attempt_sources import AttemptSources, Record
from mixtera_hpc.trace.rank_filter import check_rank, is_served_to

__all__ = ["locate_row"]


def locate_row(
    sources: AttemptSources, history: History, shard: str, row: int, rank: int | None = None
) -> Iterator[Record]:
    """Yield every service of a row by the attempts that count, in order of attempts and epochs.

    A record has `step`, `position`, `rank`, `attempt`, `domain_id`, `epoch` and `items`: the items [start, end) of the
    row. If an attempt was killed, what it had planned counts too: up to two chunks more than it consumed.

    Args:
        rank: only what was served to this rank or its model-parallel group.

    Raises:
        DataError: the index has no such shard or row.
        ConfigError: the run has no such rank.
    """
    extents = history.extents()
    check_rank(rank, [attempt for attempt, _ in extents])
    for attempt, steps in extents:
        source = sources.of(attempt)
        place = _find_place(source, shard, row)
        for record in _services(source, attempt, place) if place else ():
            if record["step"] in steps and is_served_to(rank, attempt, record):
                yield record


@dataclass(frozen=True, slots=True)
class _RowPlace:
    """Where a row lies in the index."""

    domain: int
    block: int
    row: int
    """Inside the block."""


def _find_place(source: Source, shard: str, row: int) -> _RowPlace | None:
    """Return where a row lies; None if it belongs to no domain or was dropped."""
    paths = source.index.shard_paths
    blocks = source.blocks
    if shard not in paths:
        raise DataError(f"The index has no shard {shard!r}.{did_you_mean(shard, paths)}")

    # Of the blocks of the shard, the one whose rows include the row.
    of_shard = np.flatnonzero(blocks.shard == paths.index(shard))
    first_row = blocks.first_row[of_shard]
    holding = of_shard[(first_row <= row) & (row < first_row + blocks.rows[of_shard])]
    if not len(holding):
        raise DataError(f"{shard} has rows 0 to {int(blocks.rows[of_shard].sum()) - 1} in the index, not row {row}.")

    columns = source.make_block_reader()(holding.astype(np.int32))
    row_in_block = row - int(blocks.first_row[holding[0]])
    domain = int(source.domain_of(columns)[row_in_block])
    if domain < 0 or not source.is_not_dropped(columns)[row_in_block]:
        return None
    return _RowPlace(domain, int(holding[0]), row_in_block)


def _services(source: Source, attempt: AttemptRecord, place: _RowPlace) -> Iterator[Record]:
    """Yield the services of a row in every epoch that the plans of the attempt reach."""
    if not attempt.plans:
        return
    domain = place.domain
    expanded = _ExpandedPlans(source, attempt)
    first = int(attempt.plans[0].cursors[domain])
    end = int(source.planner.after(attempt.plans[-1]).cursors[domain])
    epoch_items = int(source.layout.epoch_items()[domain])
    if end == first or not epoch_items:
        return

    # Items of the stream that the attempt planned, and with them the epochs that it touched.
    first_item, end_item = source.span(domain, first, end - first)
    for epoch in range(first_item // epoch_items, (end_item - 1) // epoch_items + 1):
        start, stop = _stream_items(source, place, epoch)
        for ordinal in _overlapping_sequences(source, domain, start, stop, range(first, end)):
            sequence = source.span(domain, ordinal, 1)
            served = expanded.step_and_position(domain, ordinal)
            if served is None or sequence[0] >= stop or start >= sequence[1]:
                continue
            step, position = served
            yield {
                "step": step,
                "position": position,
                "rank": attempt.rank_of(position),
                "attempt": attempt.number,
                "domain_id": domain,
                "epoch": epoch,
                "items": [max(sequence[0], start) - start, min(sequence[1], stop) - start],
            }


def _overlapping_sequences(source: Source, domain: int, start: int, stop: int, planned: range) -> range:
    """Return the sequences of a domain that may overlap items [start, stop) of its stream, among those planned.

    Sequence k covers [origin + k · stride, origin + k · stride + length); solved for k on both sides.
    """
    grid = source.grid
    origin = int(source.stream_version.origins[domain])
    low = (start - origin - grid.length) // grid.stride + 1
    high = -((origin - stop) // grid.stride)  # Division that rounds up.
    return range(max(low, planned.start), min(high, planned.stop))


def _stream_items(source: Source, place: _RowPlace, epoch: int) -> tuple[int, int]:
    """Return the items [start, stop) of the stream of its domain that a document covers in `epoch`."""
    layout = source.layout
    domain = place.domain
    order = layout.order.epoch(domain, epoch, layout.sizes(domain))

    # The window that the shuffled order puts the block into, and where that window begins in the stream.
    block_number = int(np.searchsorted(layout.table.block[layout.entries(domain)], place.block))
    window = int(np.flatnonzero(order.block_order == block_number)[0]) // order.window_blocks
    window_start = epoch * int(layout.epoch_items()[domain]) + int(order.starts[window])
    window_items = int(order.starts[window + 1] - order.starts[window])
    if not window_items:
        return window_start, window_start

    documents = source.streams().documents(domain, window_start, window_start + window_items)
    matches = np.flatnonzero((documents.block == place.block) & (documents.row == place.row))
    if not len(matches):  # A document without items.
        return window_start, window_start
    number = int(matches[0])
    start = window_start + int((documents.last - documents.first)[:number].sum())
    return start, start + int(documents.size[number])


class _ExpandedPlans:
    """The plans of an attempt, expanded on demand."""

    def __init__(self, source: Source, attempt: AttemptRecord) -> None:
        self._source = source
        self._plans = attempt.plans
        self._slots: dict[int, Slots] = {}

    def step_and_position(self, domain: int, ordinal: int) -> tuple[int, int] | None:
        """Return where a sequence was served; None if its data step was skipped."""
        # Plan i serves the ordinals from its cursor up to the cursor of plan i + 1.
        first_ordinals = np.array([int(plan.cursors[domain]) for plan in self._plans])
        number = int(np.searchsorted(first_ordinals, ordinal, side="right")) - 1
        slots = self._expand(number)
        [slot] = np.flatnonzero((slots.domain == domain) & (slots.ordinal == ordinal))
        return self._step_of_slot(self._plans[number], int(slot))

    def _step_of_slot(self, plan: ChunkPlan, slot: int) -> tuple[int, int] | None:
        steps_in_plan, position = divmod(slot, self._source.planner.global_batch_size)
        data_step = plan.first_step + steps_in_plan
        version = self._source.stream_version
        return None if version.is_skipped(data_step) else (version.step_at(data_step), position)

    def _expand(self, number: int) -> Slots:
        if number not in self._slots:
            self._slots[number] = self._source.planner.slots(self._plans[number])
        return self._slots[number]
