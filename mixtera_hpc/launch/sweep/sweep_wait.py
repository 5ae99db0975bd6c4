"""Wait until the runs of a sweep have ended, and report every change of their states."""

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.launch.status import RunStatus, run_statuses

__all__ = ["wait_for_runs"]

FIRST_QUERY_S = 2.0
LONGEST_QUERY_INTERVAL_S = 30.0
QUERY_BACKOFF = 1.5


def wait_for_runs(folders: Sequence[RunFolder]) -> Iterator[RunStatus]:
    """Yield the state of a run whenever it changes, until no run and no follow-up job waits or runs.

    Slurm is asked for all runs at once, after 2 s and then at growing intervals of at most 30 s. While it does not
    answer, the wait goes on.
    """
    shown: dict[str, object] = {}
    interval_s = FIRST_QUERY_S
    while True:
        statuses = run_statuses(folders, datetime.now(UTC))
        for status in statuses:
            if shown.get(status.folder) != (status.state, status.attempt):
                shown[status.folder] = (status.state, status.attempt)
                yield status
        if not any(status.state.active or status.may_be_active for status in statuses):
            return
        time.sleep(interval_s)
        interval_s = min(interval_s * QUERY_BACKOFF, LONGEST_QUERY_INTERVAL_S)
