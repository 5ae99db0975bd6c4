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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mixtera_hpc.config.files.write_errors import explain_write_errors
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.launch.sbatch_script import SbatchJob, escape_percent, render_script
from mixtera_hpc.launch.slurm.slurm_commands import max_array_size, sbatch
from mixtera_hpc.launch.submit import (
    Submitted,
    check_submittable,
    prepare_attempt,
    record_job,
    submit_attempt,
    undo_on_error,
)
from mixtera_hpc.launch.sweep.prepared_point import NOTHING_SUBMITTED, prepared_point
from mixtera_hpc.launch.sweep.sweep_plan import SweepPoint

__all__ = ["submit_point", "submit_points"]

ARRAYS = "arrays"
"""Folder of all arrays, beside the runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """A point whose run folder and attempt are prepared."""

    point: SweepPoint
    folder: RunFolder
    attempt: int


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
    with prepared_point(point) as folder:
        return submit_attempt(folder, point.config)


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
    with ExitStack() as undone_on_error:
        tasks = [undone_on_error.enter_context(_prepared_task(point)) for point in points]
        folder = undone_on_error.enter_context(_written_array(tasks))
        array_id = sbatch(folder / "array.sh", cure="repeat the sweep.")
    return [
        record_job(task.folder, task.attempt, task.point.config, f"{array_id}_{number}")
        for number, task in enumerate(tasks)
    ]


@contextmanager
def _prepared_task(point: SweepPoint) -> Iterator[_Task]:
    """Prepare a point and its next attempt, and undo both if the block fails."""
    with prepared_point(point) as folder:
        attempt = prepare_attempt(folder, point.config)
        with undo_on_error(lambda: shutil.rmtree(folder.attempt(attempt))):
            yield _Task(point=point, folder=folder, attempt=attempt)


@contextmanager
def _written_array(tasks: Sequence[_Task]) -> Iterator[Path]:
    """Write the files of an array, yield their folder, and remove it if the block fails."""
    runs = "".join(f"{task.folder.run_id}/{task.attempt}\n" for task in tasks)
    digest = hashlib.blake2b(runs.encode(), digest_size=8).hexdigest()
    name = f"{datetime.now(UTC).strftime('%Y%m%d-%H%M%S')}-{digest}"
    folder = tasks[0].folder.path.parent.absolute() / ARRAYS / name
    with undo_on_error(lambda: shutil.rmtree(folder, ignore_errors=True)):
        with explain_write_errors(folder, NOTHING_SUBMITTED):
            _write_array(tasks, folder)
        yield folder


def _write_array(tasks: Sequence[_Task], folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, task in enumerate(tasks):
        relative = RunFolder(Path("..", "..", task.folder.run_id))
        (folder / f"{number}.sh").symlink_to(relative.submit_script(task.attempt))
        (folder / f"{number}.out").symlink_to(relative.batch_log(task.attempt))
    (folder / "array.sh").write_text(_array_script(tasks, folder))


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
