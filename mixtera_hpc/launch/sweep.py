"""Submit one run per combination of values, each as a separate job: array tasks could not differ in nodes.

`<runs>/<name>/sweep.jsonl` records what was submitted, with a fingerprint of what each point trains on and where.
A repeated sweep therefore skips finished, pending and running points, and continues the others.
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
from mixtera_hpc.config.files.json_text import parse_json
from mixtera_hpc.config.job_shape import parse_time
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.config.sweep import expand
from mixtera_hpc.errors import LaunchError
from mixtera_hpc.launch.prepare import replace_config, with_absolute_paths
from mixtera_hpc.launch.slurm.slurm_commands import JobState
from mixtera_hpc.launch.status import run_statuses
from mixtera_hpc.launch.submit import Submitted, submit_attempt, submit_run

__all__ = ["SweepPlan", "SweepPoint", "plan_configs", "plan_sweep", "record_point", "submit_point"]

IDENTITY_GROUPS = ("data", "index", "query", "mixture", "dataplane", "training", "checkpoint")
"""The config groups whose values identify a point."""

Action = Literal["new", "continue", "finished", "active"]
"""What submitting the sweep does with a point: `continue` resumes its run; a finished or active point is skipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """One combination of values."""

    config: Config
    overrides: tuple[str, ...]
    fingerprint: str
    action: Action
    folder: RunFolder | None = None
    """The folder of the run that was submitted for this point before."""

    @property
    def node_hours(self) -> float:
        """Upper bound of the node hours, with all attempts that `job.max_attempts` allows."""
        return self.node_hours_of_one_job * self.config.job.max_attempts

    @property
    def node_hours_of_one_job(self) -> float:
        """Upper bound of the node hours if one job completes the run."""
        if self.action in ("finished", "active"):
            return 0.0
        job = self.config.job
        return job.nodes * (parse_time(job.time) or 0) / 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """All points of a sweep, and what submitting it now would do with each."""

    points: tuple[SweepPoint, ...]

    @property
    def due(self) -> list[SweepPoint]:
        """The points to submit."""
        return [point for point in self.points if point.action in ("new", "continue")]

    @property
    def node_hours(self) -> float:
        """Upper bound of the node hours of all points to submit."""
        return sum(point.node_hours for point in self.points)

    @property
    def node_hours_of_one_job(self) -> float:
        """Upper bound of the node hours if one job completes each run."""
        return sum(point.node_hours_of_one_job for point in self.points)


def plan_sweep(overrides: Sequence[str], max_parallel: int | None = None) -> SweepPlan:
    """Compose and check every point, and look up the run that was submitted for it before.

    With `max_parallel`, the points share that many job names ("lanes"), and Slurm runs one job per name at a time
    (`--dependency=singleton`). Follow-up jobs wait in their lane as well. Price: a lane that ends early stays empty.

    Raises:
        ConfigError: A point does not compose or fails a check.
    """
    combinations = expand(overrides)
    return plan_configs([compose(point) for point in combinations], combinations, max_parallel)


def plan_configs(
    configs: Sequence[Config], combinations: Sequence[Sequence[str]], max_parallel: int | None = None
) -> SweepPlan:
    """Look up the runs that were submitted for composed points before; see `plan_sweep`.

    Args:
        configs: The points.
        combinations: The overrides of each point.
        max_parallel: Jobs at a time.
    """
    configs = [with_absolute_paths(config) for config in configs]
    previous = _previous_runs(configs)

    points: list[SweepPoint] = []
    num_due = 0
    for config, point in zip(configs, combinations, strict=True):
        fingerprint = _fingerprint(config)
        folder, action = previous.get(fingerprint, (None, "new"))
        is_due = action in ("new", "continue")
        if max_parallel is not None and is_due:
            config = _in_lane(config, num_due % max_parallel)
        num_due += is_due
        points.append(
            SweepPoint(config=config, overrides=tuple(point), fingerprint=fingerprint, action=action, folder=folder)
        )
    return SweepPlan(points=tuple(points))


def submit_point(point: SweepPoint) -> Submitted:
    """Submit one point that is due, and record it.

    Raises:
        LaunchError: See `submit_run`.
    """
    if point.folder is None:
        submitted = submit_run(point.config, point.overrides)
        record_point(point, submitted.folder)
        return submitted
    config = replace(point.config, run=replace(point.config.run, id=point.folder.run_id))
    replace_config(point.folder, to_plain(config), point.overrides)
    return submit_attempt(point.folder, config)


def _in_lane(config: Config, lane: int) -> Config:
    job = replace(config.job, name=f"{config.run.name}.lane{lane}", dependency="singleton")
    return replace(config, job=job)


def _previous_runs(configs: Sequence[Config]) -> dict[str, tuple[RunFolder | None, Action]]:
    """Return the latest run of each fingerprint, and what submitting the sweep does with it."""
    folders: dict[str, RunFolder] = {}
    for path in sorted({_record_path(config) for config in configs}):
        lines = path.read_text().splitlines() if path.is_file() else []
        for line in lines:
            try:
                entry = parse_json(line)
                folder = RunFolder(path.parent / entry["run_id"])
                fingerprint = entry["fingerprint"]
            except (ValueError, KeyError, TypeError):
                raise LaunchError(
                    f"{path} has a damaged line, {line[:60]!r}, so it does not say what was submitted before.\n"
                    "  Remove the line; the run that it named, if any, may be submitted again."
                ) from None
            if folder.config.exists():
                folders[fingerprint] = folder

    statuses = run_statuses(list(folders.values()), datetime.now(UTC))
    unknown = [status for status in statuses if status.may_be_active]
    if unknown:
        raise LaunchError(
            f"It is not known whether {len(unknown)} of {len(statuses)} runs of this sweep wait or run: "
            f"{unknown[0].reason}\n  A second job in their folders would damage them, so nothing was submitted. Repeat "
            "the command when Slurm answers."
        )
    return {
        fingerprint: (folder, _action(status.state))
        for (fingerprint, folder), status in zip(folders.items(), statuses, strict=True)
    }


def _action(state: JobState) -> Action:
    if state.active:
        return "active"
    return "finished" if state == JobState.COMPLETED else "continue"


def _fingerprint(config: Config) -> str:
    """Return a digest of everything that identifies a point: config groups, run name, cluster, ranks and command."""
    plain = to_plain(config)
    identity: dict[str, Any] = {name: plain[name] for name in IDENTITY_GROUPS}
    identity["where"] = [config.run.name, config.cluster.name, config.job.nodes, config.job.ranks_per_node]
    identity["command"] = config.job.command
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()


def record_point(point: SweepPoint, folder: RunFolder) -> None:
    """Record the run of a point, so that a repeated sweep finds it."""
    entry = {"fingerprint": point.fingerprint, "run_id": folder.run_id, "overrides": list(point.overrides)}
    with _record_path(point.config).open("a") as file:
        file.write(json.dumps(entry) + "\n")


def _record_path(config: Config) -> Path:
    return Path(config.run.root) / config.run.name / "sweep.jsonl"
