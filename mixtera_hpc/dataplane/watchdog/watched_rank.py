"""Facts about a rank that its watchdog uses; they do not change while a data plane is open."""

from collections.abc import Sequence
from dataclasses import dataclass

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema.dataplane import DataPlaneConfig
from mixtera_hpc.dataplane.control import RunControl
from mixtera_hpc.dataplane.resources import PlaneResources

__all__ = ["WatchedRank"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchedRank:
    """Facts about a rank that its watchdog uses."""

    rank: int
    num_ranks: int
    host: str
    config: DataPlaneConfig
    control: RunControl
    folder: RunFolder | None
    """Folder of the run; None if nothing is written."""
    attempt: int
    shard_paths: Sequence[str]

    @classmethod
    def of(cls, resources: PlaneResources) -> "WatchedRank":
        """Return the facts about this rank of an open data plane."""
        return cls(
            rank=resources.comm.rank,
            num_ranks=resources.comm.size,
            host=resources.comm.hostname,
            config=resources.source.config.dataplane,
            control=resources.control,
            folder=resources.folder,
            attempt=resources.recorder.attempt,
            shard_paths=resources.source.index.shard_paths,
        )
