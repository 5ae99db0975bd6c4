"""Ending a run, with everything that would follow it."""

import os
import signal
import time
from dataclasses import dataclass

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.errors import LaunchError
from mixtera_hpc.launch.attempts import is_alive, read_end, read_start
from mixtera_hpc.launch.slurm_commands import JobState, query_jobs, scancel

__all__ = ["Cancelled", "cancel_after_save", "cancel_now"]

SECOND_LOOK_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """What was done."""

    ended: tuple[str, ...]
    """Jobs (or process numbers) told to end now."""
    saving: tuple[str, ...] = ()
    """Those that save first."""


def cancel_now(folder: RunFolder) -> Cancelled:
    """End the run's jobs now, a follow-up submitted this very moment included.

    Raises:
        LaunchError: nothing of the run waits or runs.
    """
    _mark(folder, "cancelled")
    jobs, local = _open_jobs(folder), _local_pid(folder)
    if not jobs and local is None:
        raise LaunchError(f"Nothing of {folder.run_id} waits or runs.")
    scancel(list(jobs))
    if local is not None:
        os.kill(local, signal.SIGTERM)
    time.sleep(SECOND_LOOK_S if jobs else 0)  # A batch script may just have passed the mark.
    late = [job for job in _open_jobs(folder) if job not in jobs]
    scancel(late)
    return Cancelled(ended=(*jobs, *late, *([str(local)] if local is not None else [])))


def cancel_after_save(folder: RunFolder) -> Cancelled:
    """Ask running jobs to save and leave; end waiting ones; nothing follows.

    Raises:
        LaunchError: nothing of the run waits or runs.
    """
    jobs, local = _open_jobs(folder), _local_pid(folder)
    if not jobs and local is None:
        raise LaunchError(f"Nothing of {folder.run_id} waits or runs.")
    _mark(folder, "cancelled")
    _mark(folder, "stop")
    waiting = [job for job, state in jobs.items() if state == JobState.PENDING]
    scancel(waiting)
    running = [job for job in jobs if job not in waiting] + ([str(local)] if local is not None else [])
    return Cancelled(ended=tuple(waiting), saving=tuple(running))


def _open_jobs(folder: RunFolder) -> dict[str, JobState]:
    """Jobs of any attempt that Slurm still waits for or runs."""
    ids = []
    for attempt in folder.attempts():
        start = read_start(folder, attempt)
        if start and start.job_id and read_end(folder, attempt) is None:
            ids.append(start.job_id)
    return {job: info.state for job, info in query_jobs(ids).items() if info.state.active}


def _local_pid(folder: RunFolder) -> int | None:
    attempt = max(folder.attempts(), default=0)
    start = read_start(folder, attempt) if attempt else None
    ended = start is None or read_end(folder, attempt) is not None
    return start.pid if start is not None and not ended and is_alive(start) else None


def _mark(folder: RunFolder, wish: str) -> None:
    folder.control.mkdir(exist_ok=True)
    (folder.control / wish).touch()
