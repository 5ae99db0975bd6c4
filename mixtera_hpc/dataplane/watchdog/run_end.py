"""End this process after a stall; the launcher ends the other ranks.

`os._exit`, because the trainer's thread may be inside a call that never returns.
"""

import contextlib
import os
import signal
from collections.abc import Iterable
from typing import NoReturn

from mixtera_hpc.comm.sentinel import record_failure
from mixtera_hpc.dataplane.watchdog.file_thread import FileThread
from mixtera_hpc.dataplane.watchdog.rank_states import RankState, describe
from mixtera_hpc.dataplane.watchdog.watched_rank import WatchedRank

__all__ = ["end_run"]

ABORT_CODE = 1


def end_run(watched: WatchedRank, culprits: list[RankState], why: str, reading_pids: Iterable[int]) -> NoReturn:
    """Record why the run ends, write it to stderr, and end this process.

    Args:
        watched: this rank.
        culprits: the ranks at fault, at least one.
        why: the rule that ends the run.
        reading_pids: processes that read for this rank.
    """
    message = f"{describe(culprits)}; all ranks end: {why}."
    note = _record(watched, culprits[0], message)
    where = f"[rank {watched.rank} on {watched.host}] " if watched.num_ranks > 1 else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{where}{message}\n  {note}\n".encode())
    for pid in reading_pids:
        with contextlib.suppress(OSError):  # A reading process that hangs would not notice the end of its rank.
            os.kill(pid, signal.SIGKILL)
    os._exit(ABORT_CODE)


def _record(watched: WatchedRank, first: RankState, message: str) -> str:
    """Record the failure in the run folder, and return a sentence about what is saved."""
    folder = watched.folder
    if folder is None:
        return "Nothing more is saved."
    checkpoints: list[str] = []
    reason = message.removeprefix(f"rank {first.rank} on {first.host} ")
    facts = {"rank": first.rank, "host": first.host, "pid": first.pid, "step": first.step, "reason": reason}

    def record() -> None:
        record_failure(str(folder.failure(watched.attempt)), facts)
        steps = folder.checkpoint_steps()
        checkpoints.append(folder.checkpoint(steps[-1]).name if steps else "none in the run folder")

    # A new thread: the one of the watchdog may hang in an operation.
    FileThread().run(record)
    if not checkpoints:
        return "Nothing more is saved."
    return f"Nothing more is saved. The last checkpoint is {checkpoints[0]}; resume continues from it."
