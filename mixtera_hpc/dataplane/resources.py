"""The resources that a data plane holds from `open` to `close`."""

from collections.abc import Sequence
from dataclasses import dataclass

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.control import RunControl
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.recording.run_recorder import RunRecorder
from mixtera_hpc.dataplane.steps.loss_parts import PartLayout

__all__ = ["PlaneResources"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneResources:
    """The parts that a data plane works with; freed by `DataPlane.close`."""

    source: Source
    """The data, as the configuration describes it; the session serves the version of its resume point."""
    comm: Communicator
    batch_slice: BatchSlice
    data_parallel_ranks: Sequence[int] | None
    """Data-parallel coordinate of every rank; None if ranks of one group are neighbours."""
    group: Communicator | None
    """The ranks that get the same batches as this one; None if no message passes between them."""
    parts: PartLayout | None
    """The part of every sequence that this rank records; None if ranks record whole sequences."""
    control: RunControl
    folder: RunFolder | None
    recorder: RunRecorder
    has_fixed_lanes: bool
    """True if a saved state with another number of lanes is refused: the configuration sets `dataplane.lanes`, or
    held-out samples were opened with a number."""
