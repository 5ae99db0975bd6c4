"""Every path of a run, in one place.

<root>/<name>/<run_id>/
  config.yaml  overrides.txt  manifest.json
  journal.jsonl                      what was planned, chunk by chunk
  decisions.jsonl                    what people changed about the run since: surgery and mixtures
  attempts/001/{submit.sh,job.json,exit.json,ranks.json,failure.json,logs/,audit/}
  attempts/001/logs/batch.out rank_00000.{out,err}      beyond 255 ranks node_00000.{out,err}, lines labelled with ranks
  metrics/{steps,mixture,comm}.jsonl
  checkpoints/step_00001000/ LATEST
  control/mixture.json               another mixture that is wished for
  control/{save,stop}                touch to ask for it; `cancelled` ends the chain of attempts
  report/
"""

import hashlib
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mixtera_hpc.errors import LaunchError, did_you_mean

__all__ = ["RunFolder", "find_runs", "new_run_id", "runs_root"]


def new_run_id(config: dict[str, Any], now: datetime | None = None) -> str:
    """UTC time and four hex digits of the configuration: runs started in the same second do not collide."""
    text = json.dumps(config, sort_keys=True, default=str)
    digest = hashlib.blake2b(text.encode(), digest_size=2).hexdigest()
    return f"{(now or datetime.now(UTC)).strftime('%Y%m%d-%H%M%S')}-{digest}"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The layout of one run's folder; makes nothing by itself."""

    path: Path

    @classmethod
    def find(cls, name: str, root: Path) -> "RunFolder":
        """The run meant by `name`: a path, a run id, `<name>/<run_id>`, or a run name (its newest run).

        Raises:
            LaunchError: there is none; names near misses.
        """
        if (Path(name) / "config.yaml").is_file():
            return cls(Path(name).resolve())
        runs = find_runs(root)
        matching = [r for r in runs if name in (r.run_id, f"{r.name}/{r.run_id}", r.name)]
        if matching:
            return max(matching, key=lambda run: run.run_id)
        known = sorted({run.run_id for run in runs} | {run.name for run in runs})
        raise LaunchError(f"No run {name!r} below {root}.{did_you_mean(name, known)}\n  See mixtera-hpc status.")

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def name(self) -> str:
        return self.path.parent.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def overrides(self) -> Path:
        return self.path / "overrides.txt"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def decisions(self) -> Path:
        return self.path / "decisions.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def control(self) -> Path:
        return self.path / "control"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def attempt(self, number: int) -> Path:
        """Folder of one attempt, counted from 1."""
        return self.path / "attempts" / f"{number:03d}"

    def logs(self, attempt: int) -> Path:
        return self.attempt(attempt) / "logs"

    def audit(self, attempt: int) -> Path:
        return self.attempt(attempt) / "audit"

    def attempts(self) -> list[int]:
        """Numbers of the attempts that exist, ascending."""
        return sorted(int(p.name) for p in (self.path / "attempts").glob("[0-9]*") if p.is_dir())


def runs_root() -> Path:
    """Where runs lie when nobody says: $MIXTERA_RUNS, or `runs` below the working folder, like `run.root`."""
    return Path(os.environ.get("MIXTERA_RUNS", "runs"))


def find_runs(root: Path) -> list[RunFolder]:
    """Every run below `root`, oldest first."""
    return sorted((RunFolder(p.parent.resolve()) for p in root.glob("*/*/config.yaml")), key=lambda run: run.run_id)
