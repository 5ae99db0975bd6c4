"""Find every step, rank and position at which a document was served, from its shard and row.

Positions are exact, so nothing has to be searched: in every epoch that a run has reached, the block of the document has
one place in the block order of its domain, and the document has one place in its window. Price per epoch: one O(blocks)
permutation and the sample columns of one window. Price per sequence: one expanded chunk. The length of the run does not
matter.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mixtera_hpc.core.chunk_plan import ChunkPlan
from mixtera_hpc.core.slots.segment_order import Slots
from mixtera_hpc.dataplane.reading.packing.sequence_documents import SequenceDocuments
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.step_sequences import slots_of_plan
from mixtera_hpc.dataplane.recording.run_history import AttemptRecord
from mixtera_hpc.errors import DataError, did_you_mean
from mixtera_hpc.trace.rank_filter import check_rank, is_served_to
from mixtera_hpc.trace.served_run import Record, ServedRun

__all__ = ["locate_row"]


def locate_row(run: ServedRun, shard: str, row: int, rank: int | None = None) -> Iterator[Record]:
    """Yield every service of a row by the attempts that count, in order of attempts and epochs.

    A record has `step`, `position`, `rank`, `attempt`, `domain_id`, `epoch` and `items`: the items [start, end) of the
    row. If an attempt was killed, what it had planned counts too: up to two chunks more than it consumed.

    Args:
        rank: only what was served to this rank or its model-parallel group.

    Raises:
        DataError: the index has no such shard or row.
        ConfigError: the run has no such rank.
    """
    extents = run.history.extents()
    check_rank(rank, [attempt for attempt, _ in extents])
    for attempt, steps in extents:
        source = run.source_of(attempt)
        place = _find_place(source, shard, row)
        for record in _services(source, attempt, place) if place else ():
            if record["step"] in steps and is_served_to(rank, attempt, record):
                yield record


@dataclass(frozen=True, slots=True)
class _RowPlace:
    """Place of a row in the index."""

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

    columns = source.samples.make_block_reader()(holding.astype(np.int32))
    row_in_block = row - int(blocks.first_row[holding[0]])
    domain = int(source.samples.domain_of(columns)[row_in_block])
    if domain < 0 or not source.samples.is_not_dropped(columns)[row_in_block]:
        return None
    return _RowPlace(domain, int(holding[0]), row_in_block)


def _services(source: Source, attempt: AttemptRecord, place: _RowPlace) -> Iterator[Record]:
    """Yield the services of a row in every epoch that the plans of the attempt reach."""
    if not attempt.plans:
        return
    domain = place.domain
    documents = SequenceDocuments(source, source.streams())
    expanded = _ExpandedPlans(source, attempt, documents)
    first = int(attempt.plans[0].cursors[domain])
    end = int(source.planner.after(attempt.plans[-1]).cursors[domain])
    epoch_items = int(source.layout.epoch_items()[domain])
    if end == first or not epoch_items:
        return

    # Items of the stream that the attempt planned, and with them the epochs that it touched. Lanes change the order
    # of sequences inside an epoch only.
    first_item, end_item = source.span(domain, first, end - first)
    for epoch in range(first_item // epoch_items, (end_item - 1) // epoch_items + 1):
        for part in _stream_parts(source, place, epoch):
            for sequence in _candidate_sequences(documents, source, domain, part):
                ordinal = source.lanes.ordinal(domain, sequence)
                items = _items_in_sequence(documents, domain, part, sequence)
                served = expanded.step_and_position(domain, ordinal) if items and first <= ordinal < end else None
                if served is None:
                    continue
                step, position = served
                for first_item_served, last_item_served in items:
                    yield {
                        "step": step,
                        "position": position,
                        "rank": attempt.rank_of(step, position),
                        "attempt": attempt.number,
                        "domain_id": domain,
                        "epoch": epoch,
                        "items": [first_item_served, last_item_served],
                    }


@dataclass(frozen=True, slots=True)
class _StreamPart:
    """Items [start, stop) of a stream that belong to one document."""

    start: int
    stop: int
    shift: int
    """Item of the stream minus item of the document."""


def _candidate_sequences(documents: SequenceDocuments, source: Source, domain: int, part: _StreamPart) -> range:
    """Return the sequences of a domain that may have items of a part of its stream.

    Sequence k covers [origin + k · stride, origin + k · stride + length); solved for k on both sides.
    """
    grid = source.grid
    origin = int(source.stream_version.origins[domain])
    low = max((part.start - origin - grid.length) // grid.stride + 1, 0)
    high = -((origin - part.stop) // grid.stride)  # Division that rounds up.
    if not documents.is_packed or low >= high:
        return range(low, high)
    # Any sequence of a packed group may have any item of the group.
    last = documents.group(domain, high - 1)
    return range(documents.group(domain, low).first, last.first + last.count)


def _items_in_sequence(
    documents: SequenceDocuments, domain: int, part: _StreamPart, sequence: int
) -> list[tuple[int, int]]:
    """Return the items of a row in a sequence that belong to a part of its stream, as ranges."""
    clipped = [(max(start, part.start), min(stop, part.stop)) for start, stop in documents.spans(domain, sequence)]
    return [(start - part.shift, stop - part.shift) for start, stop in clipped if start < stop]


def _stream_parts(source: Source, place: _RowPlace, epoch: int) -> Iterator[_StreamPart]:
    """Yield the items of the stream of its domain that a document covers in `epoch`.

    Nearly always one part. Of a document that had been served in part when samples were dropped there are several.
    """
    domain = place.domain
    epoch_items = int(source.layout.epoch_items()[domain])
    start, stop = _base_items(source, place, epoch)
    if start == stop:  # A document without items.
        return
    served = source.stream_version.served.get(domain)
    if served is None or served.epoch != epoch:
        pieces = np.array([[0, epoch_items]])
    else:
        pieces = served.pieces(epoch_items)
    begin = epoch * epoch_items
    for first, last in pieces.tolist():
        low = max(first, start)
        high = min(last, stop)
        if low < high:
            # The item of the stream minus the item of the base order, where the piece begins.
            shift = begin - first
            yield _StreamPart(low + shift, high + shift, start + shift)
        begin += last - first


def _base_items(source: Source, place: _RowPlace, epoch: int) -> tuple[int, int]:
    """Return the items of the base order of `epoch` that a document covers, counted from the start of the epoch."""
    layout = source.layout
    domain = place.domain
    order = layout.epoch_order(domain, epoch)

    # The window that the shuffled order puts the block into.
    block_number = int(np.searchsorted(layout.table.block[layout.entries(domain)], place.block))
    window = order.window_of_block(block_number)
    window_start = int(order.starts[window])
    if window_start == order.starts[window + 1]:
        return window_start, window_start
    documents = source.streams().window_documents(domain, epoch, window)
    matches = np.flatnonzero((documents.block == place.block) & (documents.row == place.row))
    if not len(matches):
        return window_start, window_start
    number = int(matches[0])
    start = window_start + int((documents.last - documents.first)[:number].sum())
    return start, start + int(documents.size[number])


class _ExpandedPlans:
    """The plans of an attempt, expanded on demand."""

    def __init__(self, source: Source, attempt: AttemptRecord, documents: SequenceDocuments) -> None:
        self._source = source
        self._documents = documents
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
        data_step, position = self._source.planner.batch_schedule.locate_in(plan.first_step, slot)
        version = self._source.stream_version
        return None if version.is_skipped(data_step) else (version.step_at(data_step), position)

    def _expand(self, number: int) -> Slots:
        if number not in self._slots:
            self._slots[number] = slots_of_plan(self._source, self._plans[number], self._documents)
        return self._slots[number]
