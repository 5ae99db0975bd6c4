"""Find where an attempt continues: the step, the plan and the stream version, after all run edits.

Price of an edit: one more open of the index, and for a drop one window of sample columns per domain and lane.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Communicator, Local, bcast_bytes
from mixtera_hpc.core.lanes import ServedPart
from mixtera_hpc.core.order import EpochOrder
from mixtera_hpc.core.planner import ChunkPlan, PlannerState
from mixtera_hpc.dataplane.plane_state import PlaneState, check_identity
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.dataplane.resume.run_edits import RunEdit
from mixtera_hpc.dataplane.resume.run_identity import config_for_identity, subset_for_identity
from mixtera_hpc.dataplane.resume.stream_version import StreamVersion
from mixtera_hpc.errors import ConfigError

__all__ = ["ResumePoint", "find_resume_point", "initial_state", "share_resume_point"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """Where an attempt continues."""

    step: int
    plan: ChunkPlan
    """The plan of the chunk that `step` lies in, or of the chunk before. A plan of no steps only says where planning
    begins."""
    stream_version: StreamVersion


def find_resume_point(source: Source, state: PlaneState | None, edits: Sequence[RunEdit]) -> ResumePoint:
    """Return where an attempt continues from `state`, or from the start. Rank 0 only.

    Args:
        source: the data as the attempt will serve it.
        edits: all edits of the run; those that `state` does not know yet take effect.

    Raises:
        ConfigError: the state belongs to another run, or an edit has abandoned it.
    """
    # A state knows the edits made before it was saved: as many as the number of its stream version.
    pending = edits[state.stream_version.number if state else 0 :]
    version = state.stream_version if state else StreamVersion.start(source.num_domains)
    version = replace(version.with_skips(edit.skip for edit in pending if edit.skip), number=len(edits))
    if state is None:
        start = PlannerState.start(source.num_domains)
        return ResumePoint(step=0, plan=_empty_plan(start), stream_version=version)

    _check_not_abandoned(state, pending)
    # Only what a pending edit names may differ from the state.
    changed = check_identity(state.identity, source.identity(), {name for edit in pending for name in edit.changes})
    if not changed:
        return ResumePoint(step=state.next_step, plan=state.plan, stream_version=version)
    return _edited_resume_point(source, state, version, changed)


def _check_not_abandoned(state: PlaneState, pending: Sequence[RunEdit]) -> None:
    bound = min((edit.at_step for edit in pending), default=state.next_step)
    if state.next_step > bound:
        raise ConfigError(
            f"The saved state is of step {state.next_step}, but an edit made the run continue from step {bound}.\n"
            f"  Load the state of step {bound}, or of an earlier step."
        )


def _edited_resume_point(
    source: Source, state: PlaneState, version: StreamVersion, changed: Sequence[str]
) -> ResumePoint:
    """Carry cursors and lags over to data that an edit has changed."""
    before = open_source(
        config_for_identity(source.config, state.identity),
        Local(),
        subset=subset_for_identity(state.identity),
        check=False,
    ).at_version(state.stream_version)

    # The state inside the chunk, step by step, because chunks end at other slots with another batch size.
    data_step = state.stream_version.data_step(state.next_step)
    position = before.planner.state_at(state.plan, data_step)
    position = replace(position, chunk=data_step // source.planner.chunk_steps)

    if "global_batch_size" in changed:
        # Schedules in tokens count the steps so far with their old size.
        old_items = before.mixture_context.timeline.items_per_step
        new_items = source.mixture_context.timeline.items_per_step
        version = replace(version, items=version.items + data_step * (old_items - new_items))
    if "drop" in changed:
        version = _version_after_drop(version, before, source, position.cursors)
    return ResumePoint(step=state.next_step, plan=_empty_plan(position), stream_version=version)


def initial_state(source: Source, run_edits: Sequence[RunEdit]) -> PlaneState:
    """Return the state that a run begins with; rank 0 only.

    It has the format of any other state, but no algorithm state: a mixing algorithm begins with its prior.
    """
    start = find_resume_point(source, None, run_edits)
    return PlaneState(
        next_step=start.step,
        plan=start.plan,
        mixer={},
        num_fed=0,
        decisions=[],
        stream_version=start.stream_version,
        identity=source.identity(),
    )


def share_resume_point(comm: Communicator, point: ResumePoint | None, num_domains: int) -> ResumePoint:
    """Return rank 0's `point` on every rank; the others give None. **Collective.**"""
    header: bytes | None = None
    buffer = np.zeros(ChunkPlan.array_size(num_domains), np.int64)
    if point is not None:
        header = msgspec.json.encode({"step": point.step, "stream_version": point.stream_version.to_dict()})
        buffer = point.plan.to_array()

    received = msgspec.json.decode(bcast_bytes(comm, header))
    comm.Bcast(buffer)
    return ResumePoint(
        step=received["step"],
        plan=ChunkPlan.from_array(buffer),
        stream_version=StreamVersion.from_dict(received["stream_version"]),
    )


def _empty_plan(state: PlannerState) -> ChunkPlan:
    """Return a plan of no steps, after which planning continues from `state`."""
    return ChunkPlan(
        chunk=state.chunk,
        first_step=state.step,
        num_steps=0,
        last=False,
        cursors=state.cursors,
        lags=state.lags,
        weights=np.zeros_like(state.lags),
    )


def _version_after_drop(
    version: StreamVersion, before: Source, after: Source, cursors: NDArray[np.int64]
) -> StreamVersion:
    """Return `version` with origins under which `cursors` mean, in the shorter streams, what is not served yet."""
    carrier = _DropCarrier(before, after)
    begins = np.zeros(len(cursors), np.int64)
    served = {}
    for domain, cursor in enumerate(cursors.tolist()):
        begins[domain], part = carrier.carry(domain, cursor)
        # What was served is often the beginning of the epoch: nothing has to be recorded then.
        if len(part.ranges) > 1 or (part.ranges and part.ranges[0][0] > 0):
            served[domain] = part
    return replace(version, origins=begins - cursors * after.grid.stride, begins=begins, served=served)


class _DropCarrier:
    """Carries the items that were served of an epoch over to the shorter streams after a drop.

    The order of blocks and rows is that of the longer stream; the shorter one lacks the dropped rows. So an item of the
    longer base order corresponds to the number of items in front of it that were not dropped: whole windows, and the
    rows of one window.
    """

    def __init__(self, before: Source, after: Source) -> None:
        self._before = before
        self._after = after
        self._streams = before.streams()
        self._read_blocks = after.make_block_reader()
        # Positions are carried over in the order in which they were reached: that of the old seed.
        self._same_order = replace(after.layout, order=before.layout.order)

    def carry(self, domain: int, cursor: int) -> tuple[int, ServedPart]:
        """Return where the shorter stream of a domain continues, and what was served of that epoch."""
        old_items = int(self._before.layout.epoch_items()[domain])
        new_items = int(self._after.layout.epoch_items()[domain])
        if not old_items or not new_items:
            return 0, ServedPart(epoch=0, ranges=())
        epoch = self._before.span(domain, cursor, 1)[0] // old_items
        orders = self._before.layout.epoch_order(domain, epoch), self._same_order.epoch_order(domain, epoch)
        bounds = [
            (self._item_after(domain, epoch, orders, first), self._item_after(domain, epoch, orders, last))
            for first, last in self._served_ranges(domain, epoch, cursor)
        ]
        ranges = _merged_ranges(bounds)
        return epoch * new_items + sum(last - first for first, last in ranges), ServedPart(epoch=epoch, ranges=ranges)

    def _served_ranges(self, domain: int, epoch: int, cursor: int) -> tuple[tuple[int, int], ...]:
        """Return the items of the base order of `epoch` that were served before sequence `cursor`."""
        source = self._before
        items = int(source.layout.epoch_items()[domain])
        begin = epoch * items
        # What was served since the last drop, and what was served of the same epoch before it.
        in_stream = source.lanes.served_ranges(domain, cursor)
        if in_stream[0][0] > begin:
            in_stream.append((begin, in_stream[0][0]))
        spans = np.array([span for span in in_stream if span[0] < span[1]], np.int64).reshape(-1, 2)
        starts, stops = self._streams.base_items(domain, epoch, spans[:, 0], spans[:, 1])
        return _merged_ranges(list(zip(starts.tolist(), stops.tolist(), strict=True)))

    def _item_after(self, domain: int, epoch: int, orders: tuple[EpochOrder, EpochOrder], item: int) -> int:
        """Return the item of the shorter base order that corresponds to `item` of the longer one."""
        long_order, short_order = orders
        if item == long_order.starts[-1]:
            return int(short_order.starts[-1])
        window = long_order.window_at(item)
        item_in_window = item - int(long_order.starts[window])
        position = int(short_order.starts[window])
        if not item_in_window:
            return position

        # Rows of the window in front of the item: which of them are still served?
        passed = self._streams.window_documents(domain, epoch, window, item_in_window)
        blocks, block_number = np.unique(passed.block, return_inverse=True)
        rows = self._after.blocks.rows[blocks].astype(np.int64)
        first_row = np.cumsum(rows) - rows
        is_served = self._after.is_not_dropped(self._read_blocks(blocks))[first_row[block_number] + passed.row]
        return position + int((passed.last - passed.first)[is_served].sum())


def _merged_ranges(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return ascending ranges with those that touch joined, and without empty ones."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(span for span in ranges if span[0] < span[1]):
        if merged and first == merged[-1][1]:
            merged[-1] = merged[-1][0], last
        else:
            merged.append((first, last))
    return tuple(merged)
