"""Take over the number of lanes that a run began with.

The default number follows from the global batch, and another release may have another rule. A saved state therefore
decides, unless the configuration sets `dataplane.lanes`: then `check_identity` compares. Price: one broadcast of 8
bytes per resume.
"""

from dataclasses import replace

import numpy as np

from mixtera_hpc.dataplane.plane_state import PlaneState
from mixtera_hpc.dataplane.reading.residency.decode_limit import check_job
from mixtera_hpc.dataplane.resources import PlaneResources

__all__ = ["with_recorded_lanes"]


def with_recorded_lanes(resources: PlaneResources, state: PlaneState | None) -> PlaneResources:
    """Return `resources` with the number of lanes of a state, unless it is fixed. **Collective.**

    Args:
        resources: what the plane works with.
        state: on rank 0 the state to resume from; None on the other ranks.

    Raises:
        ConfigError: with this number, the job decodes more than `data.max_amplification`.
    """
    if resources.has_fixed_lanes:
        return resources
    recorded = state.identity.get("lanes") if state is not None else None
    # 0: a state of another version, which is refused later.
    number = np.array([recorded if isinstance(recorded, int) and recorded > 0 else 0], np.int64)
    resources.comm.Bcast(number)
    lanes = int(number[0])
    if lanes in (0, resources.source.config.dataplane.lanes):
        return resources
    source = resources.source.with_lanes(lanes)
    check_job(source, resources.comm.size, resources.comm.local_size)
    return replace(resources, source=source)
