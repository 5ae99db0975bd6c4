"""Surgery: deliberate changes of a run between two attempts, each recorded before it happens, none by accident.

A surgery passes data steps over, drops samples, or changes the seed or the global batch size. It begins an era at the step the
next attempt goes on from: what was served before keeps its meaning, what comes after is counted from exact positions. Price:
one more open of the index, and for `drop` one window of sample columns per domain.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Communicator, Local, bcast_bytes
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.planner import ChunkPlan, PlannerState
from mixtera_hpc.dataplane.journal import append_line, read_lines
from mixtera_hpc.dataplane.plane_state import PlaneState, check_identity
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.dataplane.resume.stream_version import StreamVersion
from mixtera_hpc.errors import ConfigError

__all__ = [
    "ResumePoint",
    "RunEdit",
    "config_for_identity",
    "find_resume_point",
    "is_abandoned",
    "pin_index_generation",
    "read_run_edits",
    "record_run_edit",
    "run_edit_between",
    "share_resume_point",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEdit:
    """One change, as `decisions.jsonl` has it."""

    at_step: int
    """The next attempt goes on from here or before; checkpoints of later steps are of a past that was abandoned."""
    skip: tuple[int, int] | None = None
    """First and last data step to pass over."""
    changes: Mapping[str, tuple[Any, Any]]
    """Identity field → before, after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """Where an attempt goes on."""

    step: int
    plan: ChunkPlan
    """Of the chunk that `step` lies in, or the one before it. One of no steps: planning begins at its first slot."""
    stream_version: StreamVersion


def record_run_edit(path: Path, surgery: RunEdit) -> None:
    """Append to `decisions.jsonl`; one process does it, while no attempt runs."""
    append_line(path, {"kind": "run_edit", **msgspec.to_builtins(surgery)})


def read_run_edits(path: Path | None) -> list[RunEdit]:
    """All surgeries of a run, oldest first."""
    if path is None or not path.is_file():
        return []
    records = [line for line in read_lines(path) if line["kind"] == "run_edit"]
    return [msgspec.convert({k: v for k, v in line.items() if k != "kind"}, RunEdit) for line in records]


def is_abandoned(state: Mapping[str, Any], operated: Sequence[RunEdit]) -> bool:
    """Whether a surgery has abandoned the saved `state` (the "json" part of it): it lies after the step gone back to."""
    done = state.get("stream_version", {}).get("number", 0)  # A state of an older version is refused when it is loaded.
    pending = operated[done:]
    return any(state["next_step"] > surgery.at_step for surgery in pending)


def run_edit_between(
    before: Config, after: Config, skip_steps: tuple[int, int] | None, at_step: int, operated: Sequence[RunEdit]
) -> RunEdit | None:
    """What makes `after` of `before`; None when nothing does.

    Args:
        skip_steps: first and last training step whose data is to be passed over.
        operated: earlier surgeries of the run.
    """
    old, new = _changeable(before), _changeable(after)
    changes = {name: (old[name], new[name]) for name in old if old[name] != new[name]}
    if not changes and skip_steps is None:
        return None
    era = StreamVersion.start(0).with_skips(s.skip for s in operated if s.skip)
    skip = (era.data_step(skip_steps[0]), era.data_step(skip_steps[1])) if skip_steps else None
    return RunEdit(at_step=at_step, skip=skip, changes=changes)


def _changeable(config: Config) -> dict[str, Any]:
    plane = config.dataplane
    return {"drop": list(config.query.drop), "seed": plane.seed, "global_batch_size": plane.global_batch_size}


def find_resume_point(source: Source, state: PlaneState | None, operated: Sequence[RunEdit]) -> ResumePoint:
    """Where an attempt goes on from `state`, or from the start, after all surgeries of the run. Rank 0 only.

    Raises:
        ConfigError: the state is of another run, or of a past that a surgery abandoned.
    """
    done = state.stream_version.number if state else 0
    pending = operated[done:]
    era = state.stream_version if state else StreamVersion.start(source.num_domains)
    era = replace(era.with_skips(s.skip for s in pending if s.skip), number=len(operated))
    if state is None:
        return ResumePoint(step=0, plan=_from_here(PlannerState.start(source.num_domains)), stream_version=era)
    if any(state.next_step > surgery.at_step for surgery in pending):
        bound = min(surgery.at_step for surgery in pending)
        raise ConfigError(
            f"The saved state is of step {state.next_step}, but the run was changed to go on from step {bound}.\n"
            f"  Load the state of step {bound}, or of one before it."
        )
    changed = check_identity(state.identity, source.identity(), {name for s in pending for name in s.changes})
    if not changed:
        return ResumePoint(step=state.next_step, plan=state.plan, stream_version=era)
    before = open_source(config_for_identity(source.config, state.identity), Local(), check=False).at_version(
        state.stream_version
    )
    data_step = state.stream_version.data_step(state.next_step)
    stands = before.planner.state_at(state.plan, data_step)
    stands = replace(stands, chunk=data_step // source.planner.chunk_steps)
    if "global_batch_size" in changed:
        was, now = before.mixture_context.timeline.items_per_step, source.mixture_context.timeline.items_per_step
        era = replace(era, items=era.items + data_step * (was - now))
    if "drop" in changed:
        era = replace(era, origins=_origins(before, source, stands.cursors))
    return ResumePoint(step=state.next_step, plan=_from_here(stands), stream_version=era)


def share_resume_point(comm: Communicator, found: ResumePoint | None, num_domains: int) -> ResumePoint:
    """What rank 0 found, on every rank. **Collective.**"""
    facts = (
        msgspec.json.encode({"step": found.step, "stream_version": found.stream_version.to_dict()}) if found else None
    )
    known = msgspec.json.decode(bcast_bytes(comm, facts))
    buffer = found.plan.to_array() if found else np.zeros(ChunkPlan.array_size(num_domains), np.int64)
    comm.Bcast(buffer)
    return ResumePoint(
        step=known["step"],
        plan=ChunkPlan.from_array(buffer),
        stream_version=StreamVersion.from_dict(known["stream_version"]),
    )


def pin_index_generation(config: Config, journal: Path) -> Config:
    """Return `config` with the generation of each index that the run of `journal` began with: it may have been refreshed since.

    Reads one line of the journal. `index.generations` that the user has set stay.
    """
    if config.index.generations or not journal.is_file():
        return config
    with journal.open("rb") as file:
        line = file.readline()
    opened = msgspec.json.decode(line) if line.endswith(b"\n") else {}
    return _at_state(config, opened.get("identity", {}).get("index"))


def _at_state(config: Config, fingerprints: Sequence[str] | None) -> Config:
    """Return `config` with the given generation of each index; unchanged when it reads another number of indexes."""
    if fingerprints is None or len(fingerprints) != len(config.index.paths_to_read):
        return config
    return replace(config, index=replace(config.index, generations=list(fingerprints)))


def config_for_identity(config: Config, identity: Mapping[str, Any]) -> Config:
    """`config` with what surgery or a refresh may have changed as it is in `identity`."""
    return replace(
        _at_state(config, identity["index"]),
        query=replace(config.query, drop=list(identity["drop"])),
        dataplane=replace(config.dataplane, seed=identity["seed"], global_batch_size=identity["global_batch_size"]),
    )


def _from_here(state: PlannerState) -> ChunkPlan:
    return ChunkPlan(
        chunk=state.chunk,
        first_step=state.step,
        num_steps=0,
        last=False,
        cursors=state.cursors,
        lags=state.lags,
        weights=np.zeros_like(state.lags),
    )


def _origins(before: Source, after: Source, cursors: NDArray[np.int64]) -> NDArray[np.int64]:
    """Origins under which `cursors` mean, in the shorter streams, the same place as before; shape (K,)."""
    places = [_place(before, after, d, before.span(d, int(c), 1)[0]) for d, c in enumerate(cursors)]
    return np.array(places, np.int64) - cursors * after.grid.stride


def _place(before: Source, after: Source, domain: int, item: int) -> int:
    """Where `item` of a domain's stream lies in the stream that leaves more samples out."""
    epoch_items, left = int(before.layout.epoch_items()[domain]), int(after.layout.epoch_items()[domain])
    if not epoch_items or not left:
        return 0
    epoch, item = divmod(item, epoch_items)
    full, short = (
        s.layout.order.epoch(domain, epoch, s.layout.sizes(domain)) for s in (before, _as_ordered(after, before))
    )
    window = full.window_at(item)
    first = epoch * epoch_items
    begin = epoch * left + int(short.starts[window])
    if item == int(full.starts[window]):
        return begin
    passed = before.streams().documents(domain, first + int(full.starts[window]), first + item)
    blocks, which = np.unique(passed.block, return_inverse=True)
    rows = after.blocks.rows[blocks].astype(np.int64)
    kept = after.is_not_dropped(after.make_block_reader()(blocks))[(np.cumsum(rows) - rows)[which] + passed.row]
    return begin + int((passed.last - passed.first)[kept].sum())


def _as_ordered(source: Source, like: Source) -> Source:
    """`source` with the seed of `like`: positions are carried over in the order they were reached in."""
    return replace(source, layout=replace(source.layout, order=like.layout.order))
