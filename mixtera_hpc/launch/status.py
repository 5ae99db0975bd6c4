"""Report the state of runs: from recorded ends where there are any, and from one query to Slurm for all other runs."""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mixtera_hpc.config.files.json_text import parse_json
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.errors import LaunchError
from mixtera_hpc.launch.attempts import ExitRecord, JobRecord, is_alive, read_end, read_follow_up, read_start
from mixtera_hpc.launch.slurm.slurm_commands import JobInfo, JobState, query_jobs
from mixtera_hpc.launch.slurm.srun_reports import first_failed_rank, lost_node, mpi_problem

__all__ = ["JUST_SUBMITTED_S", "RunStatus", "last_step", "run_statuses"]

JUST_SUBMITTED_S = 60
"""Slurm's accounting lags behind. A job that is younger than this and that Slurm does not know counts as pending."""

_STATE_OF_EXIT_CODE = {0: JobState.COMPLETED, 75: JobState.SAVED, 130: JobState.CANCELLED}
"""Every other exit code is a failure."""

SILENT_MIXTURE = "the mixture is dynamic, but no losses are recorded"
"""Reason that is given for a run whose trainer does not call `record`."""

TAIL_BYTES = 65_536
"""Bytes of the metrics file that are read to find its last complete line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """One line of `mixtera-hpc status`; the field names are those of `--json`."""

    run_id: str
    name: str
    state: JobState
    reason: str | None = None
    attempt: int | None = None
    job_id: str | None = None
    nodes: int | None = None
    elapsed_s: int | None = None
    limit_s: int | None = None
    step: int | None = None
    """The last step of which metrics were recorded; the first step of a run is 0."""
    steps_done: int | None = None
    """Number of finished steps, as the logs count them: `step` + 1."""
    num_steps: int | None = None
    """Number of steps of the whole run."""
    tokens_per_s: float | None = None
    last_log_age_s: int | None = None
    """Seconds since the newest attempt last wrote a log line or a metric."""
    stalled: Sequence[Mapping[str, Any]] | None = None
    """The ranks that keep the others waiting, with node, stage, step, shard and rows; None if the run gets on."""
    folder: str
    may_be_active: bool = False
    """True if nobody can tell whether the run waits or runs: Slurm does not answer, or it runs on another host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _NewestAttempt:
    folder: RunFolder
    number: int
    """0 if the run has no attempt."""
    start: JobRecord | None
    end: ExitRecord | None
    follow_up: str | None
    """Id of the job that waits for the end of this attempt."""

    @property
    def open_jobs(self) -> list[str]:
        """Ids of the jobs that may wait or run."""
        if self.end is not None and self.end.exit_code == 0:
            return []
        own = self.start.job_id if self.start is not None and self.end is None else None
        return [job for job in (own, self.follow_up) if job]


@dataclass(frozen=True, slots=True, kw_only=True)
class _SlurmAnswer:
    jobs: Mapping[str, JobInfo]
    """Job id → facts of the job; jobs that Slurm does not know are absent."""
    problem: str | None = None
    """The reason for which Slurm could not be queried."""


def run_statuses(folders: Sequence[RunFolder], now: datetime) -> list[RunStatus]:
    """Return the state of each run's newest attempt, with at most one squeue and one sacct for all of them."""
    attempts = [_newest(folder) for folder in folders]
    try:
        answer = _SlurmAnswer(jobs=query_jobs([job for attempt in attempts for job in attempt.open_jobs]))
    except LaunchError as error:
        answer = _SlurmAnswer(jobs={}, problem=str(error))
    return [_status(attempt, answer, now) for attempt in attempts]


def last_step(folder: RunFolder) -> Mapping[str, Any]:
    """Return the last complete line of `metrics/steps.jsonl`; empty if there is none."""
    return _last_event(folder.metric("steps"))


def _last_event(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]  # What follows the last end of line is incomplete.
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            event = parse_json(line)
        except ValueError:
            continue
        return event if isinstance(event, dict) else {}
    return {}


def _newest(folder: RunFolder) -> _NewestAttempt:
    number = max(folder.attempts(), default=0)
    return _NewestAttempt(
        folder=folder,
        number=number,
        start=read_start(folder, number),
        end=read_end(folder, number),
        follow_up=read_follow_up(folder, number),
    )


def _status(attempt: _NewestAttempt, answer: _SlurmAnswer, now: datetime) -> RunStatus:
    folder = attempt.folder
    start = attempt.start
    info = _info(attempt, answer, now)
    job_id = start.job_id if start else None
    number = attempt.number or None
    waiting = answer.jobs.get(attempt.follow_up or "")
    if not info.state.active and waiting is not None and waiting.state.active:
        # The batch script of the next attempt makes its folder, so the attempt has a number but no record yet.
        last_end = f"attempt {number}: {info.state}" + (f", {info.reason}" if info.reason else "")
        info = replace(waiting, reason="; ".join(filter(None, (waiting.reason, last_end))))
        job_id = attempt.follow_up
        number = attempt.number + 1
    nodes = info.nodes
    limit_s = info.limit_s
    if start is not None:
        nodes = start.nodes if nodes is None else nodes
        limit_s = start.limit_s if limit_s is None else limit_s

    event = last_step(folder)
    reason = info.reason
    # The data plane notes it at every chunk, if the mixture learns.
    chunk = _last_event(folder.metric("mixture"))
    if chunk.get("hears_losses") is False:
        reason = "; ".join(filter(None, (reason, SILENT_MIXTURE)))
    if chunk.get("problem"):
        failed = f"the mixing algorithm failed {chunk.get('num_failed_updates')} times, old weights stay: "
        reason = "; ".join(filter(None, (reason, f"{failed}{chunk['problem']}")))
    stall = _stall(attempt)
    if stall:
        reason = "; ".join(filter(None, (stall.get("message"), reason)))
    return RunStatus(
        run_id=folder.run_id,
        name=folder.name,
        state=info.state,
        reason=reason,
        attempt=number,
        job_id=job_id,
        nodes=nodes,
        elapsed_s=info.elapsed_s,
        limit_s=limit_s,
        step=event.get("step"),
        steps_done=_plus_one(event.get("step")),
        num_steps=_last_event(folder.metric("attempts")).get("num_steps") or None,
        tokens_per_s=event.get("tokens_per_s"),
        last_log_age_s=_log_age_s(attempt, now),
        stalled=stall.get("ranks"),
        folder=str(folder.path),
        may_be_active=_may_be_active(attempt, answer, info),
    )


def _plus_one(number: Any) -> int | None:
    return number + 1 if isinstance(number, int) else None


def _may_be_active(attempt: _NewestAttempt, answer: _SlurmAnswer, info: JobInfo) -> bool:
    if info.state.active:
        return False
    if answer.problem is not None and attempt.open_jobs:
        return True
    start = attempt.start
    is_local = start is not None and start.kind != "slurm" and attempt.end is None
    return is_local and info.state == JobState.UNKNOWN


def _info(attempt: _NewestAttempt, answer: _SlurmAnswer, now: datetime) -> JobInfo:
    """Combine what the attempt recorded, what Slurm reports, and whether a local process lives."""
    if attempt.start is None:
        return JobInfo(state=JobState.UNKNOWN, reason="never started")
    if attempt.end is not None:
        return _ended_info(attempt, attempt.end)

    age_s = int((now - datetime.fromisoformat(attempt.start.submitted)).total_seconds())
    if attempt.start.kind in ("local", "program"):
        return _local_info(attempt.start, age_s, _failure(attempt))
    if info := answer.jobs.get(attempt.start.job_id or ""):
        failure = None if info.state.active or info.state == JobState.COMPLETED else _failure(attempt)
        return replace(info, reason=f"{failure} ({info.reason})") if failure else info
    if answer.problem is not None:
        return JobInfo(state=JobState.UNKNOWN, reason=answer.problem)
    if age_s < JUST_SUBMITTED_S:
        return JobInfo(state=JobState.PENDING, reason="just submitted")
    return JobInfo(state=JobState.UNKNOWN, reason="Slurm does not know this job any more")


def _ended_info(attempt: _NewestAttempt, end: ExitRecord) -> JobInfo:
    state = _STATE_OF_EXIT_CODE.get(end.exit_code, JobState.FAILED)
    reason = None
    if state == JobState.FAILED:
        reason = _failure(attempt) or f"exit code {end.exit_code}"
    return JobInfo(state=state, reason=reason, elapsed_s=end.elapsed_s, exit_code=end.exit_code)


def _failure(attempt: _NewestAttempt) -> str | None:
    """Return which rank failed first; None if that is not known."""
    try:
        failure = parse_json(attempt.folder.failure(attempt.number).read_text())
    except (OSError, ValueError):
        failure = None
    if isinstance(failure, dict):
        who = f"rank {failure.get('rank')} on {failure.get('host')}: " if failure.get("rank") is not None else ""
        return f"{who}{failure.get('reason')}"
    for find in (mpi_problem, lost_node):
        if problem := find(attempt.folder, attempt.number):
            return problem
    # A program of the user's ends without our report, but srun names the rank.
    failed = first_failed_rank(attempt.folder, attempt.number)
    return str(failed) if failed else None


def _stall(attempt: _NewestAttempt) -> Mapping[str, Any]:
    """Return what the watchdog wrote about a run that does not get on; empty if it does, or has ended."""
    if attempt.end is not None or attempt.folder.failure(attempt.number).exists():
        return {}
    try:
        stall = parse_json(attempt.folder.stall_report(attempt.number).read_bytes())
    except (OSError, ValueError):
        return {}
    return stall if isinstance(stall, dict) else {}


def _local_info(start: JobRecord, age_s: int, failure: str | None) -> JobInfo:
    if start.host != socket.gethostname():
        return JobInfo(state=JobState.UNKNOWN, reason=f"a local run on host {start.host}")
    if is_alive(start):
        return JobInfo(state=JobState.RUNNING, elapsed_s=age_s)
    return JobInfo(state=JobState.FAILED, reason=failure or "its processes are gone")


def _log_age_s(attempt: _NewestAttempt, now: datetime) -> int | None:
    logs = attempt.folder.logs(attempt.number)
    files = [*logs.glob("*.out"), *logs.glob("*.err"), attempt.folder.metric("steps")]
    stats = [path.stat() for path in files if path.is_file()]
    times = [stat.st_mtime for stat in stats if stat.st_size]
    if not times:
        return None
    return max(0, int((now - datetime.fromtimestamp(max(times), UTC)).total_seconds()))
