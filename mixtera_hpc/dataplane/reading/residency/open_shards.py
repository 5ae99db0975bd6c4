"""The number of shards that a reading thread keeps open, and their paths."""

import resource
from collections.abc import Sequence
from pathlib import Path

__all__ = ["ShardPaths", "max_open_shards"]

MIN_OPEN_SHARDS = 16
MAX_OPEN_SHARDS = 4096
MAX_PATHS = 16384
"""Paths of shards in memory; about 8 MB."""


class ShardPaths:
    """The paths of shards. With thousands of shards, each is opened many times, and making a `Path` takes longer."""

    def __init__(self, data_root: str, relative: Sequence[str]) -> None:
        """Make no path yet; those of the shards are `relative` to `data_root`."""
        self._data_root = data_root
        self._relative = relative
        self._paths: dict[int, Path] = {}

    def get(self, number: int) -> Path:
        """Return the path of a shard."""
        if number not in self._paths:
            if len(self._paths) >= MAX_PATHS:
                self._paths.clear()
            self._paths[number] = Path(self._data_root) / self._relative[number]
        return self._paths[number]


def max_open_shards() -> int:
    """Return how many shards one reading thread keeps open."""
    # Half of the descriptors that the process may open are left to everything else, for example torch and MPI. The
    # other half is for two readers: one of the training data and one of the data held out.
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return MAX_OPEN_SHARDS
    return min(max(limit // 4, MIN_OPEN_SHARDS), MAX_OPEN_SHARDS)
