"""A run before its first batch: what `DataPlane` answers until a session begins or a state is loaded."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.batch_ramp import batch_schedule_of, sizes_from
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.plane_state import PlaneState
from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.dataplane.resources import PlaneResources
from mixtera_hpc.dataplane.resume.resume_point import initial_state
from mixtera_hpc.dataplane.steps.open_steps import RecordedPart

__all__ = ["UnstartedSession"]


class UnstartedSession:
    """Stands for a `Session` that has not begun: no batch, no step, no request. Nothing of it is collective."""

    next_step = 0
    next_data_step = 0
    data_wait_s = 0.0
    is_interrupted = False
    is_stopping = False

    def __init__(self, resources: PlaneResources) -> None:
        """Use the resources of the data plane."""
        self._resources = resources

    @property
    def stages_to_come(self) -> dict[str, int]:
        """Size of the global batches of the last stage, which any state leads to, by its key."""
        plane = self._resources.source.config.dataplane
        return sizes_from(plane, batch_schedule_of(plane).starts[-1])

    @property
    def weights(self) -> NDArray[np.float64]:
        """Zeros; shape (K,)."""
        return np.zeros(self._resources.source.num_domains)

    def record(self, batch: Batch | Mapping[str, Any], loss: Any, part: RecordedPart) -> None:
        """Raise ValueError: no batch was handed out."""
        raise ValueError("record() was called before the first batch.")

    def finish_step(self, batch: Batch | Mapping[str, Any]) -> None:
        """Raise ValueError: no batch was handed out."""
        raise ValueError("finish() was called before the first batch.")

    def feed_held_out(self, statistics: DomainStatistics) -> None:
        """Ignore held-out losses: no mixing algorithm runs yet."""

    def stop_requested(self) -> bool:
        """Return False: requests are looked for once steps begin."""
        return False

    def save_requested(self) -> bool:
        """Return False: requests are looked for once steps begin."""
        return False

    def completed_statistics(self) -> list[DomainStatistics]:
        """Return no statistics."""
        return []

    def state(self) -> PlaneState | None:
        """Return the state that the run begins with on rank 0, None elsewhere."""
        if self._resources.comm.rank != 0:
            return None
        return initial_state(self._resources.source, self._resources.recorder.run_edits())

    def finish(self) -> None:
        """Return None: no step was served, and no other rank waits for this one."""

    def close(self, orderly: bool) -> None:
        """Do nothing: no thread runs."""
