"""From the arguments of `DataPlane.open` to what a data plane works with; an error in one rank ends the job."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.comm.launcher import communicator_of, end_job
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.holdout import Split
from mixtera_hpc.dataplane.control import RunControl
from mixtera_hpc.dataplane.journal import last_attempt
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.rank_layout import coordinate_in_mesh, gather_coordinates, slice_in_layout
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.dataplane.resources import PlaneResources
from mixtera_hpc.dataplane.resume.run_edits import subset_of_run
from mixtera_hpc.dataplane.resume.run_identity import pin_index_generation
from mixtera_hpc.dataplane.run_recorder import RunRecorder
from mixtera_hpc.track.tracker import Tracker

__all__ = ["OpenOptions", "RankLayout", "open_or_end_job"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLayout:
    """What `DataPlane.open` was given about the ranks; the same fields."""

    data_parallel: tuple[int, int] | None
    mesh: Any
    data_dims: Sequence[str]
    subset: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """What `DataPlane.open` was given about the run; the same fields."""

    folder: RunFolder | None
    attempt: int | None
    tracker: Tracker
    split: Split


def open_or_end_job(config: Config, comm: Any, layout: RankLayout, options: OpenOptions) -> PlaneResources:
    """Open what the plane works with. An error in one rank ends all, unless the caller does that. **Collective.**"""
    communicator: Communicator | None = None
    try:
        communicator = communicator_of(comm, config.dataplane.comm, subset=layout.subset)
        own = layout.data_parallel
        if layout.mesh is not None:
            own = coordinate_in_mesh(layout.mesh, layout.data_dims)
        return _open_resources(config, communicator, gather_coordinates(communicator, own), options)
    except BaseException as error:
        if not isinstance(comm, Communicator):
            end_job(communicator, error)
        raise


def _open_resources(
    config: Config, comm: Communicator, coordinates: tuple[int, ...] | None, options: OpenOptions
) -> PlaneResources:
    """Open what the plane works with. **Collective.**

    Args:
        coordinates: data-parallel coordinate of every rank; None if the ranks of a group are neighbours.
    """
    # Wrong sizes are refused first: opening a large index takes seconds.
    if coordinates is None:
        batch_slice = BatchSlice.of(config.dataplane, comm.rank, comm.size)
    else:
        batch_slice = slice_in_layout(config.dataplane, comm.rank, coordinates)
    config, attempt = _settings_of_attempt(config, comm, options.folder, options.attempt)

    # Rank 0 reads what was dropped from the run, and shares it with the index.
    is_root = comm.rank == 0
    subset = subset_of_run(options.folder if is_root else None, options.split)
    source = open_source(config, comm, subset=subset)

    is_audited = config.dataplane.audit and batch_slice.is_group_leader
    return PlaneResources(
        source=source,
        comm=comm,
        batch_slice=batch_slice,
        data_parallel_ranks=coordinates,
        folder=options.folder,
        recorder=RunRecorder(options.folder, attempt, comm.rank, is_audited=is_audited, tracker=options.tracker),
        control=RunControl(options.folder, watch_files=is_root),
    )


def _settings_of_attempt(
    config: Config, comm: Communicator, folder: RunFolder | None, attempt: int | None
) -> tuple[Config, int]:
    """Return the configuration as the run in `folder` began, and the attempt number. **Collective.**"""
    if folder is None:
        return config, 1 if attempt is None else attempt
    if attempt is None:
        attempt = _next_attempt(comm, folder)
    # The index may have been refreshed since the run began; its steps refer to the old state.
    return pin_index_generation(config, folder.journal), attempt


def _next_attempt(comm: Communicator, folder: RunFolder) -> int:
    """Return the batch job's attempt number, or the one after the last in the journal. **Collective.**"""
    number = np.zeros(1, np.int64)
    # Rank 0 decides: it is about to append to the journal, so the others must not read it by themselves.
    if comm.rank == 0:
        in_batch_job = os.environ.get("MIXTERA_RUN_FOLDER") == str(folder.path)
        number[0] = int(os.environ["MIXTERA_ATTEMPT"]) if in_batch_job else last_attempt(folder.journal) + 1
    comm.Bcast(number)
    return int(number[0])
