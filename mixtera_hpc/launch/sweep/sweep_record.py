"""Record the runs that sweeps have submitted, in `<runs>/<name>/sweep.jsonl`.

A line per run gives the fingerprint of its point. A line per sweep lists the points and the keys that it sweeps, which
`report --scaling` compares. A repeated sweep adds no line.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtera_hpc.config.files.json_text import parse_json
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.errors import LaunchError

__all__ = ["RecordedSweep", "SweepRecord"]

FILE_NAME = "sweep.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedSweep:
    """The newest sweep of a run name."""

    scaling: str
    """`none`, `strong` or `weak`."""
    swept: tuple[str, ...]
    """Keys that have several values."""
    runs: tuple[RunFolder, ...]
    """Runs of the points that were submitted, in the order of the sweep."""
    num_points: int


@dataclass(frozen=True, slots=True)
class SweepRecord:
    """The record of one run name."""

    folder: Path
    """`<runs>/<name>`."""

    @property
    def path(self) -> Path:
        """The file of the record."""
        return self.folder / FILE_NAME

    def runs(self) -> dict[str, RunFolder]:
        """Return the latest run of each fingerprint whose folder exists.

        Raises:
            LaunchError: A line is damaged.
        """
        entries = [entry for entry in self._entries() if "run_id" in entry]
        folders = {entry["fingerprint"]: RunFolder(self.folder / entry["run_id"]) for entry in entries}
        return {fingerprint: folder for fingerprint, folder in folders.items() if folder.config.exists()}

    def newest_sweep(self) -> RecordedSweep | None:
        """Return the newest sweep; None if there is none.

        Raises:
            LaunchError: A line is damaged.
        """
        sweeps = [entry for entry in self._entries() if "points" in entry]
        if not sweeps:
            return None
        newest = sweeps[-1]
        runs = self.runs()
        points = newest["points"]
        return RecordedSweep(
            scaling=str(newest.get("scaling", "none")),
            swept=tuple(newest.get("swept", ())),
            runs=tuple(runs[fingerprint] for fingerprint in points if fingerprint in runs),
            num_points=len(points),
        )

    def add_run(self, fingerprint: str, run_id: str, overrides: Sequence[str]) -> None:
        """Add the run of a point."""
        self._append({"fingerprint": fingerprint, "run_id": run_id, "overrides": list(overrides)})

    def add_sweep(self, points: Sequence[str], swept: Sequence[str], scaling: str) -> None:
        """Add a sweep, unless it is the newest one already.

        Args:
            points: Fingerprints of the points, in order.
            swept: Keys that have several values.
            scaling: `sweep.scaling`.
        """
        entry = {"points": list(points), "swept": list(swept), "scaling": scaling}
        newest = next((entry for entry in reversed(self._entries()) if "points" in entry), None)
        if newest != entry:
            self._append(entry)

    def _append(self, entry: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _entries(self) -> list[dict[str, Any]]:
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        return [self._entry(line) for line in lines]

    def _entry(self, line: str) -> dict[str, Any]:
        try:
            entry = parse_json(line)
        except ValueError:
            entry = None
        is_run = isinstance(entry, dict) and {"fingerprint", "run_id"} <= entry.keys()
        is_sweep = isinstance(entry, dict) and isinstance(entry.get("points"), list)
        if not (is_run or is_sweep):
            raise LaunchError(
                f"{self.path} has a damaged line, {line[:60]!r}, so it does not say what was submitted before.\n"
                "  Remove the line; the run that it named, if any, may be submitted again."
            )
        return dict(entry)
