"""What became of runs: recorded ends first, then one question to Slurm for all that is left."""

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.errors import LaunchError
from mixtera_hpc.launch.attempts import AttemptEnd, AttemptStart, is_alive, read_end, read_start
from mixtera_hpc.launch.slurm_commands import JobInfo, JobState, query_jobs

__all__ = ["JUST_SUBMITTED_S", "RunStatus", "last_step", "run_statuses"]

JUST_SUBMITTED_S = 60
"""Slurm's accounting lags behind; a job younger than this that it does not know is on its way."""


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
    tokens_per_s: float | None = None
    last_log_age_s: int | None = None
    """Seconds since the last line of a log or metric of the newest attempt."""
    folder: str


@dataclass(frozen=True, slots=True)
class _Attempt:
    folder: RunFolder
    number: int | None
    start: AttemptStart | None
    end: AttemptEnd | None


def run_statuses(folders: Sequence[RunFolder], now: datetime) -> list[RunStatus]:
    """The newest attempt of every run, at most one squeue and one sacct for all of them."""
    attempts = [_newest(folder) for folder in folders]
    open_ids = [a.start.job_id for a in attempts if a.end is None and a.start is not None and a.start.job_id]
    try:
        infos, trouble = query_jobs(open_ids), None
    except LaunchError as error:
        infos, trouble = {}, str(error)
    return [_status(attempt, infos, trouble, now) for attempt in attempts]


def last_step(folder: RunFolder) -> Mapping[str, Any]:
    """The last complete line of `metrics/steps.jsonl`; empty when there is none."""
    try:
        with (folder.metrics / "steps.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        return event if isinstance(event, dict) else {}
    return {}


def _newest(folder: RunFolder) -> _Attempt:
    number = max(folder.attempts(), default=None)
    if number is None:
        return _Attempt(folder, None, None, None)
    return _Attempt(folder, number, read_start(folder, number), read_end(folder, number))


def _status(attempt: _Attempt, infos: Mapping[str, JobInfo], trouble: str | None, now: datetime) -> RunStatus:
    folder, start = attempt.folder, attempt.start
    info = _info(attempt, infos, trouble, now)
    event = last_step(folder)
    return RunStatus(
        run_id=folder.run_id,
        name=folder.name,
        state=info.state,
        reason=info.reason,
        attempt=attempt.number,
        job_id=start.job_id if start else None,
        nodes=info.nodes if info.nodes is not None else (start.nodes if start else None),
        elapsed_s=info.elapsed_s,
        limit_s=info.limit_s if info.limit_s is not None else (start.limit_s if start else None),
        step=event.get("step"),
        tokens_per_s=event.get("tokens_per_s"),
        last_log_age_s=_log_age(attempt, now),
        folder=str(folder.path),
    )


def _info(attempt: _Attempt, infos: Mapping[str, JobInfo], trouble: str | None, now: datetime) -> JobInfo:
    if attempt.number is None or attempt.start is None:
        return JobInfo(state=JobState.UNKNOWN, reason="never started")
    if attempt.end is not None:
        return _recorded(attempt, attempt.number, attempt.end)
    age_s = int((now - datetime.fromisoformat(attempt.start.submitted)).total_seconds())
    if attempt.start.kind == "local":
        return _local(attempt.start, age_s, _failure(attempt.folder, attempt.number))
    if info := infos.get(attempt.start.job_id or ""):
        return info
    if trouble is not None:
        return JobInfo(state=JobState.UNKNOWN, reason=trouble)
    if age_s < JUST_SUBMITTED_S:
        return JobInfo(state=JobState.PENDING, reason="just submitted")
    return JobInfo(state=JobState.UNKNOWN, reason="Slurm does not know this job any more")


def _recorded(attempt: _Attempt, number: int, end: AttemptEnd) -> JobInfo:
    states = {0: JobState.COMPLETED, 75: JobState.SAVED, 130: JobState.CANCELLED}
    state = states.get(end.exit_code, JobState.FAILED)
    reason = _failure(attempt.folder, number) or f"exit code {end.exit_code}" if state == JobState.FAILED else None
    return JobInfo(state=state, reason=reason, elapsed_s=end.elapsed_s, exit_code=end.exit_code)


def _failure(folder: RunFolder, number: int) -> str | None:
    """Which rank failed first, where that is known."""
    try:
        failure = json.loads((folder.attempt(number) / "failure.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return f"rank {failure.get('rank')} on {failure.get('host')}: {failure.get('reason')}"


def _local(start: AttemptStart, age_s: int, failure: str | None) -> JobInfo:
    if start.host != socket.gethostname():
        return JobInfo(state=JobState.UNKNOWN, reason=f"started by hand on {start.host}")
    if is_alive(start):
        return JobInfo(state=JobState.RUNNING, elapsed_s=age_s)
    return JobInfo(state=JobState.FAILED, reason=failure or "its processes are gone")


def _log_age(attempt: _Attempt, now: datetime) -> int | None:
    logs = attempt.folder.logs(attempt.number) if attempt.number else attempt.folder.path
    files = [*logs.glob("*.out"), *logs.glob("*.err"), attempt.folder.metrics / "steps.jsonl"]
    times = [path.stat().st_mtime for path in files if path.is_file() and path.stat().st_size]
    if not times:
        return None
    return max(0, int((now - datetime.fromtimestamp(max(times), UTC)).total_seconds()))
