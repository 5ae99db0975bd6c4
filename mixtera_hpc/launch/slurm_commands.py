"""Slurm's commands: sbatch, scancel, and one squeue plus one sacct for any number of jobs.

What squeue still lists has not ended, whatever sacct says: a job requeued after a node failure is recorded as NODE_FAIL
and runs again. Where accounting is disabled the batch script's own `exit.json` has to do.
"""

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from mixtera_hpc.errors import LaunchError

__all__ = ["JobInfo", "JobState", "query_jobs", "require_sbatch", "sbatch", "scancel"]

COMMAND_LIMIT_S = 60


class JobState(StrEnum):
    """Slurm's two dozen states, as far as they differ for a user."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    SAVED = "SAVED"
    """Left with 75: state is saved, and there is more to do."""
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMEOUT = "TIMEOUT"
    NODE_FAIL = "NODE_FAIL"
    UNKNOWN = "UNKNOWN"

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self in (JobState.PENDING, JobState.RUNNING)


_STATES: Mapping[str, JobState] = {
    **dict.fromkeys(("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED"), JobState.PENDING),
    **dict.fromkeys(("SPECIAL_EXIT", "RESV_DEL_HOLD"), JobState.PENDING),
    **dict.fromkeys(("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING"), JobState.RUNNING),
    **dict.fromkeys(("STAGE_OUT",), JobState.RUNNING),
    **dict.fromkeys(("FAILED", "OUT_OF_MEMORY", "BOOT_FAIL", "LAUNCH_FAILED", "RECONFIG_FAIL"), JobState.FAILED),
    **dict.fromkeys(("TIMEOUT", "DEADLINE"), JobState.TIMEOUT),
    **dict.fromkeys(("CANCELLED", "PREEMPTED", "REVOKED"), JobState.CANCELLED),
    "COMPLETED": JobState.COMPLETED,
    "NODE_FAIL": JobState.NODE_FAIL,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInfo:
    """What Slurm knows of one job."""

    state: JobState
    reason: str | None = None
    """Why it waits, or Slurm's own word for how it ended."""
    nodes: int | None = None
    elapsed_s: int | None = None
    limit_s: int | None = None
    exit_code: int | None = None


def require_sbatch() -> None:
    """Refuse where no job can be submitted from."""
    if shutil.which("sbatch") is None:
        raise LaunchError(
            "There is no sbatch on this machine, so nothing can be submitted from here.\n  Run on a login node of the "
            "cluster, run here with mixtera-hpc run, or print the script with submit --dry-run."
        )


def sbatch(script: Path) -> str:
    """Submit `script` and return the job's id.

    Raises:
        LaunchError: Slurm refuses, in its own words, with the key to change where it is known.
    """
    require_sbatch()
    done = _run(["sbatch", "--parsable", str(script)])
    if done.returncode:
        refusal = done.stderr.strip().removeprefix("sbatch: error: ")
        raise LaunchError(f"Slurm refused the job: {refusal}{_hint(refusal)}\n  submit --dry-run prints the script.")
    return done.stdout.strip().partition(";")[0]


def scancel(job_ids: Sequence[str]) -> None:
    """End jobs; those that have ended already are no error."""
    if not job_ids:
        return
    done = _run(["scancel", "--quiet", *job_ids])
    if done.returncode and "Invalid job id" not in done.stderr:
        raise LaunchError(f"scancel failed: {done.stderr.strip()}")


def query_jobs(job_ids: Iterable[str]) -> dict[str, JobInfo]:
    """What is known of each job; ids that Slurm does not know (any more) are absent.

    Raises:
        LaunchError: Slurm does not answer.
    """
    ids = sorted(set(job_ids))
    if not ids:
        return {}
    queued = _squeue(ids)
    ended = [i for i in ids if i not in queued or not queued[i].state.active]
    return {**queued, **(_sacct(ended) if ended else {})}


def _squeue(ids: Sequence[str]) -> dict[str, JobInfo]:
    done = _run(["squeue", "--noheader", "--states=all", f"--jobs={','.join(ids)}", "--format=%i|%T|%r|%D|%M|%l"])
    if done.returncode:
        if "Invalid job id" in done.stderr:
            return {}
        raise LaunchError(f"squeue failed: {done.stderr.strip()}")
    infos = {}
    for line in done.stdout.splitlines():
        job_id, state, reason, nodes, elapsed, limit = line.split("|")
        infos[job_id] = JobInfo(
            state=_STATES.get(state, JobState.UNKNOWN),
            reason=None if reason == "None" else reason,
            nodes=int(nodes),
            elapsed_s=_seconds(elapsed),
            limit_s=_seconds(limit),
        )
    return infos


def _sacct(ids: Sequence[str]) -> dict[str, JobInfo]:
    """Empty where accounting is disabled."""
    fields = "JobID,State,ExitCode,NNodes,ElapsedRaw,TimelimitRaw"
    done = _run(
        ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={','.join(ids)}", f"--format={fields}"]
    )
    infos = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        job_id, state, code, nodes, elapsed, limit = line.split("|")
        word = state.split()[0]  # "CANCELLED by 1000"
        exit_code, _, signal = code.partition(":")
        infos[job_id] = JobInfo(
            state=_ended(word, int(exit_code or 0)),
            reason=state if signal in ("", "0") else f"{state} (signal {signal})",
            nodes=int(nodes or 0),
            elapsed_s=int(elapsed or 0),
            limit_s=int(limit) * 60 if limit.isdigit() else None,
            exit_code=int(exit_code or 0),
        )
    return infos


def _ended(word: str, exit_code: int) -> JobState:
    state = _STATES.get(word, JobState.UNKNOWN)
    return JobState.SAVED if state == JobState.FAILED and exit_code == 75 else state


def _seconds(text: str) -> int | None:
    """`[D-][[HH:]MM:]SS` as squeue prints it; None for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not match:
        return None
    days, hours, minutes, seconds = (int(g or 0) for g in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _hint(refusal: str) -> str:
    hints = {
        "account": "job.account",
        "partition": "job.partition",
        "qos": "job.qos",
        "time limit": "job.time",
        "node count": "job.nodes",
        "memory": "job.mem",
        "cpu": "job.cpus_per_rank",
        "gres": "cluster.gpu_request",
    }
    keys = [key for word, key in hints.items() if word in refusal.lower()]
    return f"\n  See {' and '.join(keys)}." if keys else ""


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_LIMIT_S, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise LaunchError(f"There is no {command[0]} on this machine, so Slurm cannot be asked.") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"{command[0]} did not answer within {COMMAND_LIMIT_S} s. Is the Slurm controller up?"
        ) from None
