"""Call Slurm's commands: sbatch, scancel, and one squeue plus one sacct for any number of jobs.

squeue wins over sacct: a job that squeue lists as active has not ended. After a node failure, sacct records a requeued
job as NODE_FAIL although it runs again. Where accounting is disabled, only the batch script's `exit.json` is left.
"""

import getpass
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from mixtera_hpc.errors import LaunchError

__all__ = [
    "JobInfo",
    "JobState",
    "SlurmTimeoutError",
    "SubmissionUnknownError",
    "max_array_size",
    "query_jobs",
    "require_sbatch",
    "sbatch",
    "scancel",
]

COMMAND_LIMIT_S = 60
RETRY_DELAYS_S = (2.0, 8.0)
"""Pauses between calls of sbatch that fail for a moment."""

_TRANSIENT = (
    *("timed out", "did not answer", "unable to contact", "connection refused", "communication connection failure"),
    *("temporarily", "zero bytes", "try again", "transmission or receive"),
)
"""Words in errors of sbatch after which the same job may be accepted."""


class SubmissionUnknownError(LaunchError):
    """An error after which a job may be in Slurm's queue."""


class SlurmTimeoutError(LaunchError):
    """A command of Slurm that did not answer in time."""


class JobState(StrEnum):
    """The states that differ for a user; Slurm has two dozen."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    SAVED = "SAVED"
    """Ended with exit code 75: the state is saved and the run is not finished."""
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMEOUT = "TIMEOUT"
    NODE_FAIL = "NODE_FAIL"
    UNKNOWN = "UNKNOWN"

    @property
    def active(self) -> bool:
        """True if the job waits or runs."""
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

_KEY_OF_WORD: Mapping[str, str] = {
    "account": "job.account",
    "partition": "job.partition",
    "qos": "job.qos",
    "time limit": "job.time",
    "node count": "job.nodes",
    "memory": "job.mem",
    "cpu": "job.cpus_per_rank",
    "gres": "cluster.gpu_request",
}
"""Words in sbatch's refusals, and the config key that each one is about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInfo:
    """The facts that Slurm reports about one job."""

    state: JobState
    reason: str | None = None
    """The reason why the job waits, or Slurm's own name for its end."""
    nodes: int | None = None
    elapsed_s: int | None = None
    limit_s: int | None = None
    exit_code: int | None = None


def require_sbatch() -> None:
    """Raise unless jobs can be submitted from this machine.

    Raises:
        LaunchError: There is no sbatch.
    """
    if shutil.which("sbatch") is None:
        raise LaunchError(
            "sbatch was not found, so no job can be submitted from this machine.\n  Submit from a login node of the "
            "cluster, train here with mixtera-hpc run, or print the script with submit --dry-run."
        )


def sbatch(script: Path, *, cure: str | None = None) -> str:
    """Submit `script` and return the job id, or that of the array. A transient error of Slurm is tried again.

    After an error that does not say whether Slurm accepted the job, the job is looked up in the queue by its script, so
    that no script is submitted twice.

    Args:
        script: The batch script.
        cure: What the user should do if Slurm may have accepted the job, but it is not in the queue. None: resume the
            run that the script belongs to.

    Raises:
        SubmissionUnknownError: Slurm may have accepted the job, and it does not answer now.
        LaunchError: Slurm refuses the job. The message quotes Slurm and names the config key to change, if it is known.
    """
    require_sbatch()
    for delay_s in (*RETRY_DELAYS_S, None):
        problem = _try_sbatch(script, cure)
        if problem.job_id is not None:
            return problem.job_id
        if not problem.is_transient or delay_s is None:
            break
        time.sleep(delay_s)
    refusal = problem.error
    raise LaunchError(f"Slurm refused the job: {refusal}{_hint(refusal)}\n  Print the script with submit --dry-run.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _SbatchResult:
    """One call of sbatch."""

    job_id: str | None = None
    error: str = ""
    is_transient: bool = False


def _try_sbatch(script: Path, cure: str | None) -> _SbatchResult:
    try:
        done = _run(["sbatch", "--parsable", str(script)])
        error = done.stderr.strip().removeprefix("sbatch: error: ")
        if not done.returncode:
            return _SbatchResult(job_id=done.stdout.strip().partition(";")[0])
    except SlurmTimeoutError as timeout:
        error = str(timeout)
    if not any(words in error.lower() for words in _TRANSIENT):
        return _SbatchResult(error=error)
    try:
        job_id = _queued_job(script)
    except LaunchError as unknown:
        raise SubmissionUnknownError(
            f"sbatch failed with {error!r}, and the queue cannot be read, so the job may or may not wait there.\n"
            f"  When Slurm answers again, look for {script} with squeue --me --format='%i %o'. Without a job,\n"
            f"  {cure or f'use mixtera-hpc resume {script.parents[2]}'}"
        ) from unknown
    return _SbatchResult(job_id=job_id, error=error, is_transient=True)


def _queued_job(script: Path) -> str | None:
    """Return the id of the queued job that `script` started; None if there is none."""
    done = _run(["squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%i|%o"])
    if done.returncode:
        raise LaunchError(f"squeue failed: {done.stderr.strip()}")
    for line in done.stdout.splitlines():
        job_id, _, command = line.partition("|")
        if command == str(script):
            return job_id.partition("_")[0]  # Tasks of an array are named ARRAY_TASK.
    return None


def max_array_size() -> int:
    """Return the largest number of tasks of a job array; 1 if Slurm has no arrays, or does not say.

    Task numbers begin with 0, and Slurm accepts numbers below its `MaxArraySize`.
    """
    try:
        done = _run(["scontrol", "show", "config"])
    except LaunchError:
        return 1
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", done.stdout, re.MULTILINE)
    return max(int(match.group(1)), 1) if match else 1


def scancel(job_ids: Sequence[str]) -> None:
    """End jobs. A job that has already ended is not an error.

    Raises:
        LaunchError: scancel fails for another reason.
    """
    if not job_ids:
        return
    done = _run(["scancel", "--quiet", *job_ids])
    if done.returncode and "Invalid job id" not in done.stderr:
        raise LaunchError(f"scancel failed: {done.stderr.strip()}")


def query_jobs(job_ids: Iterable[str]) -> dict[str, JobInfo]:
    """Return what Slurm reports about each job; jobs that Slurm does not know, or has forgotten, are absent.

    Raises:
        LaunchError: Slurm does not answer.
    """
    ids = sorted(set(job_ids))
    if not ids:
        return {}
    queued = _squeue(ids)
    not_active = [i for i in ids if i not in queued or not queued[i].state.active]
    if not not_active:
        return queued
    return {**queued, **_sacct(not_active)}


def _squeue(ids: Sequence[str]) -> dict[str, JobInfo]:
    done = _run(
        ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(ids)}", "--format=%i|%T|%r|%D|%M|%l"]
    )
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
    """Return an empty dictionary where accounting is disabled."""
    fields = "JobID,State,ExitCode,NNodes,ElapsedRaw,TimelimitRaw"
    jobs = f"--jobs={','.join(ids)}"
    done = _run(["sacct", "--noheader", "--allocations", "--parsable2", jobs, f"--format={fields}"])
    if done.returncode:
        return {}

    infos = {}
    for line in done.stdout.splitlines():
        job_id, state, code, nodes, elapsed, limit = line.split("|")
        exit_code, _, signal = code.partition(":")
        reason = state if signal in ("", "0") else f"{state} (signal {signal})"
        infos[job_id] = JobInfo(
            state=_final_state(state, int(exit_code or 0)),
            reason=reason,
            nodes=int(nodes or 0),
            elapsed_s=int(elapsed or 0),
            limit_s=int(limit) * 60 if limit.isdigit() else None,
            exit_code=int(exit_code or 0),
        )
    return infos


def _final_state(text: str, exit_code: int) -> JobState:
    first_word = text.split()[0]  # As in "CANCELLED by 1000".
    state = _STATES.get(first_word, JobState.UNKNOWN)
    return JobState.SAVED if state == JobState.FAILED and exit_code == 75 else state


def _seconds(text: str) -> int | None:
    """Parse squeue's `[D-][HH:]MM:SS`; return None for UNLIMITED and other words."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not match:
        return None
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _hint(refusal: str) -> str:
    keys = [key for word, key in _KEY_OF_WORD.items() if word in refusal.lower()]
    return f"\n  See {' and '.join(keys)}." if keys else ""


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_LIMIT_S, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise LaunchError(
            f"{command[0]} was not found, so Slurm cannot be queried.\n  Use a login node of the cluster."
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmTimeoutError(
            f"{command[0]} did not answer within {COMMAND_LIMIT_S} s. Is the Slurm controller up?"
        ) from None
