"""Settings that decide which sequences a stream has, and in which order they are served."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.schema import DataPlaneConfig
from mixtera_hpc.core.lanes import LaneOrder
from mixtera_hpc.core.packing.sequence_shuffle import SequenceShuffle
from mixtera_hpc.core.sequence_grid import SequenceGrid
from mixtera_hpc.dataplane.resume.stream_version import StreamVersion

__all__ = ["packing_identity", "sequence_order"]


def sequence_order(
    plane: DataPlaneConfig, grid: SequenceGrid, epoch_items: NDArray[np.int64], version: StreamVersion
) -> LaneOrder:
    """Return the order in which the sequences of all domains are served; `plane` has a number of lanes."""
    if plane.shuffle == "sequence":
        return SequenceShuffle(
            lanes=1,
            grid=grid,
            epoch_items=epoch_items,
            origins=version.origins,
            begins=version.begins,
            seed=plane.seed,
        )
    return LaneOrder(
        # Without a shuffle of rows the base order is served.
        lanes=plane.lanes if plane.lanes is not None and plane.shuffle == "window" else 1,
        grid=grid,
        epoch_items=epoch_items,
        origins=version.origins,
        begins=version.begins,
    )


def packing_identity(plane: DataPlaneConfig) -> dict[str, Any]:
    """Return the part of a run's identity that decides packing and the order of positions; fit for JSON."""
    balance: Any = plane.balance
    if plane.balance != "none":
        balance = [plane.balance, plane.balance_group]
    if plane.balance == "cost":
        balance.append(plane.sample_cost)
    return {
        "pack": plane.pack if plane.pack == "concat" else [plane.pack, plane.pack_group],
        "balance": balance,
    }
