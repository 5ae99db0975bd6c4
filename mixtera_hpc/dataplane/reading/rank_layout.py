"""Groups of ranks that get the same part of a global batch: neighbours, or any layout that the trainer describes.

Ranks with the same data-parallel coordinate are the model-parallel peers of one group, wherever they are. Price: one
all-gather of 32 bytes per rank when a data plane is opened.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.config.schema import DataPlaneConfig
from mixtera_hpc.dataplane.reading.batches import BatchSlice, check_last_stage
from mixtera_hpc.errors import ConfigError

__all__ = ["WHOLE", "coordinate_in_mesh", "gather_coordinates", "part_in_mesh", "slice_in_layout"]

WHOLE = (0, 1)
"""The part of a rank that records the losses of whole sequences, and the number of parts."""

UNKNOWN = -1
"""Stands for the coordinate of a rank that described no layout."""


def coordinate_in_mesh(mesh: Any, dims: Sequence[str], argument: str = "data_dims") -> tuple[int, int]:
    """Return the coordinate of this rank along some dimensions of a torch `DeviceMesh`, and the number of coordinates.

    Args:
        mesh: a mesh with named dimensions over all ranks.
        dims: the dimensions, the outermost first; with `data_dims` those along which batches differ.
        argument: name of the argument of `DataPlane.open` that gave the dimensions.

    Raises:
        ConfigError: the mesh has no such dimension.
    """
    names = mesh.mesh_dim_names or ()
    rank = 0
    size = 1
    for name in dims:
        if name not in names:
            raise ConfigError(
                f"{argument} names {name!r}, but the mesh has the dimensions {list(names)}.\n"
                "  Name the dimensions along which ranks get different batches (data_dims), or record parts of the "
                "same sequences (loss_parts)."
            )
        # Row-major: the last dimension varies fastest.
        size_of_dim = mesh.size(names.index(name))
        rank = rank * size_of_dim + mesh.get_local_rank(name)
        size *= size_of_dim
    return rank, size


def part_in_mesh(mesh: Any, loss_parts: Sequence[str], data_dims: Sequence[str]) -> tuple[int, int]:
    """Return which part of every sequence this rank records, and the number of parts.

    Args:
        mesh: a mesh with named dimensions over all ranks, or None.
        loss_parts: the dimensions whose ranks each record a part.
        data_dims: the dimensions along which batches differ.

    Raises:
        ConfigError: there is no mesh, it has no such dimension, or ranks along it get different batches.
    """
    if not loss_parts:
        return WHOLE
    if mesh is None:
        raise ConfigError(
            f"loss_parts={tuple(loss_parts)} names dimensions of a mesh, but mesh is None.\n"
            "  Give DataPlane.open(mesh=) the DeviceMesh, or remove loss_parts."
        )
    both = sorted(set(loss_parts) & set(data_dims))
    if both:
        raise ConfigError(
            f"loss_parts and data_dims both name {both}. Ranks along data_dims have different sequences, ranks along "
            "loss_parts share them.\n  Name each dimension once."
        )
    return coordinate_in_mesh(mesh, loss_parts, argument="loss_parts")


def gather_coordinates(
    comm: Communicator, own: tuple[int, int] | None, part: tuple[int, int] = WHOLE
) -> tuple[int, ...] | None:
    """Return the data-parallel coordinate of every rank; None if no rank described a layout. **Collective.**

    Args:
        comm: all ranks.
        own: coordinate of this rank and number of coordinates, or None.
        part: which part of every sequence this rank records, and the number of parts.

    Raises:
        ConfigError: only some ranks described a layout, or what they described does not fit together.
    """
    # Of each rank: coordinate, number of coordinates, part, number of parts.
    layout = comm.Allgather(np.array([*(own or (UNKNOWN, UNKNOWN)), *part], np.int64))
    # Every coordinate must have every part, and each pair must occur equally often.
    parts = Counter(tuple(row) for row in layout[:, [0, 2, 3]].tolist())
    if len(set(layout[:, 3].tolist())) != 1 or len(set(parts.values())) != 1:
        raise ConfigError(
            f"The ranks described loss_parts with the positions {layout[:, 2].tolist()} of "
            f"{sorted(set(layout[:, 3].tolist()))} parts, not the same ones in every data-parallel group.\n"
            "  Give all ranks the same loss_parts and mesh."
        )
    if (layout[:, :2] == UNKNOWN).all():
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
        ConfigError: the groups cannot share the last global batches evenly, or `model_parallel_size` is set too.
    """
    num_groups = max(coordinates) + 1
    if plane.model_parallel_size != 1:
        raise ConfigError(
            f"dataplane.model_parallel_size={plane.model_parallel_size} describes neighbouring ranks, but "
            "data_parallel or mesh describes the layout too.\n  Remove dataplane.model_parallel_size."
        )
    check_last_stage(plane, num_groups, f"{num_groups} data-parallel groups")
    own = coordinates[rank]
    return BatchSlice(group=own, num_groups=num_groups, is_group_leader=list(coordinates).index(own) == rank)
