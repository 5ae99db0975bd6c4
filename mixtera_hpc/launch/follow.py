"""Follow a run until its last attempt has ended: new log lines, changes of state, then the exit code.

submitit's own loop is not used: it treats a node failure as the end, although Slurm requeues the job. Log files are
read twice a second. Slurm is queried after 2 s, then at growing intervals of at most 30 s.
"""

import time
from collections.abc import Iterator
from datetime import UTC, datetime

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.launch.attempts import read_end, read_start
from mixtera_hpc.launch.logs import LogTail, RankSelection, attempt_heading, failed_rank_lines
from mixtera_hpc.launch.slurm.slurm_commands import JobState
from mixtera_hpc.launch.status import RunStatus, run_statuses

__all__ = ["follow_run", "run_exit_code"]

LOG_INTERVAL_S = 0.5
FIRST_QUERY_S = 2.0
LONGEST_QUERY_INTERVAL_S = 30.0
QUERY_BACKOFF = 1.5
OUR_EXIT_CODES = (0, 2, 75)


def follow_run(folder: RunFolder, ranks: RankSelection = "main", attempt: int | None = None) -> Iterator[str]:
    """Yield log lines from `attempt` on until the run has ended, follow-up attempts included.

    Args:
        folder: The run.
        ranks: The ranks whose lines to show.
        attempt: The first attempt to show; None shows all.
    """
    current = attempt or min(folder.attempts(), default=1)
    while True:
        yield attempt_heading(folder, current)
        yield from _follow_attempt(folder, ranks, current)
        if not _has_next_attempt(folder, current):
            return
        current += 1


def _has_next_attempt(folder: RunFolder, current: int) -> bool:
    """Wait while a follow-up job is in the queue; return True when an attempt after `current` has begun."""
    interval_s = FIRST_QUERY_S
    while max(folder.attempts(), default=0) <= current:
        status = _status(folder)
        if not status.state.active and not status.may_be_active:
            return max(folder.attempts(), default=0) > current
        time.sleep(interval_s)
        interval_s = min(interval_s * QUERY_BACKOFF, LONGEST_QUERY_INTERVAL_S)
    return True


def run_exit_code(folder: RunFolder) -> int:
    """Return the exit code for `--wait`: that of the newest attempt if it is 0, 2 or 75, else 1."""
    attempt = max(folder.attempts(), default=0)
    end = read_end(folder, attempt) if attempt else None
    if end is not None:
        return end.exit_code if end.exit_code in OUR_EXIT_CODES else 1
    state = _status(folder).state
    return {JobState.COMPLETED: 0, JobState.SAVED: 75}.get(state, 1)


def _follow_attempt(folder: RunFolder, ranks: RankSelection, attempt: int) -> Iterator[str]:
    tail = LogTail(folder.logs(attempt), ranks)
    shown: str | None = None
    interval_s = FIRST_QUERY_S
    next_query = time.monotonic()

    while not _is_over(folder, attempt):
        if time.monotonic() >= next_query:
            status = _status(folder)
            text = _state_text(status)
            if text != shown:
                shown = text
                yield f"[{status.job_id or 'local'}] {text}"
            if status.attempt == attempt and not status.state.active and status.state != JobState.UNKNOWN:
                break
            next_query = time.monotonic() + interval_s
            interval_s = min(interval_s * QUERY_BACKOFF, LONGEST_QUERY_INTERVAL_S)
        yield from tail.lines()
        time.sleep(LOG_INTERVAL_S)

    # Wait for the last line: the batch script prints that it has submitted the next attempt only after doing so.
    if read_end(folder, attempt) is None:
        time.sleep(LOG_INTERVAL_S)
    yield from tail.lines(last=True)
    yield from failed_rank_lines(folder, attempt, ranks)


def _is_over(folder: RunFolder, attempt: int) -> bool:
    """Return True if the attempt's end is recorded or a newer attempt has been started."""
    return read_end(folder, attempt) is not None or read_start(folder, attempt + 1) is not None


def _status(folder: RunFolder) -> RunStatus:
    return run_statuses([folder], datetime.now(UTC))[0]


def _state_text(status: RunStatus) -> str:
    return f"{status.state} ({status.reason})" if status.reason else str(status.state)
