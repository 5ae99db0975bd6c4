"""Which ranks get the same part of a global batch: neighbours, or any layout that the trainer describes.

Ranks with the same data-parallel coordinate are the model-parallel peers of one group, wherever they are. Price: one
all-gather of 16 bytes per rank when a data plane is opened.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.config.schema import DataPlaneConfig
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.errors import ConfigError

__all__ = ["coordinate_in_mesh", "gather_coordinates", "slice_in_layout"]

UNKNOWN = -1
"""Stands for the coordinate of a rank that described no layout."""


def coordinate_in_mesh(mesh: Any, data_dims: Sequence[str]) -> tuple[int, int]:
    """Return the data-parallel coordinate of this rank in a torch `DeviceMesh`, and the number of coordinates.

    Args:
        mesh: a mesh with named dimensions over all ranks.
        data_dims: the dimensions along which batches differ, the outermost first.

    Raises:
        ConfigError: the mesh has no such dimension.
    """
    names = mesh.mesh_dim_names or ()
    rank = 0
    size = 1
    for name in data_dims:
        if name not in names:
            raise ConfigError(
                f"data_dims names {name!r}, but the mesh has the dimensions {list(names)}.\n"
                "  Name the dimensions along which ranks get different batches."
            )
        size_of_dim = mesh.size(names.index(name))
        rank = rank * size_of_dim + mesh.get_local_rank(name)
        size *= size_of_dim
    return rank, size


def gather_coordinates(comm: Communicator, own: tuple[int, int] | None) -> tuple[int, ...] | None:
    """Return the data-parallel coordinate of every rank; None if no rank described a layout. **Collective.**

    Args:
        comm: all ranks.
        own: coordinate of this rank and number of coordinates, or None.

    Raises:
        ConfigError: only some ranks described a layout, or what they described does not fit together.
    """
    layout = comm.Allgather(np.array(own or (UNKNOWN, UNKNOWN), np.int64))
    if (layout == UNKNOWN).all():
        return None
    coordinates = layout[:, 0].tolist()
    sizes = sorted(set(layout[:, 1].tolist()))
    copies = Counter(coordinates)
    if len(sizes) != 1 or sorted(copies) != list(range(sizes[0])) or len(set(copies.values())) != 1:
        raise ConfigError(
            f"The ranks described data_parallel (or mesh) with the coordinates {coordinates} of sizes {sizes}; every "
            "coordinate from 0 to size - 1 must belong to the same number of ranks.\n"
            "  Give every rank its own data-parallel rank and the data-parallel size."
        )
    return tuple(coordinates)


def slice_in_layout(plane: DataPlaneConfig, rank: int, coordinates: Sequence[int]) -> BatchSlice:
    """Return the slice of `rank`, given the data-parallel coordinate of every rank.

    Raises:
        ConfigError: the groups cannot share the global batch evenly, or `model_parallel_size` is set too.
    """
    num_groups = max(coordinates) + 1
    if plane.model_parallel_size != 1:
        raise ConfigError(
            f"dataplane.model_parallel_size={plane.model_parallel_size} describes neighbouring ranks, but "
            "data_parallel or mesh describes the layout too.\n  Remove dataplane.model_parallel_size."
        )
    if plane.global_batch_size % num_groups:
        raise ConfigError(
            f"dataplane.global_batch_size={plane.global_batch_size} cannot be shared evenly by {num_groups} "
            f"data-parallel groups.\n  Make it a multiple of {num_groups}."
        )
    size = plane.global_batch_size // num_groups
    own = coordinates[rank]
    return BatchSlice(first=own * size, size=size, is_group_leader=list(coordinates).index(own) == rank)
