"""When was this document seen? From a shard's row to every step, rank and position that it was served at.

Positions are exact, so nothing is searched for: in every epoch a run has reached, the document's block has one place among the
domain's blocks, and the document one in its window. Price, per epoch: one O(blocks) permutation and the sample columns of one
window; per sequence found: one chunk expanded. The length of the run does not matter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixtera_hpc.core.planner import ChunkPlan, Slots
from mixtera_hpc.dataplane.journal import AttemptRecord, History
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.errors import DataError, did_you_mean
from mixtera_hpc.trace.list import AttemptSources

__all__ = ["locate_row"]

Record = dict[str, Any]


def locate_row(sources: AttemptSources, history: History, shard: str, row: int) -> Iterator[Record]:
    """Every time that a row was served, by the attempts that count, in order of attempts and epochs.

    Of an attempt that has not closed in order, what it has planned counts too: up to two chunks more than it consumed.

    Each has `step`, `position`, `rank`, `attempt`, `domain_id`, `epoch` and `piece`: the items [start, end) of the row.

    Raises:
        DataError: the index has no such shard or row.
    """
    for attempt, steps in history.extents():
        source = sources.of(attempt)
        place = _place(source, shard, row)
        for occurrence in _occurrences(source, attempt, place) if place else ():
            if occurrence["step"] in steps:
                yield occurrence


@dataclass(frozen=True, slots=True)
class _Place:
    domain: int
    block: int
    row: int
    """Inside the block."""


def _place(source: Source, shard: str, row: int) -> _Place | None:
    """Where a row lies; None when it belongs to no domain, or is left out."""
    paths, blocks = source.facts.shard_paths, source.blocks
    if shard not in paths:
        raise DataError(f"The index has no shard {shard!r}.{did_you_mean(shard, paths)}")
    of_shard = np.flatnonzero(blocks.shard == paths.index(shard))
    inside = of_shard[(blocks.first_row[of_shard] <= row) & (row < blocks.first_row[of_shard] + blocks.rows[of_shard])]
    if not len(inside):
        raise DataError(f"{shard} has rows 0 to {int(blocks.rows[of_shard].sum()) - 1} in the index, not row {row}.")
    columns = source.make_block_reader()(inside.astype(np.int32))
    at = row - int(blocks.first_row[inside[0]])
    domain = int(source.domain_of(columns)[at])
    return _Place(domain, int(inside[0]), at) if domain >= 0 and source.is_not_dropped(columns)[at] else None


def _occurrences(source: Source, attempt: AttemptRecord, place: _Place) -> Iterator[Record]:
    """In every epoch that the attempt's plans reach."""
    if not attempt.plans:
        return
    d, expanded = place.domain, _Expanded(source, attempt)
    begin, end = int(attempt.plans[0].cursors[d]), int(source.planner.after(attempt.plans[-1]).cursors[d])
    items, grid, origin = int(source.layout.epoch_items()[d]), source.grid, int(source.stream_version.origins[d])
    if end == begin or not items:
        return
    first_item, last_item = source.span(d, begin, end - begin)
    for epoch in range(first_item // items, (last_item - 1) // items + 1):
        start, stop = _items(source, place, epoch)
        low = max((start - origin - grid.length) // grid.stride + 1, begin)
        high = min(-((origin - stop) // grid.stride), end)
        for ordinal in range(low, high):
            sequence = source.span(d, ordinal, 1)
            if (found := expanded.step_and_position(d, ordinal)) and sequence[0] < stop and start < sequence[1]:
                step, position = found
                yield {
                    "step": step,
                    "position": position,
                    "rank": attempt.rank_of(position),
                    "attempt": attempt.number,
                    "domain_id": d,
                    "epoch": epoch,
                    "piece": [max(sequence[0], start) - start, min(sequence[1], stop) - start],
                }


def _items(source: Source, place: _Place, epoch: int) -> tuple[int, int]:
    """The items [start, stop) of its domain's stream that a document is, in `epoch`."""
    layout, d = source.layout, place.domain
    order = layout.order.epoch(d, epoch, layout.sizes(d))
    number = int(np.searchsorted(layout.table.block[layout.entries(d)], place.block))
    window = int(np.flatnonzero(order.block_order == number)[0]) // order.window_blocks
    begin = epoch * int(layout.epoch_items()[d]) + int(order.starts[window])
    if order.starts[window] == order.starts[window + 1]:
        return begin, begin
    documents = source.streams().documents(d, begin, begin + int(order.starts[window + 1] - order.starts[window]))
    at = np.flatnonzero((documents.block == place.block) & (documents.row == place.row))
    if not len(at):  # A document of no items.
        return begin, begin
    start = begin + int((documents.last - documents.first)[: at[0]].sum())
    return start, start + int(documents.size[at[0]])


class _Expanded:
    """The plans of an attempt, expanded when they are asked for."""

    def __init__(self, source: Source, attempt: AttemptRecord) -> None:
        self._source = source
        self._plans = attempt.plans
        self._slots: dict[int, Slots] = {}

    def step_and_position(self, domain: int, ordinal: int) -> tuple[int, int] | None:
        """Where a sequence was served; None when its data step was skipped."""
        before = np.array([int(plan.cursors[domain]) for plan in self._plans])
        number = int(np.searchsorted(before, ordinal, side="right")) - 1
        plan, slots = self._plans[number], self._of(number)
        [slot] = np.flatnonzero((slots.domain == domain) & (slots.ordinal == ordinal))
        return self._at(plan, int(slot))

    def _at(self, plan: ChunkPlan, slot: int) -> tuple[int, int] | None:
        data_step, position = divmod(slot, self._source.planner.global_batch_size)
        data_step += plan.first_step
        return (
            None
            if self._source.stream_version.skipped(data_step)
            else (self._source.stream_version.step_at(data_step), position)
        )

    def _of(self, number: int) -> Slots:
        if number not in self._slots:
            self._slots[number] = self._source.planner.slots(self._plans[number])
        return self._slots[number]
