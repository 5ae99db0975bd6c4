"""Agree on the number of micro-batches: only the rank that transforms a sample knows its cost.

Price: one blocking reduction of 8 bytes per step, in the thread of the trainer, when every rank holds its batch.
"""

from dataclasses import replace

import numpy as np

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.config.packing.check_packing import COST_OF_TRANSFORM
from mixtera_hpc.config.schema import DataPlaneConfig
from mixtera_hpc.core.packing.micro_batches import with_empty
from mixtera_hpc.dataplane.reading.batches import Batch

__all__ = ["agree_on_micro_batches"]


def agree_on_micro_batches(comm: Communicator, plane: DataPlaneConfig, batch: Batch) -> Batch:
    """Return the batch of this rank with as many micro-batches as the rank that needs most. **Collective.**

    Nothing is exchanged unless `data.transform` gives the costs.
    """
    if plane.sample_budget is None or plane.sample_cost != COST_OF_TRANSFORM:
        return batch
    most = int(comm.Allreduce(np.array([len(batch.micro_batches)], np.int64), "max")[0])
    return replace(batch, micro_batches=with_empty(batch.micro_batches, most, len(batch.positions)))
