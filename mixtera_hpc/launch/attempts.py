"""Record the attempts of a run: one folder each, with what was started (`job.json`) and how it ended (`exit.json`).

A batch script writes both files itself, in shell, for the attempts that it starts. Readers therefore accept files that
are missing, half written, or without some of the fields.
"""

import json
import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from mixtera_hpc.config.files.json_text import parse_json
from mixtera_hpc.config.files.write_errors import explain_write_errors
from mixtera_hpc.config.job_shape import num_ranks, parse_time
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import LaunchError

__all__ = [
    "ExitRecord",
    "JobRecord",
    "batch_script_attempt",
    "create_attempt",
    "end_attempt",
    "is_alive",
    "is_own_program",
    "read_end",
    "read_follow_up",
    "read_start",
    "record_start",
    "start_local_attempt",
]

T = TypeVar("T")

logger = logging.getLogger("mixtera_hpc")

UNCHANGED = "No attempt was started; all earlier ones are as they were."
START_TIME_FIELD = 19
"""Index of `starttime` in `/proc/PID/stat`, counted behind the process name (proc(5), field 22)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """Record of how an attempt was started."""

    kind: Literal["slurm", "local", "program"]
    """`program`: a training program of the user's that opened the run folder by itself."""
    job_id: str | None = None
    """Slurm's job id; None for a local run."""
    submitted: str
    """UTC, ISO 8601."""
    nodes: int
    ranks: int
    limit_s: int | None = None
    host: str | None = None
    """Host of rank 0; None for a Slurm job."""
    pid: int | None = None
    """Process id of rank 0; None for a Slurm job."""
    pid_start_ticks: int | None = None
    """Start of that process, in clock ticks since boot. A later process with the same id has another value."""

    @classmethod
    def slurm(cls, config: Config, job_id: str) -> "JobRecord":
        """Describe the batch job of `config` that was submitted just now."""
        return cls(
            kind="slurm",
            job_id=job_id,
            submitted=_now(),
            nodes=config.job.nodes,
            ranks=num_ranks(config),
            limit_s=parse_time(config.job.time),
        )

    @classmethod
    def local(cls, config: Config, ranks: int | None = None) -> "JobRecord":
        """Describe a run whose rank 0 is this process."""
        pid = os.getpid()
        return cls(
            kind="local",
            submitted=_now(),
            nodes=1,
            ranks=ranks or num_ranks(config),
            host=socket.gethostname(),
            pid=pid,
            pid_start_ticks=_process_start_ticks(pid),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitRecord:
    """Record of how an attempt ended. It is missing where every process was killed."""

    exit_code: int
    elapsed_s: int


def batch_script_attempt(folder: RunFolder) -> int | None:
    """Return the attempt that the surrounding batch script made for this run; None outside of such a script."""
    if os.environ.get("MIXTERA_RUN_FOLDER") != str(folder.path):
        return None
    return int(os.environ["MIXTERA_ATTEMPT"])


def create_attempt(folder: RunFolder, after: int | None = None) -> int:
    """Make the folder of the next attempt, remove earlier requests to stop or save, and return the attempt's number.

    One process calls this: rank 0 of a local run, or the process that submits.

    Args:
        folder: The run.
        after: The newest attempt that the caller saw ended. If another attempt exists by now, another process made it.

    Raises:
        LaunchError: Another process starts an attempt of this run at the same time.
    """
    newest = max(folder.attempts(), default=0) if after is None else after
    number = newest + 1
    try:
        with explain_write_errors(folder.logs(number), UNCHANGED, unless=(FileExistsError,)):
            folder.logs(number).mkdir(parents=True)
    except FileExistsError:
        raise LaunchError(
            f"Attempt {number} of {folder.run_id} is being started by another process.\n"
            f"  See mixtera-hpc status {folder.path}"
        ) from None

    folder.control.mkdir(exist_ok=True)
    # These requests concern one attempt only; a new attempt begins without them.
    for request in (folder.stop_request, folder.save_request, folder.cancelled):
        request.unlink(missing_ok=True)
    return number


def start_local_attempt(
    folder: RunFolder, config: Config, *, ranks: int | None = None, after: int | None = None
) -> int:
    """Create and record the next attempt for this process; inside the run's batch script return the script's attempt.

    Args:
        folder: The run.
        config: The run's configuration.
        ranks: Number of ranks that were started; None takes the number that `config` asks for.
        after: See `create_attempt`.

    Raises:
        LaunchError: Another process starts an attempt of this run at the same time.
    """
    existing = batch_script_attempt(folder)
    if existing is not None:
        return existing

    number = create_attempt(folder, after)
    record_start(folder, number, JobRecord.local(config, ranks))
    return number


def record_start(folder: RunFolder, attempt: int, start: JobRecord) -> None:
    """Write `job.json`."""
    with explain_write_errors(folder.job_record(attempt), UNCHANGED):
        _write(folder.job_record(attempt), asdict(start))


def end_attempt(folder: RunFolder, attempt: int, end: ExitRecord) -> None:
    """Write `exit.json`; if that fails, for example because the disk is full, warn: why the run ended matters more."""
    try:
        _write(folder.exit_record(attempt), asdict(end))
    except OSError as error:
        logger.warning("%s cannot be written: %s.", folder.exit_record(attempt), error.strerror or error)


def read_start(folder: RunFolder, attempt: int) -> JobRecord | None:
    """Return what was started; None where nothing was recorded."""
    data = _read(folder.job_record(attempt))
    return _record(JobRecord, data)


def is_own_program(folder: RunFolder) -> bool:
    """Return True if a training program of the user's, which opened the run by itself, made the newest attempt."""
    start = read_start(folder, max(folder.attempts(), default=0))
    return start is not None and start.kind == "program"


def read_end(folder: RunFolder, attempt: int) -> ExitRecord | None:
    """Return how the attempt ended; None while it runs, or if every process was killed."""
    data = _read(folder.exit_record(attempt))
    return _record(ExitRecord, data)


def read_follow_up(folder: RunFolder, attempt: int) -> str | None:
    """Return the id of the job that waits for the end of the attempt; None if there is none."""
    try:
        return folder.follow_up(attempt).read_text().strip() or None
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_alive(start: JobRecord) -> bool:
    """Return True if rank 0 of a local run still runs on this machine."""
    if start.pid is None or start.host != socket.gethostname():
        return False
    try:
        os.kill(start.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # The process exists and belongs to another user.
    return start.pid_start_ticks is None or _process_start_ticks(start.pid) == start.pid_start_ticks


def _process_start_ticks(pid: int) -> int | None:
    """Return None where the kernel has no /proc, and for a process that has ended and waits for its parent."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        behind_name = stat.rpartition(")")[2].split()
        return None if behind_name[0] in "ZX" else int(behind_name[START_TIME_FIELD])
    except (OSError, IndexError):
        return None


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _record(cls: type[T], data: Mapping[str, Any] | None) -> T | None:
    """Return a record without fields that this version does not know; None if there is none, or if it is damaged."""
    try:
        return msgspec.convert(data, cls) if data else None
    except msgspec.ValidationError:
        return None


def _write(path: Path, data: dict[str, Any]) -> None:
    """Replace `path` atomically, so that a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data) + "\n")
    temporary.rename(path)


def _read(path: Path) -> dict[str, Any] | None:
    """Return None if there is no file, or if a shell is still writing it, or if it is damaged."""
    try:
        data = parse_json(path.read_text())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
