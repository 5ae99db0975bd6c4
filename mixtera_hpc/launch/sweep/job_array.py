"""Submit the points of a sweep: those of one shape as tasks of a job array, the others as single jobs.

Slurm gives all tasks of an array the same resources, so points belong to one array if their `#SBATCH` lines are equal.
A task executes the batch script of its run, as a single job would. The follow-up job of a task is a single job that
waits for this task only (`afternotok:ARRAY_TASK`), so runs continue by themselves in the same way.

Files of an array, `<runs>/<name>/arrays/<time>-<digest>/`: `array.sh`, and for each task `N.sh` and `N.out`, which are
links to the script and the batch log of its run.
"""

import hashlib
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from mixtera_hpc.config.convert import to_plain
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.launch.attempts import JobRecord, record_start
from mixtera_hpc.launch.prepare import prepare_run, replace_config
from mixtera_hpc.launch.sbatch_script import SbatchJob, escape_percent, render_script
from mixtera_hpc.launch.slurm.slurm_commands import SubmissionUnknownError, max_array_size, sbatch
from mixtera_hpc.launch.submit import Submitted, check_submittable, prepare_attempt, submit_attempt
from mixtera_hpc.launch.sweep.sweep_plan import SweepPoint

__all__ = ["prepare_point", "submit_point", "submit_points"]

ARRAYS = "arrays"
"""Folder of all arrays, beside the runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """A point whose run folder and attempt are prepared."""

    point: SweepPoint
    folder: RunFolder
    attempt: int

    def discard(self) -> None:
        """Remove the prepared attempt, or the whole run folder if the run is new."""
        shutil.rmtree(self.folder.path if self.point.folder is None else self.folder.attempt(self.attempt))


def submit_points(points: Sequence[SweepPoint]) -> Iterator[Submitted]:
    """Submit points that are due, and yield each one's job.

    Raises:
        LaunchError: See `submit_run`.
    """
    limit = max_array_size() if len(points) > 1 else 1
    for same_shape in _by_shape(points):
        for first in range(0, len(same_shape), limit):
            group = same_shape[first : first + limit]
            if len(group) == 1:
                yield submit_point(group[0])
            else:
                yield from _submit_array(group)


def submit_point(point: SweepPoint) -> Submitted:
    """Submit one point that is due as a single job, and record it.

    Raises:
        LaunchError: See `submit_run`.
    """
    check_submittable(point.config)
    folder = prepare_point(point)
    try:
        return submit_attempt(folder, point.config)
    except SubmissionUnknownError:
        raise  # The job may run, and then it needs its folder.
    except BaseException:
        if point.folder is None:
            shutil.rmtree(folder.path)
        raise


def prepare_point(point: SweepPoint) -> RunFolder:
    """Create and record the run folder of a new point, or replace the configuration in the folder of a known one."""
    if point.folder is None:
        folder = prepare_run(point.config, point.overrides, datetime.now(UTC))
        point.record.add_run(point.fingerprint, folder.run_id, point.overrides)
        return folder
    config = replace(point.config, run=replace(point.config.run, id=point.folder.run_id))
    replace_config(point.folder, to_plain(config), point.overrides)
    return point.folder


def _by_shape(points: Sequence[SweepPoint]) -> list[list[SweepPoint]]:
    """Return the points in groups with equal `#SBATCH` lines, in order of their first point."""
    groups: dict[tuple[str, ...], list[SweepPoint]] = {}
    for point in points:
        groups.setdefault(tuple(_shape(point)), []).append(point)
    return list(groups.values())


def _shape(point: SweepPoint) -> list[str]:
    """Return the `#SBATCH` lines of a point, without the path of its log."""
    lines = render_script(SbatchJob(config=point.config)).splitlines()
    return [line for line in lines if line.startswith("#SBATCH") and not line.startswith("#SBATCH --output=")]


def _submit_array(points: Sequence[SweepPoint]) -> list[Submitted]:
    check_submittable(points[0].config)
    tasks: list[_Task] = []
    folder: Path | None = None
    try:
        for point in points:
            tasks.append(_prepared(point))
        folder = _write_array(tasks)
        array_id = sbatch(folder / "array.sh", cure="repeat the sweep.")
    except SubmissionUnknownError:
        raise  # The tasks may run, and then they need their folders.
    except BaseException:
        for task in tasks:
            task.discard()
        if folder is not None:
            shutil.rmtree(folder)
        raise
    return [_recorded(task, f"{array_id}_{number}") for number, task in enumerate(tasks)]


def _prepared(point: SweepPoint) -> _Task:
    folder = prepare_point(point)
    try:
        return _Task(point=point, folder=folder, attempt=prepare_attempt(folder, point.config))
    except BaseException:
        if point.folder is None:
            shutil.rmtree(folder.path)
        raise


def _recorded(task: _Task, job_id: str) -> Submitted:
    record_start(task.folder, task.attempt, JobRecord.slurm(task.point.config, job_id))
    return Submitted(folder=task.folder, attempt=task.attempt, job_id=job_id)


def _write_array(tasks: Sequence[_Task]) -> Path:
    """Write the files of an array and return their folder."""
    runs = "".join(f"{task.folder.run_id}/{task.attempt}\n" for task in tasks)
    digest = hashlib.blake2b(runs.encode(), digest_size=2).hexdigest()
    name = f"{datetime.now(UTC).strftime('%Y%m%d-%H%M%S')}-{digest}"
    folder = tasks[0].folder.path.parent.absolute() / ARRAYS / name
    folder.mkdir(parents=True)
    for number, task in enumerate(tasks):
        to_run = Path("..", "..", task.folder.run_id)
        relative = RunFolder(to_run)
        (folder / f"{number}.sh").symlink_to(relative.submit_script(task.attempt))
        (folder / f"{number}.out").symlink_to(relative.batch_log(task.attempt))
    (folder / "array.sh").write_text(_array_script(tasks, folder))
    return folder


def _array_script(tasks: Sequence[_Task], folder: Path) -> str:
    """Return the script of an array, whose tasks execute the scripts of their runs."""
    point = tasks[0].point
    # Points that share a lane run one after the other, as single jobs with one name and this dependency do.
    throttle = "%1" if point.config.job.dependency == "singleton" else ""
    lines = [
        "#!/bin/bash",
        *_shape(point),
        f"#SBATCH --array=0-{len(tasks) - 1}{throttle}",
        f"#SBATCH --output={shlex.quote(f'{escape_percent(folder)}/%a.out')}",
        "",
        f'exec bash {shlex.quote(str(folder))}/"$SLURM_ARRAY_TASK_ID".sh',
    ]
    return "\n".join(lines) + "\n"
