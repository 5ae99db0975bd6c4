"""A data file and its format, as a scan gets them."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["ShardFile"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """A shard and the name of its format."""

    root: Path
    path: str
    """Relative to `root`."""
    format: str

    @property
    def full_path(self) -> Path:
        """The path of the file."""
        return self.root / self.path
