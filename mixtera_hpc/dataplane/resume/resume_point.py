"""Find where an attempt continues: the step, the plan and the stream version, after all run edits.

Price of an edit: one more open of the index; `cut_streams` says what a drop costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from mixtera_hpc.comm.communicator import Communicator, Local, bcast_bytes
from mixtera_hpc.core.chunk_plan import ChunkPlan, PlannerState
from mixtera_hpc.dataplane.plane_state import PlaneState, check_identity
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.dataplane.resume.cut_streams import cut_streams, with_sequence_length
from mixtera_hpc.dataplane.resume.run_edits import RunEdit
from mixtera_hpc.dataplane.resume.run_identity import config_for_identity, subset_for_identity
from mixtera_hpc.dataplane.resume.stream_version import StreamVersion
from mixtera_hpc.errors import ConfigError

__all__ = ["ResumePoint", "find_resume_point", "initial_state", "share_resume_point"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """Point from which an attempt continues."""

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
    _check_applied(source, pending)
    if state is None:
        start = PlannerState.start(source.num_domains)
        return ResumePoint(step=0, plan=_empty_plan(start), stream_version=version)

    _check_not_abandoned(state, pending)
    # Only what a pending edit names may differ from the state.
    changed = check_identity(state.identity, source.identity(), {name for edit in pending for name in edit.changes})
    if not changed:
        return ResumePoint(step=state.next_step, plan=state.plan, stream_version=version)
    return _edited_resume_point(source, state, version, changed)


def _check_applied(source: Source, pending: Sequence[RunEdit]) -> None:
    """Raise ConfigError unless `source` has the values that the newest edits give."""
    wanted = {name: after for edit in pending for name, (_, after) in edit.changes.items()}
    identity = source.identity()
    lines = [
        f"\n  - {name} was changed to {after!r}, is {identity[name]!r}"
        for name, after in wanted.items()
        if identity[name] != after
    ]
    if lines:
        raise ConfigError(
            "mixtera-hpc resume has changed the run, but the data plane was opened with other settings:"
            f"{''.join(lines)}\n  Open it with the values that the run was changed to, or change the run again."
        )


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

    # Schedules in tokens count the steps so far with their old size.
    items = before.mixture_context.timeline.items_at(data_step)
    version = replace(version, items=items - source.mixture_context.timeline.items_at(data_step))
    served = position.cursors
    if "seq_len" in changed:
        position = with_sequence_length(position, before, source)
    if "drop" in changed or "seq_len" in changed:
        version = cut_streams(version, before, source, served, position.cursors)
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
