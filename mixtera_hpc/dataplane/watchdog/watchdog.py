"""A thread of every rank that notices when a run makes no progress: a hung read, a stopped rank, a stuck trainer.

After `dataplane.watchdog_s` without progress, every rank that still runs writes where it is and the stacks of its
threads, and the first of them names the ranks at fault. With `dataplane.watchdog=abort`, all ranks end after a second
limit. A stop request during a stall ends all ranks on the last checkpoint.

Price: no collective, nothing in the step; a wake-up of the thread per second.
"""

import logging
import threading
import time
from dataclasses import dataclass, field

import msgspec

from mixtera_hpc.dataplane.watchdog.file_thread import FileThread
from mixtera_hpc.dataplane.watchdog.heartbeat import Heartbeat, read_heartbeats
from mixtera_hpc.dataplane.watchdog.progress import TRAINER, RankProgress
from mixtera_hpc.dataplane.watchdog.rank_states import ENDED, RankState, culprits_of, describe
from mixtera_hpc.dataplane.watchdog.run_end import end_run
from mixtera_hpc.dataplane.watchdog.stall_report import StallReport
from mixtera_hpc.dataplane.watchdog.watched_rank import WatchedRank

__all__ = ["Watchdog"]

MAX_PERIOD_S = 5.0
"""Seconds between two heartbeats of a rank; more in jobs of over 1,000 ranks."""
RANKS_PER_PERIOD_S = 200
STOP_GRACE_S = 6.0
"""Seconds for which a stop request waits for a stalled run to continue."""
NUM_JUDGES = 8
"""Ranks that look at the others, each if those before it do not."""
JUDGE_DELAY_S = 0.5

logger = logging.getLogger("mixtera_hpc")


@dataclass(slots=True)
class _Stall:
    """A time without progress, from the moment at which this rank begins to look at the others."""

    began: float
    report_before_ns: int
    """Modification time of the verdict in the run folder before this stall."""
    beats: dict[int, tuple[int, float]] = field(default_factory=dict)
    """Rank → its heartbeat, and when this rank first saw it."""
    states: dict[int, RankState] = field(default_factory=dict)
    """Rank → the state in its last heartbeat."""
    culprits: list[RankState] = field(default_factory=list)
    named_at: float | None = None
    """Time at which this rank knew of the verdict, its own or that of another rank."""
    stop_seen_at: float | None = None
    is_judge: bool = False
    """True if this rank has named the ranks at fault."""
    observed_from: float | None = None
    """Time at which this rank began to read the heartbeats of the others."""


class Watchdog:
    """The watchdog of one rank."""

    def __init__(self, progress: RankProgress, watched: WatchedRank) -> None:
        """Start the thread, unless `dataplane.watchdog_s` is 0."""
        self._progress = progress
        self._watched = watched
        self._limit_s = watched.config.watchdog_s
        self._period_s = max(min(MAX_PERIOD_S, self._limit_s / 8), watched.num_ranks / RANKS_PER_PERIOD_S)
        self._silence_s = 3 * self._period_s + 1
        """Seconds without a heartbeat after which a rank counts as silent."""
        self._files = FileThread()
        self._heartbeat = Heartbeat(progress, watched, self._files)
        self._report = StallReport(watched, self._files)
        self._next_beat = 0.0
        self._key = progress.key()
        self._since = self._last_tick = time.monotonic()
        self._stall: _Stall | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        if self._limit_s > 0:
            self._thread.start()

    def close(self) -> None:
        """Stop the thread, and tell the other ranks that this one has ended."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
            self._files.finish()
            self._heartbeat.write(msgspec.structs.replace(self._heartbeat.state(0.0), stage=ENDED))

    def _run(self) -> None:
        """Look at the progress of this rank until the watchdog is closed."""
        tick_s = min(1.0, self._limit_s / 8)
        while not self._closing.wait(tick_s):
            now = time.monotonic()
            # This process was stopped itself, or its machine slept.
            if now - self._last_tick > 5 * tick_s + 1:
                self._since += now - self._last_tick
            self._last_tick = now
            self._tick(now)

    def _tick(self, now: float) -> None:
        """Compare the progress with that of the last call, and take the steps that are due."""
        key = self._progress.key()
        if key != self._key:
            self._key = key
            self._since = now
            self._recover()
        stalled_s = now - self._since
        if now >= self._next_beat:
            self._next_beat = now + self._period_s
            self._heartbeat.write(self._heartbeat.state(stalled_s))
        if stalled_s < self._limit_s / 2:
            return

        if self._stall is None:
            self._stall = _Stall(began=now, report_before_ns=self._report.time_ns())
        stall = self._stall
        if stalled_s >= self._limit_s and stall.named_at is None:
            self._name(stall, now, stalled_s)
        if stall.named_at is not None:
            self._end_if_due(stall, now)
        if self._closing.is_set():
            return
        self._observe(stall, now)

    def _observe(self, stall: _Stall, now: float) -> None:
        """Look at the heartbeats of the others, if this rank may have to name one of them."""
        watched = self._watched
        folder = watched.folder
        if folder is None or not self._sees_others or not self._may_judge(stall, now):
            return
        if stall.observed_from is None:
            stall.observed_from = now

        def read() -> None:
            stall.states = read_heartbeats(folder, watched.attempt, watched.num_ranks)

        self._files.run(read, timeout_s=max(2.0, watched.num_ranks / 100))
        for rank in range(watched.num_ranks):
            state = stall.states.get(rank)
            beat = -1 if state is None else state.beat
            if stall.beats.get(rank, (None, 0.0))[0] != beat:
                stall.beats[rank] = (beat, now)

    @property
    def _sees_others(self) -> bool:
        return self._watched.folder is not None and self._watched.num_ranks > 1

    def _may_judge(self, stall: _Stall, now: float) -> bool:
        """Return True for the first ranks, and for the others once those have had time."""
        rank = self._watched.rank
        return rank < NUM_JUDGES or stall.is_judge or now - stall.began >= self._limit_s

    def _name(self, stall: _Stall, now: float, stalled_s: float) -> None:
        """Name the ranks at fault, unless another rank has, and write where this rank is."""
        if self._report.time_ns() != stall.report_before_ns:
            stall.named_at = now
            self._report.write_stacks(self._heartbeat.state(stalled_s))
            return
        # Longer than a few heartbeats, and in order of ranks, so that usually one rank names them.
        rank = self._watched.rank
        patience_s = self._silence_s + min(rank, NUM_JUDGES) * JUDGE_DELAY_S
        if self._sees_others and (stall.observed_from is None or now - stall.observed_from < patience_s):
            return
        own = self._heartbeat.state(stalled_s)
        states = {**stall.states, rank: own}
        silent = self._silent_ranks(stall, now)
        # The trainer's own time has a longer limit, unless somebody waits for it.
        waits = [state for state in states.values() if state.stage not in (TRAINER, ENDED) and state.rank not in silent]
        is_stalled = any(state.stalled_s >= self._limit_s for state in waits)
        if not silent and not is_stalled and stalled_s < self._watched.config.watchdog_trainer_s:
            return
        stall.named_at = now
        stall.culprits = culprits_of(states, silent, self._limit_s)
        stall.is_judge = True
        self._report.write(stall.culprits, stalled_s)
        self._report.write_stacks(own)

    def _silent_ranks(self, stall: _Stall, now: float) -> list[int]:
        """Return the other ranks whose heartbeat has stopped, without those that have ended."""
        ended = {rank for rank, state in stall.states.items() if state.stage == ENDED}
        return [
            rank
            for rank, (_, seen_at) in stall.beats.items()
            if rank != self._watched.rank and rank not in ended and now - seen_at >= self._silence_s
        ]

    def _recover(self) -> None:
        """Forget a stall after which this rank has made progress."""
        stall = self._stall
        self._stall = None
        if stall is None or not stall.is_judge:
            return
        logger.warning("The run continues after a stall of %s.", describe(stall.culprits))
        self._report.remove()

    def _end_if_due(self, stall: _Stall, now: float) -> None:
        """End this process if a stop was requested, or after a second limit with the policy `abort`."""
        watched = self._watched
        watches_files = watched.rank < NUM_JUDGES
        if stall.stop_seen_at is None and watched.control.stop_was_requested(look_for_file=watches_files):
            stall.stop_seen_at = now
        if stall.stop_seen_at is not None and now - stall.stop_seen_at >= STOP_GRACE_S:
            self._end(stall, "a stop was requested while no step can be finished")
        limit_s = self._limit_s
        if stall.culprits and all(state.stage == TRAINER and not state.silent for state in stall.culprits):
            limit_s = max(limit_s, watched.config.watchdog_trainer_s)
        named_s = now - (stall.named_at or now)
        if watched.config.watchdog == "abort" and stall.is_judge and named_s >= limit_s:
            self._end(stall, "dataplane.watchdog=abort")

    def _end(self, stall: _Stall, why: str) -> None:
        """End this process; the launcher ends the others."""
        own = self._heartbeat.state(time.monotonic() - self._since)
        culprits = stall.culprits or self._report.culprits() or [own]
        self._files.finish(0.5)
        reading_pids = {place.now().pid for place in self._progress.places} - {0, own.pid}
        end_run(self._watched, culprits, why, reading_pids)
