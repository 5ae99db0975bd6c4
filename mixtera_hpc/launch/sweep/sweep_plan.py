"""Compose the points of a sweep, and find out whether the run of each is new, unfinished, active or finished.

Each point is a run. A digest of what it trains on and where identifies it, so a repeated sweep skips finished, pending
and running points, and continues the others.
"""

import hashlib
import json
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mixtera_hpc.config.check import check_run
from mixtera_hpc.config.compose import compose, compose_plain
from mixtera_hpc.config.composition.sweep_points import expand, swept_keys
from mixtera_hpc.config.convert import from_plain, to_plain
from mixtera_hpc.config.files.journal_start import EARLIER_LANES
from mixtera_hpc.config.job_shape import SCALE_KEYS, parse_time
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError, LaunchError
from mixtera_hpc.launch.prepare import with_absolute_paths
from mixtera_hpc.launch.slurm.slurm_commands import JobState
from mixtera_hpc.launch.status import run_statuses
from mixtera_hpc.launch.sweep.sweep_record import SweepRecord

__all__ = ["SweepPlan", "SweepPoint", "plan_configs", "plan_sweep"]

IDENTITY_GROUPS = ("data", "index", "query", "mixture", "dataplane", "training", "checkpoint")
"""The config groups whose values identify a point."""

Action = Literal["new", "continue", "finished", "active"]
"""Action of submitting the sweep for a point: `continue` resumes its run; a finished or active point is skipped."""


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
    def record(self) -> SweepRecord:
        """The record of the point's run name."""
        return SweepRecord(Path(self.config.run.root) / self.config.run.name)

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
    swept: tuple[str, ...]
    """The keys that have several values."""

    @property
    def due(self) -> list[SweepPoint]:
        """The points to submit."""
        return [point for point in self.points if point.action in ("new", "continue")]

    @property
    def num_finished(self) -> int:
        """Number of points whose runs are complete."""
        return sum(point.action == "finished" for point in self.points)

    @property
    def node_hours(self) -> float:
        """Upper bound of the node hours of all points to submit."""
        return sum(point.node_hours for point in self.points)

    @property
    def node_hours_of_one_job(self) -> float:
        """Upper bound of the node hours if one job completes each run."""
        return sum(point.node_hours_of_one_job for point in self.points)

    def record(self) -> None:
        """Record which points belong together, for the comparison of their runs."""
        by_name: dict[SweepRecord, list[SweepPoint]] = {}
        for point in self.points:
            by_name.setdefault(point.record, []).append(point)
        for record, points in by_name.items():
            record.add_sweep([point.fingerprint for point in points], self.swept, points[0].config.sweep.scaling)


def plan_sweep(overrides: Sequence[str], max_parallel: int | None = None) -> SweepPlan:
    """Compose and check every point, and look up the run that was submitted for it before.

    With `max_parallel`, the points share that many job names ("lanes"), and Slurm runs one job per name at a time
    (`--dependency=singleton`). Follow-up jobs wait in their lane as well. Price: a lane that ends early stays empty.

    Raises:
        ConfigError: A point does not compose or fails a check.
    """
    swept = swept_keys(overrides)
    composed = [_compose_point(point) for point in expand(overrides)]
    configs = [config for _, config in composed]
    _check_scale(configs, swept)
    return plan_configs(configs, [words for words, _ in composed], max_parallel, swept)


def plan_configs(
    configs: Sequence[Config],
    combinations: Sequence[Sequence[str]],
    max_parallel: int | None = None,
    swept: Sequence[str] = (),
) -> SweepPlan:
    """Look up the runs that were submitted for composed points before; see `plan_sweep`.

    Args:
        configs: The points.
        combinations: The overrides of each point.
        max_parallel: Jobs at a time.
        swept: The keys that have several values.
    """
    configs = [with_absolute_paths(config) for config in configs]
    previous = _previous_runs(configs)

    points: list[SweepPoint] = []
    num_due = 0
    for config, point in zip(configs, combinations, strict=True):
        fingerprint = _known_fingerprint(config, previous)
        folder, action = previous.get(fingerprint, (None, "new"))
        is_due = action in ("new", "continue")
        if max_parallel is not None and is_due:
            config = _in_lane(config, num_due % max_parallel)
        num_due += is_due
        points.append(
            SweepPoint(config=config, overrides=tuple(point), fingerprint=fingerprint, action=action, folder=folder)
        )
    return SweepPlan(points=tuple(points), swept=tuple(swept))


def _compose_point(point: Sequence[str]) -> tuple[list[str], Config]:
    """Return the overrides and the checked configuration of a point.

    In a weak sweep, the batch of a node is multiplied by the nodes. The product is an override of its own, so that a
    run that is resumed on other nodes keeps its batch.
    """
    config = from_plain(Config, compose_plain(point))
    if config.sweep.scaling != "weak" or config.sweep.batch_per_node is not None:
        check_run(config)
        return list(point), config
    if config.dataplane.batch_schedule:
        raise ConfigError(
            "sweep=weak multiplies dataplane.global_batch_size by job.nodes, but dataplane.batch_schedule has sizes of "
            "its own.\n  Remove the schedule, or use sweep=strong."
        )
    batch = config.dataplane.global_batch_size
    computed = {"sweep.batch_per_node": batch, "dataplane.global_batch_size": batch * config.job.nodes}
    others = [word for word in point if word.partition("=")[0] not in computed]
    words = [*others, *(f"{key}={value}" for key, value in computed.items())]
    return words, compose(words)


def _check_scale(configs: Sequence[Config], swept: Sequence[str]) -> None:
    """Refuse a scaling sweep in which neither nodes nor ranks vary."""
    scaling = configs[0].sweep.scaling
    if scaling != "none" and not set(SCALE_KEYS).intersection(swept):
        raise ConfigError(
            f"sweep={scaling} compares numbers of nodes, but job.nodes has one value, {configs[0].job.nodes}.\n"
            "  Give several, for example job.nodes=1,2,4."
        )


def _in_lane(config: Config, lane: int) -> Config:
    job = replace(config.job, name=f"{config.run.name}.lane{lane}", dependency="singleton")
    return replace(config, job=job)


def _previous_runs(configs: Sequence[Config]) -> dict[str, tuple[RunFolder | None, Action]]:
    """Return the latest run of each fingerprint, and what submitting the sweep does with it."""
    folders: dict[str, RunFolder] = {}
    for folder in sorted({Path(config.run.root) / config.run.name for config in configs}):
        folders.update(SweepRecord(folder).runs())

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


def _known_fingerprint(config: Config, known: Container[str]) -> str:
    """Return the fingerprint of a point, or the one that it had when the default of `dataplane.lanes` was a number."""
    fingerprint = _fingerprint(config)
    if fingerprint in known or config.dataplane.lanes is not None:
        return fingerprint
    earlier = _fingerprint(replace(config, dataplane=replace(config.dataplane, lanes=EARLIER_LANES)))
    return earlier if earlier in known else fingerprint


def _fingerprint(config: Config) -> str:
    """Return a digest of everything that identifies a point: config groups, run name, cluster, ranks and command."""
    plain = to_plain(config)
    identity: dict[str, Any] = {name: plain[name] for name in IDENTITY_GROUPS}
    identity["where"] = [config.run.name, config.cluster.name, config.job.nodes, config.job.ranks_per_node]
    identity["command"] = config.job.command
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()
