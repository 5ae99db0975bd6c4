"""Describe shards: the data files of an index, as a build found them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = ["Shard", "escapes", "fingerprint_of_shard"]

ENDS_BYTES = 1 << 20
"""Bytes at each end of a shard that its fingerprint depends on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One data file."""

    path: str
    """Relative to its data root."""
    format: str
    """Name of the format that reads it."""
    size_bytes: int
    mtime_ns: int
    """Modification time."""
    dataset: str = ""
    """Name of its data set in `data.sets`; empty if there is only `data.root`."""

    def below(self, roots: Mapping[str, Path]) -> Path:
        """Return its full path, given the folder of every data set."""
        return roots[self.dataset] / self.path


def fingerprint_of_shard(path: Path, size_bytes: int) -> str:
    """Return a hex digest of a file's size, first MiB and last MiB.

    It costs two reads, and changes whenever a file is replaced, truncated or appended to.
    """
    digest = hashlib.blake2b(str(size_bytes).encode(), digest_size=16)
    with path.open("rb") as file:
        # Formats keep what matters at the ends: headers at the front, Parquet footers and gzip trailers at the back.
        digest.update(file.read(ENDS_BYTES))
        file.seek(max(size_bytes - ENDS_BYTES, 0))
        digest.update(file.read(ENDS_BYTES))
    return digest.hexdigest()


def escapes(path: str) -> bool:
    """Return whether a stored path leads out of its data root, or names no file."""
    # The index file may be written by another user, so its paths are untrusted input.
    parts = PurePosixPath(path).parts
    return not parts or path.startswith("/") or ".." in parts or "\0" in path
