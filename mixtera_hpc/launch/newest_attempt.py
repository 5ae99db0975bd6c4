"""The newest attempt of a run: who started it, and whether it has ended so that another one may begin."""

import time
from datetime import UTC, datetime
from pathlib import Path

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.errors import LaunchError
from mixtera_hpc.launch.attempts import JobRecord, is_own_program, read_start
from mixtera_hpc.launch.claim import is_renewed
from mixtera_hpc.launch.status import JUST_SUBMITTED_S, RunStatus, run_statuses

__all__ = ["check_ended", "check_trained_by_launcher", "was_submitted"]


def check_trained_by_launcher(folder: RunFolder) -> None:
    """Refuse a run that only a training program of the user's can continue."""
    if is_own_program(folder):
        raise LaunchError(
            f"{folder.run_id} belongs to a training program of yours, which opened {folder.path} by itself.\n"
            "  Start that program again, and let it load the state that it saved (DataPlane.load_state_dict). To "
            "change its data first, run this command with the change, e.g. --change-seq-len N, and without mpiexec, "
            "--here, --submit and --wait."
        )


def check_ended(folder: RunFolder) -> int:
    """Return the newest attempt of a run that has ended, for `create_attempt(after=…)`; refuse an active run.

    Raises:
        LaunchError: a job or process of the run is pending or running, or another process is starting an attempt.
    """
    newest = max(folder.attempts(), default=0)
    start = read_start(folder, newest)
    status = run_statuses([folder], datetime.now(UTC))[0]
    if newest and start is None and _age_s(folder.attempt(newest)) < JUST_SUBMITTED_S:
        raise LaunchError(
            f"Attempt {newest} of {folder.run_id} is being started by another process.\n"
            f"  See mixtera-hpc status {folder.path}"
        )
    if status.may_be_active:
        _refuse_unknown(folder, status, start)
    if status.state.active:
        where = f"job {status.job_id}" if status.job_id else "a process of this machine"
        raise LaunchError(
            f"Attempt {status.attempt} of {folder.run_id} is {status.state} as {where}. A second attempt would "
            f"overwrite its files.\n  End it first: mixtera-hpc cancel {folder.path} --after-save"
        )
    return newest


def _refuse_unknown(folder: RunFolder, status: RunStatus, start: JobRecord | None) -> None:
    """Raise unless the counter of a local run on another host shows that it has ended."""
    if start is not None and start.kind == "local":
        if is_renewed(folder, status.attempt or 0):
            raise LaunchError(
                f"Attempt {status.attempt} of {folder.run_id} is running on host {start.host}, and a run has one "
                f"writer.\n  End it there first: mixtera-hpc cancel {folder.path} --after-save"
            )
        return
    raise LaunchError(
        f"It is not known whether attempt {status.attempt} of {folder.run_id} has ended: {status.reason}\n  Two jobs "
        "in one folder would damage the run, so nothing was started. Repeat the command when Slurm answers."
    )


def was_submitted(folder: RunFolder) -> bool:
    """Return True if the newest attempt was a Slurm job."""
    start = read_start(folder, max(folder.attempts(), default=0))
    return start is not None and start.kind == "slurm"


def _age_s(path: Path) -> float:
    return time.time() - path.stat().st_mtime
