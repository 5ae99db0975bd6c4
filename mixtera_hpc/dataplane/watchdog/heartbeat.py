"""Heartbeats: a file per rank, which says where the rank is. Other ranks read it only when they wait for somebody.

No clocks are compared: a rank is silent if its heartbeat does not change while another rank looks at it.
Price: one write of 200 bytes per rank and heartbeat.
"""

import contextlib
import os

import msgspec

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.watchdog.file_thread import FileThread, to_json
from mixtera_hpc.dataplane.watchdog.progress import IDLE, WAIT, RankProgress
from mixtera_hpc.dataplane.watchdog.rank_states import RankState
from mixtera_hpc.dataplane.watchdog.watched_rank import WatchedRank

__all__ = ["Heartbeat", "read_heartbeats"]


class Heartbeat:
    """The heartbeat of one rank."""

    def __init__(self, progress: RankProgress, watched: WatchedRank, files: FileThread) -> None:
        """Write nothing yet."""
        self._progress = progress
        self._watched = watched
        self._files = files
        self._number = 0
        """Heartbeats written so far."""

    def state(self, stalled_s: float) -> RankState:
        """Return the state of this rank, which has made no progress for `stalled_s` seconds."""
        watched = self._watched
        progress = self._progress
        stage = progress.stage
        step: int | None = progress.step if progress.step >= 0 else None
        shard: str | None = None
        rows: tuple[int, int] | None = None
        if stage == WAIT:
            places = [place.now() for place in progress.places]
            busy = next((place for place in sorted(places, key=lambda p: p.step) if place.stage != IDLE), None)
            if busy is None:
                stage = "plan" if watched.rank == 0 else "broadcast"
            else:
                stage = busy.stage_name
                step = busy.step
                if busy.shard >= 0:
                    shard = watched.shard_paths[busy.shard]
                    rows = (busy.first_row, busy.last_row) if busy.first_row >= 0 else None
        return RankState(
            rank=watched.rank,
            host=watched.host,
            pid=os.getpid(),
            beat=self._number,
            stage=stage,
            step=step,
            stalled_s=round(stalled_s, 1),
            shard=shard,
            rows=rows,
        )

    def write(self, state: RankState) -> None:
        """Write `state` to the file of this rank; do nothing without a run folder."""
        folder = self._watched.folder
        self._number += 1
        if folder is None:
            return
        attempt = self._watched.attempt
        line = to_json(msgspec.structs.replace(state, beat=self._number))
        path = folder.heartbeat(attempt, self._watched.rank)
        is_first = self._number == 1 and self._watched.rank == 0

        def write() -> None:
            try:
                file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            if is_first:  # A program may have used this attempt's number before.
                folder.stall_report(attempt).unlink(missing_ok=True)
            # In place: renaming would cost metadata operations for every heartbeat.
            os.pwrite(file, line, 0)
            os.ftruncate(file, len(line))
            os.close(file)

        self._files.run(write)


def read_heartbeats(folder: RunFolder, attempt: int, num_ranks: int) -> dict[int, RankState]:
    """Return the last state of every rank that has written one."""
    states = {}
    for rank in range(num_ranks):
        # A rank that cannot be read now is compared with what was read before.
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            states[rank] = msgspec.json.decode(folder.heartbeat(attempt, rank).read_bytes(), type=RankState)
    return states
