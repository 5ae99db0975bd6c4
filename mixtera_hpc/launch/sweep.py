"""One run per combination of values, each its own job: points may differ in nodes, which one job array cannot.

What was submitted is kept in `<runs>/<name>/sweep.jsonl` by what a point trains on and where. Repeating a sweep therefore
skips points that finished, leaves those that wait or run alone, and continues the others in their folders.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.convert import to_plain
from mixtera_hpc.config.job_shape import parse_time
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.config.sweep import expand
from mixtera_hpc.launch.prepare import replace_config, with_absolute_paths
from mixtera_hpc.launch.slurm_commands import JobState
from mixtera_hpc.launch.status import run_statuses
from mixtera_hpc.launch.submit import Submitted, submit_attempt, submit_run

__all__ = ["SweepPlan", "SweepPoint", "plan_sweep", "submit_point"]

Action = Literal["new", "continue", "finished", "active"]
_TRAINED = ("data", "index", "query", "mixture", "dataplane", "training", "checkpoint")
"""Groups of the configuration that make two points of a sweep different."""
_UNKNOWN: tuple[RunFolder | None, Action] = (None, "new")


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """One combination of values."""

    config: Config
    overrides: tuple[str, ...]
    fingerprint: str
    action: Action
    folder: RunFolder | None = None
    """Of the run that was this point before."""

    @property
    def node_hours(self) -> float:
        """What it may cost at most, follow-ups included."""
        if self.action in ("finished", "active"):
            return 0.0
        job = self.config.job
        return job.nodes * (parse_time(job.time) or 0) / 3600 * job.max_attempts


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """What repeating the same command would submit right now."""

    points: tuple[SweepPoint, ...]

    @property
    def due(self) -> list[SweepPoint]:
        """Points to submit."""
        return [point for point in self.points if point.action in ("new", "continue")]

    @property
    def node_hours(self) -> float:
        return sum(point.node_hours for point in self.points)


def plan_sweep(overrides: Sequence[str], max_parallel: int | None = None) -> SweepPlan:
    """Compose and check every point, and look up what became of it before.

    With `max_parallel` points share that many job names, one job of a name at a time (`--dependency=singleton`): a
    follow-up takes its turn like any other job. Price: a lane that ends early stays empty.

    Raises:
        ConfigError: any point that does not compose or fails a check.
    """
    combinations = expand(overrides)
    configs = [with_absolute_paths(compose(point)) for point in combinations]
    known = _known_runs(configs)
    points: list[SweepPoint] = []
    lane = 0
    for config, point in zip(configs, combinations, strict=True):
        key = _fingerprint(config)
        folder, action = known.get(key, _UNKNOWN)
        if max_parallel is not None and action in ("new", "continue"):
            config = _in_lane(config, lane % max_parallel)
            lane += 1
        points.append(SweepPoint(config=config, overrides=tuple(point), fingerprint=key, action=action, folder=folder))
    return SweepPlan(points=tuple(points))


def submit_point(point: SweepPoint) -> Submitted:
    """Submit one due point and record it.

    Raises:
        LaunchError: Slurm refuses.
    """
    if point.folder is None:
        submitted = submit_run(point.config, point.overrides)
        _record(point, submitted)
        return submitted
    config = replace(point.config, run=replace(point.config.run, id=point.folder.run_id))
    replace_config(point.folder, to_plain(config), point.overrides)
    return submit_attempt(point.folder, config)


def _in_lane(config: Config, lane: int) -> Config:
    job = replace(config.job, name=f"{config.run.name}.lane{lane}", dependency="singleton")
    return replace(config, job=job)


def _known_runs(configs: Sequence[Config]) -> dict[str, tuple[RunFolder, Action]]:
    """Fingerprint → the latest run of that point and what is to be done about it."""
    folders: dict[str, RunFolder] = {}
    for path in sorted({_record_path(config) for config in configs}):
        for line in path.read_text().splitlines() if path.is_file() else ():
            entry = json.loads(line)
            folder = RunFolder(path.parent / entry["run_id"])
            if folder.config.exists():
                folders[entry["fingerprint"]] = folder
    statuses = run_statuses(list(folders.values()), datetime.now(UTC))
    return {
        key: (folder, _action(status.state)) for (key, folder), status in zip(folders.items(), statuses, strict=True)
    }


def _action(state: JobState) -> Action:
    if state.active:
        return "active"
    return "finished" if state == JobState.COMPLETED else "continue"


def _fingerprint(config: Config) -> str:
    """What makes two points the same: all that is trained on, and how many ranks of which cluster."""
    plain = to_plain(config)
    what: dict[str, Any] = {k: plain[k] for k in _TRAINED}
    what["where"] = [config.run.name, config.cluster.name, config.job.nodes, config.job.ranks_per_node]
    what["command"] = config.job.command
    return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=8).hexdigest()


def _record(point: SweepPoint, submitted: Submitted) -> None:
    entry = {"fingerprint": point.fingerprint, "run_id": submitted.folder.run_id, "overrides": list(point.overrides)}
    with _record_path(point.config).open("a") as file:
        file.write(json.dumps(entry) + "\n")


def _record_path(config: Config) -> Path:
    return Path(config.run.root) / config.run.name / "sweep.jsonl"
