"""Stays with a run until its last attempt has ended: new log lines, changes of state, then the exit code.

Our own loop, because submitit takes a node failure for the end although Slurm starts the job again, and asks less and less
often. Files are looked at twice a second, Slurm after 2 s and then ever more rarely, up to every 30 s.
"""

import time
from collections.abc import Iterator
from datetime import UTC, datetime

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.launch.attempts import read_end, read_start
from mixtera_hpc.launch.logs import LogTail, RankSelection, attempt_heading, failed_rank_lines
from mixtera_hpc.launch.slurm_commands import JobState
from mixtera_hpc.launch.status import RunStatus, run_statuses

__all__ = ["follow_run", "run_exit_code"]

LOOK_S = 0.5
FIRST_QUESTION_S = 2.0
LONGEST_PAUSE_S = 30.0


def follow_run(folder: RunFolder, ranks: RankSelection = "main", attempt: int | None = None) -> Iterator[str]:
    """Yield lines from `attempt` (the first when None) on, follow-ups included, until the run has ended."""
    current = attempt or min(folder.attempts(), default=1)
    while True:
        yield attempt_heading(folder, current)
        yield from _follow_attempt(folder, ranks, current)
        if current >= max(folder.attempts(), default=0):
            return
        current += 1


def run_exit_code(folder: RunFolder) -> int:
    """What `--wait` leaves with: the newest attempt's own code where it is one of ours, else 1."""
    attempt = max(folder.attempts(), default=0)
    end = read_end(folder, attempt) if attempt else None
    if end is not None:
        return end.exit_code if end.exit_code in (0, 2, 75) else 1
    state = _status(folder).state
    return {JobState.COMPLETED: 0, JobState.SAVED: 75}.get(state, 1)


def _follow_attempt(folder: RunFolder, ranks: RankSelection, attempt: int) -> Iterator[str]:
    tail = LogTail(folder.logs(attempt), ranks)
    told: str | None = None
    pause_s = FIRST_QUESTION_S
    next_question = time.monotonic()
    while not _over(folder, attempt):
        if time.monotonic() >= next_question:
            status = _status(folder)
            if told != _words(status):
                told = _words(status)
                yield f"[{status.job_id or 'here'}] {told}"
            if status.attempt == attempt and not status.state.active and status.state != JobState.UNKNOWN:
                break
            next_question = time.monotonic() + pause_s
            pause_s = min(pause_s * 1.5, LONGEST_PAUSE_S)
        yield from tail.lines()
        time.sleep(LOOK_S)
    if read_end(folder, attempt) is None:
        time.sleep(LOOK_S)  # The batch script submits what follows and then says so.
    yield from tail.lines(last=True)
    yield from failed_rank_lines(folder, attempt, ranks)


def _over(folder: RunFolder, attempt: int) -> bool:
    """Whether the attempt's end is recorded, or a newer one has been started."""
    return read_end(folder, attempt) is not None or read_start(folder, attempt + 1) is not None


def _status(folder: RunFolder) -> RunStatus:
    return run_statuses([folder], datetime.now(UTC))[0]


def _words(status: RunStatus) -> str:
    return f"{status.state}" + (f" ({status.reason})" if status.reason else "")
