"""A thread of every rank that notices when nothing gets on: a hung read, a stopped rank, a lost node, a stuck trainer.

After `dataplane.watchdog_s` without progress, every rank that still runs writes where it is and the stacks of its
threads, and the first of them names the ranks at fault. With `dataplane.watchdog=abort`, all ranks end after a second
limit. A stop request during a stall ends all ranks on the last checkpoint.

A rank ends with `os._exit`: its main thread is inside a call that does not return. The launcher then ends the others.
Price: no collective, nothing in the step; a wake-up of the thread per second.
"""

import contextlib
import faulthandler
import io
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from mixtera_hpc.comm.sentinel import record_failure
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema.dataplane import DataPlaneConfig
from mixtera_hpc.dataplane.control import RunControl
from mixtera_hpc.dataplane.resources import PlaneResources
from mixtera_hpc.dataplane.watchdog.progress import IDLE, TRAINER, WAIT, RankProgress
from mixtera_hpc.dataplane.watchdog.rank_states import (
    ENDED,
    PatientFiles,
    RankState,
    Verdict,
    culprits_of,
    describe,
    place_of,
    read_states,
    to_json,
    write_atomically,
)

__all__ = ["Watchdog", "WatchedRank"]

MAX_PERIOD_S = 5.0
"""Seconds between two heartbeats of a rank; more in jobs of over 1,000 ranks."""
RANKS_PER_PERIOD_S = 200
STOP_GRACE_S = 6.0
"""Seconds for which a stop request waits for a stalled run to get on."""
NUM_JUDGES = 8
"""Ranks that look at the others, each if those before it do not."""
JUDGE_DELAY_S = 0.5
ABORT_CODE = 1

logger = logging.getLogger("mixtera_hpc")


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchedRank:
    """Facts about a rank that its watchdog uses."""

    rank: int
    num_ranks: int
    host: str
    config: DataPlaneConfig
    control: RunControl
    folder: RunFolder | None
    attempt: int
    shard_paths: Sequence[str]

    @classmethod
    def of(cls, resources: PlaneResources) -> "WatchedRank":
        """Return this rank of an open data plane."""
        return cls(
            rank=resources.comm.rank,
            num_ranks=resources.comm.size,
            host=resources.comm.hostname,
            config=resources.source.config.dataplane,
            control=resources.control,
            folder=resources.folder,
            attempt=resources.recorder.attempt,
            shard_paths=resources.source.index.shard_paths,
        )


@dataclass(slots=True)
class _Stall:
    """A time without progress, from the moment at which this rank begins to look at the others."""

    began: float
    beats: dict[int, tuple[int, float]] = field(default_factory=dict)
    """Rank → its heartbeat, and when this rank first saw it."""
    states: dict[int, RankState] = field(default_factory=dict)
    report_before: int = 0
    """Time at which the verdict in the run folder was written before this stall."""
    culprits: list[RankState] = field(default_factory=list)
    named_at: float | None = None
    """Time at which this rank knew of the verdict, its own or that of another rank."""
    stop_seen_at: float | None = None
    is_judge: bool = False
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
        self._files = PatientFiles()
        self._beat = 0
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
            self._write_beat(ENDED, 0.0)

    def _run(self) -> None:
        tick_s = min(1.0, self._limit_s / 8)
        while not self._closing.wait(tick_s):
            now = time.monotonic()
            # This process was stopped itself, or its machine slept.
            if now - self._last_tick > 5 * tick_s + 1:
                self._since += now - self._last_tick
            self._last_tick = now
            self._tick(now)

    def _tick(self, now: float) -> None:
        key = self._progress.key()
        if key != self._key:
            self._key = key
            self._since = now
            self._recover()
        stalled_s = now - self._since
        if now >= self._next_beat:
            self._next_beat = now + self._period_s
            self._write_beat(self._state(stalled_s).stage, stalled_s)
        if stalled_s < self._limit_s / 2:
            return

        if self._stall is None:
            self._stall = _Stall(began=now, report_before=self._report_time())
        stall = self._stall
        if stalled_s >= self._limit_s and stall.named_at is None:
            self._name(stall, now, stalled_s)
        if stall.named_at is not None:
            self._end_if_due(stall, now)
        if self._closing.is_set():
            return
        self._observe(stall, now)

    def _state(self, stalled_s: float) -> RankState:
        """Return where this rank is."""
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
            beat=self._beat,
            stage=stage,
            step=step,
            stalled_s=round(stalled_s, 1),
            shard=shard,
            rows=rows,
        )

    def _write_beat(self, stage: str, stalled_s: float) -> None:
        folder = self._watched.folder
        self._beat += 1
        if folder is None:
            return
        state = self._state(stalled_s)
        line = to_json(msgspec.structs.replace(state, stage=stage))
        path = folder.heartbeat(self._watched.attempt, self._watched.rank)
        is_first = self._beat == 1 and self._watched.rank == 0

        def write() -> None:
            try:
                file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            if is_first:  # A program may have used this attempt's number before.
                folder.stall_report(self._watched.attempt).unlink(missing_ok=True)
            # In place: renaming would cost metadata operations for every heartbeat.
            os.pwrite(file, line, 0)
            os.ftruncate(file, len(line))
            os.close(file)

        self._files.run(write)

    def _observe(self, stall: _Stall, now: float) -> None:
        """Look at the heartbeats of the others, if this rank may have to name one of them."""
        watched = self._watched
        folder = watched.folder
        if folder is None or not self._sees_others or not self._may_judge(stall, now):
            return
        if stall.observed_from is None:
            stall.observed_from = now

        def read() -> None:
            stall.states = read_states(folder, watched.attempt, watched.num_ranks)

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
        rank = self._watched.rank
        return rank < NUM_JUDGES or stall.is_judge or now - stall.began >= self._limit_s

    def _name(self, stall: _Stall, now: float, stalled_s: float) -> None:
        """Name the ranks at fault, unless another rank has, and write where this rank is."""
        watched = self._watched
        if self._report_time() != stall.report_before:
            stall.named_at = now
            self._write_stacks(self._state(stalled_s))
            return
        # Longer than a few heartbeats, and in order of ranks, so that usually one rank names them.
        patience_s = 3 * self._period_s + 1 + min(watched.rank, NUM_JUDGES) * JUDGE_DELAY_S
        if self._sees_others and (stall.observed_from is None or now - stall.observed_from < patience_s):
            return
        own = self._state(stalled_s)
        states = {**stall.states, watched.rank: own}
        silent = self._silent_ranks(stall, now, patience_s)
        culprits = culprits_of(states, silent, self._limit_s)
        # The trainer's own time has a longer limit, unless somebody waits for it.
        waits = [state for state in states.values() if state.stage not in (TRAINER, ENDED) and state.rank not in silent]
        is_stalled = any(state.stalled_s >= self._limit_s for state in waits)
        if not silent and not is_stalled and stalled_s < watched.config.watchdog_trainer_s:
            return
        stall.named_at = now
        stall.culprits = culprits
        stall.is_judge = True
        self._report(culprits, stalled_s)
        self._write_stacks(own)

    def _silent_ranks(self, stall: _Stall, now: float, patience_s: float) -> list[int]:
        silent_s = min(patience_s, 3 * self._period_s + 1)
        ranks = (rank for rank in stall.beats if rank != self._watched.rank)
        ended = {rank for rank, state in stall.states.items() if state.stage == ENDED}
        return [rank for rank in ranks if rank not in ended and now - stall.beats[rank][1] >= silent_s]

    def _report(self, culprits: list[RankState], stalled_s: float) -> None:
        """Write the verdict to the log and to the run folder."""
        watched = self._watched
        message = f"No progress for {stalled_s:.0f} s: {describe(culprits)}"
        where = ""
        if watched.folder is not None:
            path = watched.folder.stall_report(watched.attempt)
            where = f"\n  The stacks of every rank that still runs are in {path.parent}."
            content = to_json(Verdict(message=message, ranks=culprits[:100]))
            self._files.run(lambda: write_atomically(path, content))
        logger.warning("%s.%s", message, where)

    def _write_stacks(self, own: RankState) -> None:
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

    def _report_time(self) -> int:
        """Return when the verdict in the run folder was written; 0 if there is none."""
        times: list[int] = []
        folder = self._watched.folder
        if folder is not None:
            path = folder.stall_report(self._watched.attempt)
            self._files.run(lambda: times.append(path.stat().st_mtime_ns))
        return times[0] if times else 0

    def _recover(self) -> None:
        """Forget a stall after which this rank has got on."""
        stall = self._stall
        self._stall = None
        if stall is None or not stall.is_judge:
            return
        logger.warning("The run continues after a stall of %s.", describe(stall.culprits))
        folder = self._watched.folder
        if folder is not None:
            path = folder.stall_report(self._watched.attempt)
            self._files.run(lambda: path.unlink(missing_ok=True))

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
        """Record and write why the run ends, and end this process; the launcher ends the others."""
        watched = self._watched
        own = self._state(time.monotonic() - self._since)
        culprits = stall.culprits or self._culprits_of_report() or [own]
        message = f"{describe(culprits)}; all ranks end: {why}."
        notes: list[str] = []

        def record() -> None:
            folder = watched.folder
            if folder is None:
                return
            first = culprits[0]
            reason = message.removeprefix(f"rank {first.rank} on {first.host} ")
            facts = {"rank": first.rank, "host": first.host, "pid": first.pid, "step": first.step, "reason": reason}
            record_failure(str(folder.failure(watched.attempt)), facts)
            steps = folder.checkpoint_steps()
            newest = folder.checkpoint(steps[-1]).name if steps else "none in the run folder"
            notes.append(f"Nothing more is saved. The last checkpoint is {newest}; resume continues from it.")

        self._files.finish(0.5)
        PatientFiles().run(record)
        where = f"[rank {watched.rank} on {watched.host}] " if watched.num_ranks > 1 else ""
        text = f"{where}{message}\n  " + (notes[0] if notes else "Nothing more is saved.") + "\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
        for pid in {place.now().pid for place in self._progress.places} - {0, os.getpid()}:
            with contextlib.suppress(OSError):  # A reading process that hangs would not notice the end of its rank.
                os.kill(pid, signal.SIGKILL)
        os._exit(ABORT_CODE)

    def _culprits_of_report(self) -> list[RankState]:
        """Return the ranks that another rank has named."""
        verdicts: list[Verdict] = []
        folder = self._watched.folder
        if folder is not None:
            path = folder.stall_report(self._watched.attempt)
            PatientFiles().run(lambda: verdicts.append(msgspec.json.decode(path.read_bytes(), type=Verdict)))
        return list(verdicts[0].ranks) if verdicts else []
