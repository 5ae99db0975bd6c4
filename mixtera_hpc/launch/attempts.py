"""Attempts of a run: one folder each, with what was started (`job.json`) and how it ended (`exit.json`).

Both files are also written by the batch script, in shell, for attempts no Python of ours started.
"""

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mixtera_hpc.config.job_shape import num_ranks, parse_time
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import LaunchError

__all__ = [
    "AttemptEnd",
    "AttemptStart",
    "end_attempt",
    "is_alive",
    "new_attempt",
    "read_end",
    "read_start",
    "record_start",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptStart:
    """What was started."""

    kind: Literal["slurm", "local"]
    job_id: str | None = None
    """Slurm's; None for a local run."""
    submitted: str
    """UTC, ISO 8601."""
    nodes: int
    ranks: int
    limit_s: int | None = None
    host: str | None = None
    """Where a local run's rank 0 lives."""
    pid: int | None = None
    """Rank 0 of a local run."""
    born: int | None = None
    """When that process began, in the kernel's ticks since boot: a number is given to another process one day."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptEnd:
    """How it ended, if somebody was left to say so."""

    exit_code: int
    elapsed_s: int


def new_attempt(
    folder: RunFolder,
    config: Config,
    kind: Literal["slurm", "local"] = "local",
    ranks: int | None = None,
    after: int | None = None,
) -> int:
    """Make the folder of the next attempt, take earlier wishes to stop away, and return its number.

    Called by one process: rank 0 of a local run, or whoever submits. Inside a batch job of this run it is the attempt of
    that job, which its script has made.

    Args:
        after: the newest attempt that the caller knows to have ended; another one since then is somebody else's.

    Raises:
        LaunchError: somebody else is starting an attempt of this run right now.
    """
    if os.environ.get("MIXTERA_RUN_FOLDER") == str(folder.path):
        return int(os.environ["MIXTERA_ATTEMPT"])
    number = (max(folder.attempts(), default=0) if after is None else after) + 1
    try:
        folder.logs(number).mkdir(parents=True)
    except FileExistsError:
        raise LaunchError(f"Attempt {number} of {folder.run_id} is being started by somebody else.") from None
    folder.control.mkdir(exist_ok=True)
    for wish in ("stop", "save", "cancelled"):
        (folder.control / wish).unlink(missing_ok=True)
    if kind == "local":
        record_start(folder, number, config, pid=os.getpid(), host=socket.gethostname(), ranks=ranks)
    return number


def record_start(folder: RunFolder, attempt: int, config: Config, **facts: Any) -> None:
    """Write `job.json`; `facts` are the `AttemptStart` fields that `config` does not know."""
    known: dict[str, Any] = {
        "kind": "local" if facts.get("job_id") is None else "slurm",
        "submitted": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "nodes": config.job.nodes if facts.get("job_id") is not None else 1,
        "limit_s": parse_time(config.job.time) if facts.get("job_id") is not None else None,
        **facts,
    }
    known["ranks"] = facts.get("ranks") or num_ranks(config)
    known["born"] = _born(facts["pid"]) if facts.get("pid") else None
    _write(folder.attempt(attempt) / "job.json", asdict(AttemptStart(**known)))


def end_attempt(folder: RunFolder, attempt: int, end: AttemptEnd) -> None:
    """Write `exit.json`: the run verb does, for a local run; the batch script for a Slurm job."""
    _write(folder.attempt(attempt) / "exit.json", asdict(end))


def read_start(folder: RunFolder, attempt: int) -> AttemptStart | None:
    """What was started; None where nothing was recorded."""
    data = _read(folder.attempt(attempt) / "job.json")
    return AttemptStart(**_only(AttemptStart, data)) if data else None


def read_end(folder: RunFolder, attempt: int) -> AttemptEnd | None:
    """How it ended; None while it runs, or when nobody was left to say."""
    data = _read(folder.attempt(attempt) / "exit.json")
    return AttemptEnd(**_only(AttemptEnd, data)) if data else None


def is_alive(start: AttemptStart) -> bool:
    """Whether the process of a local run on this machine is there; another one with its number is not it."""
    if start.pid is None or start.host != socket.gethostname():
        return False
    try:
        os.kill(start.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return start.born is None or _born(start.pid) == start.born


def _born(pid: int) -> int | None:
    """None where the kernel does not tell."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return None


def _only(cls: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(cls)}
    return {key: value for key, value in data.items() if key in names}


def _write(path: Path, data: dict[str, Any]) -> None:
    """Replace `path` in one step: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(data) + "\n")
    part.rename(path)


def _read(path: Path) -> dict[str, Any] | None:
    """None where there is no file, or one still being written by a shell."""
    try:
        data = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return data if isinstance(data, dict) else None
