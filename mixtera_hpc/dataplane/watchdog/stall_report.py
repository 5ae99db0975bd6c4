"""The report of a stall: the ranks at fault, and the stacks of every rank that still runs.

One rank writes the verdict, for all others to find; every rank writes its own stacks.
"""

import contextlib
import faulthandler
import io
import logging
import sys

import msgspec

from mixtera_hpc.dataplane.watchdog.file_thread import FileThread, to_json, write_atomically
from mixtera_hpc.dataplane.watchdog.rank_states import RankState, Verdict, describe, place_of
from mixtera_hpc.dataplane.watchdog.watched_rank import WatchedRank

__all__ = ["StallReport"]

MAX_RANKS = 100
"""Ranks at fault that a verdict lists."""

logger = logging.getLogger("mixtera_hpc")


class StallReport:
    """The verdict of an attempt and the stacks of one rank, in the log and in the run folder if there is one."""

    def __init__(self, watched: WatchedRank, files: FileThread) -> None:
        """Write nothing yet."""
        self._watched = watched
        self._files = files

    def write(self, culprits: list[RankState], stalled_s: float) -> None:
        """Write the verdict to the log and to the run folder."""
        watched = self._watched
        message = f"No progress for {stalled_s:.0f} s: {describe(culprits)}"
        where = ""
        if watched.folder is not None:
            path = watched.folder.stall_report(watched.attempt)
            where = f"\n  The stacks of every rank that still runs are in {path.parent}."
            content = to_json(Verdict(message=message, ranks=culprits[:MAX_RANKS]))
            self._files.run(lambda: write_atomically(path, content))
        logger.warning("%s.%s", message, where)

    def write_stacks(self, own: RankState) -> None:
        """Write where this rank is, and the stacks of all its threads, to its file or to stderr."""
        watched = self._watched
        if watched.num_ranks > 1 or watched.folder is None:
            logger.warning("No progress on rank %d on %s: %s.", own.rank, own.host, place_of(own))
        if watched.folder is None:
            with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
                faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
            return
        path = watched.folder.stacks(watched.attempt, watched.rank)

        def write() -> None:
            with path.open("wb") as file:
                file.write(f"rank {own.rank} on {own.host}: {place_of(own)}\n\n".encode())
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)

        self._files.run(write)

    def time_ns(self) -> int:
        """Return the modification time of the verdict in the run folder; 0 if there is none."""
        times: list[int] = []
        folder = self._watched.folder
        if folder is not None:
            path = folder.stall_report(self._watched.attempt)
            self._files.run(lambda: times.append(path.stat().st_mtime_ns))
        return times[0] if times else 0

    def remove(self) -> None:
        """Remove the verdict from the run folder."""
        folder = self._watched.folder
        if folder is not None:
            path = folder.stall_report(self._watched.attempt)
            self._files.run(lambda: path.unlink(missing_ok=True))

    def culprits(self) -> list[RankState]:
        """Return the ranks that another rank has named; an empty list if none has."""
        verdicts: list[Verdict] = []
        folder = self._watched.folder
        if folder is not None:
            path = folder.stall_report(self._watched.attempt)
            # A new thread: the usual one may hang in an operation.
            FileThread().run(lambda: verdicts.append(msgspec.json.decode(path.read_bytes(), type=Verdict)))
        return list(verdicts[0].ranks) if verdicts else []
