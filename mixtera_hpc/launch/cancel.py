"""Cancel a run: its Slurm jobs or its local process, and every attempt that would follow."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.errors import LaunchError
from mixtera_hpc.launch.attempts import is_alive, read_end, read_follow_up, read_start
from mixtera_hpc.launch.slurm.slurm_commands import JobState, query_jobs, scancel

__all__ = ["Cancelled", "cancel_after_save", "cancel_now"]

RECHECK_DELAY_S = 1.0
"""Pause before jobs are listed again, for a follow-up job that was submitted at the same moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """The jobs that were cancelled: Slurm job ids, or the process id of a local run."""

    ended: tuple[str, ...]
    """Ended at once."""
    saving: tuple[str, ...] = ()
    """Asked to save and stop."""


def cancel_now(folder: RunFolder) -> Cancelled:
    """End the run's jobs at once, including a follow-up job that is being submitted at this moment.

    Raises:
        LaunchError: No job or process of the run is waiting or running.
    """
    _request(folder.cancelled)
    jobs = _open_jobs(folder)
    pid = _local_pid(folder)
    _require_any(folder, jobs, pid)

    scancel(list(jobs))
    if pid is not None:
        os.kill(pid, signal.SIGTERM)

    # A batch script may have checked for `cancelled` just before it was written, and submitted the next attempt.
    if jobs:
        time.sleep(RECHECK_DELAY_S)
    late = [job for job in _open_jobs(folder) if job not in jobs]
    scancel(late)
    return Cancelled(ended=(*jobs, *late, *_as_text(pid)))


def cancel_after_save(folder: RunFolder) -> Cancelled:
    """Ask running jobs to save and stop, end waiting jobs, and let nothing follow.

    Raises:
        LaunchError: No job or process of the run is waiting or running.
    """
    jobs = _open_jobs(folder)
    pid = _local_pid(folder)
    _require_any(folder, jobs, pid)

    _request(folder.cancelled)
    _request(folder.stop_request)
    waiting = [job for job, state in jobs.items() if state == JobState.PENDING]
    scancel(waiting)
    running = [job for job in jobs if job not in waiting]
    return Cancelled(ended=tuple(waiting), saving=(*running, *_as_text(pid)))


def _require_any(folder: RunFolder, jobs: dict[str, JobState], pid: int | None) -> None:
    if not jobs and pid is None:
        raise LaunchError(
            f"No job or process of {folder.run_id} is waiting or running.\n  See mixtera-hpc status {folder.path}"
        )


def _open_jobs(folder: RunFolder) -> dict[str, JobState]:
    """Return the jobs of all attempts that wait or run in Slurm, and the job that waits for the end of the newest."""
    ids = []
    attempts = folder.attempts()
    for attempt in attempts:
        start = read_start(folder, attempt)
        if start and start.job_id and read_end(folder, attempt) is None:
            ids.append(start.job_id)
    if follow_up := read_follow_up(folder, max(attempts, default=0)):
        ids.append(follow_up)
    return {job: info.state for job, info in query_jobs(ids).items() if info.state.active}


def _local_pid(folder: RunFolder) -> int | None:
    """Return the process id of rank 0 if the newest attempt is a local one that runs on this machine."""
    attempt = max(folder.attempts(), default=0)
    start = read_start(folder, attempt)
    if start is None or read_end(folder, attempt) is not None or not is_alive(start):
        return None
    return start.pid


def _as_text(pid: int | None) -> tuple[str, ...]:
    return () if pid is None else (str(pid),)


def _request(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.touch()
