"""Read the digests that a rank logged."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixtera_hpc.dataplane.recording.journal import read_lines

__all__ = ["read_audit_lines"]


def read_audit_lines(path: Path, damaged: list[int]) -> Iterator[dict[str, Any]]:
    """Yield the step, positions and digests of every line; `damaged` gets an entry for each line that is none."""
    for line in read_lines(path, damaged):
        positions = line.get("positions")
        digests = line.get("digests")
        is_list = isinstance(positions, list) and isinstance(digests, list)
        if type(line.get("step")) is int and is_list and len(positions or ()) == len(digests or ()):
            yield line
        else:
            damaged.append(0)
