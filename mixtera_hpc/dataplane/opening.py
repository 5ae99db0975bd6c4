"""Open the resources of a data plane from the arguments of `DataPlane.open`; an error in one rank ends the job."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.comm.launcher import communicator_of, end_job
from mixtera_hpc.config.batch_memory import check_batch_memory
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.holdout import Split
from mixtera_hpc.dataplane.control import RunControl
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.delivery.open_feed import check_delivery
from mixtera_hpc.dataplane.reading.rank_layout import (
    coordinate_in_mesh,
    gather_coordinates,
    part_in_mesh,
    slice_in_layout,
)
from mixtera_hpc.dataplane.reading.residency.decode_limit import check_job
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.dataplane.reading.stored.token_gather import blocks_with_tokens
from mixtera_hpc.dataplane.recording.own_attempt import LoopLog, OwnAttempt, write_config_if_missing
from mixtera_hpc.dataplane.recording.run_recorder import RunRecorder
from mixtera_hpc.dataplane.resources import PlaneResources
from mixtera_hpc.dataplane.resume.run_edits import subset_of_run
from mixtera_hpc.dataplane.resume.run_identity import pin_to_run
from mixtera_hpc.dataplane.steps.loss_parts import PartLayout
from mixtera_hpc.launch.attempts import batch_script_attempt
from mixtera_hpc.tokens.slow_encoding import warn_of_slow_encoding
from mixtera_hpc.track.tracker import NullTracker, Tracker, open_tracker

__all__ = ["OpenOptions", "RankLayout", "open_or_end_job"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLayout:
    """The arguments of `DataPlane.open` about the ranks; the same names."""

    data_parallel: tuple[int, int] | None
    mesh: Any
    data_dims: Sequence[str]
    loss_parts: Sequence[str]
    subset: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """The arguments of `DataPlane.open` about the run; the same names."""

    folder: RunFolder | None
    attempt: int | None
    tracker: Tracker | None
    split: Split


def open_or_end_job(config: Config, comm: Any, layout: RankLayout, options: OpenOptions) -> PlaneResources:
    """Open what the plane works with. An error in one rank ends all, unless the caller does that. **Collective.**"""
    communicator: Communicator | None = None
    try:
        communicator = communicator_of(comm, config.dataplane.comm, subset=layout.subset)
        own = layout.data_parallel
        if layout.mesh is not None:
            own = coordinate_in_mesh(layout.mesh, layout.data_dims)
        part = part_in_mesh(layout.mesh, layout.loss_parts, layout.data_dims)
        coordinates = gather_coordinates(communicator, own, part)
        return _open_resources(config, communicator, coordinates, part, options)
    except BaseException as error:
        if not isinstance(comm, Communicator):
            end_job(communicator, error)
        raise


def _open_resources(
    config: Config,
    comm: Communicator,
    coordinates: tuple[int, ...] | None,
    part: tuple[int, int],
    options: OpenOptions,
) -> PlaneResources:
    """Open what the plane works with. **Collective.**

    Args:
        config: what to serve.
        comm: all ranks.
        coordinates: data-parallel coordinate of every rank; None if the ranks of a group are neighbours.
        part: which part of every sequence this rank records, and the number of parts.
        options: what `DataPlane.open` was given about the run.
    """
    # Wrong sizes are refused first: opening a large index takes seconds.
    if coordinates is None:
        batch_slice = BatchSlice.of(config.dataplane, comm.rank, comm.size)
    else:
        batch_slice = slice_in_layout(config.dataplane, comm.rank, coordinates)
    if config.mixture.unit == "tokens":
        check_batch_memory(config.dataplane, batch_slice.num_groups, ranks_on_node=comm.local_size)
    group: Communicator | None = None
    has_peers = comm.size > batch_slice.num_groups
    if has_peers and (part[1] > 1 or config.dataplane.delivery == "lead"):
        group = comm.Split(batch_slice.group)
    parts: PartLayout | None = None
    if group is not None and part[1] > 1:
        parts = PartLayout(part=part[0], num_parts=part[1], group=group)

    pinned = config
    if options.folder is not None:
        # The index may have been refreshed since the run began; its steps refer to the old state.
        pinned = pin_to_run(config, options.folder.journal)

    # Rank 0 reads what was dropped from the run, and shares it with the index.
    is_root = comm.rank == 0
    subset = subset_of_run(options.folder if is_root else None, options.split)
    source = open_source(pinned, comm, subset=subset)
    if is_root and source.layout.in_tokens and not blocks_with_tokens(source).all():
        warn_of_slow_encoding(source.tokenizer)
    # Every rank comes to the same result.
    check_job(source, comm.size, comm.local_size)
    if group is not None and config.dataplane.delivery == "lead":
        check_delivery(source)

    is_audited = config.dataplane.audit and batch_slice.is_group_leader
    return PlaneResources(
        source=source,
        comm=comm,
        batch_slice=batch_slice,
        data_parallel_ranks=coordinates,
        group=group,
        parts=parts,
        folder=options.folder,
        recorder=_open_recorder(config, comm, options, is_audited=is_audited),
        control=RunControl(options.folder, watch_files=is_root),
        has_fixed_lanes=config.dataplane.lanes is not None,
    )


def _open_recorder(config: Config, comm: Communicator, options: OpenOptions, *, is_audited: bool) -> RunRecorder:
    """Open the records of this rank in the folder of the run; agree on the attempt. **Collective.**"""
    folder = options.folder
    tracker = options.tracker or NullTracker()
    if folder is None:
        return RunRecorder(None, options.attempt or 1, comm.rank, is_audited=False, tracker=tracker)

    own_attempt: OwnAttempt | None = None
    number = np.array([options.attempt or 0], np.int64)
    # Rank 0 decides: it is about to append to the journal, so the others must not read it by themselves.
    if comm.rank == 0:
        write_config_if_missing(folder, config)
        if options.attempt is None:
            in_batch_job = batch_script_attempt(folder)
            if in_batch_job is None:
                own_attempt = OwnAttempt.claim(folder, config, comm.size)
                number[0] = own_attempt.number
            else:
                number[0] = in_batch_job
    comm.Bcast(number)
    attempt = int(number[0])

    loop_log: LoopLog | None = None
    if options.tracker is None and comm.rank == 0:
        tracker = open_tracker(config, folder, rank=comm.rank, attempt=attempt)
        loop_log = LoopLog(tracker, comm.size, config.training.log_every)
    return RunRecorder(
        folder,
        attempt,
        comm.rank,
        is_audited=is_audited,
        keeps_losses=config.dataplane.record_losses,
        tracker=tracker,
        own_attempt=own_attempt,
        loop_log=loop_log,
    )
