"""Exchange between the watchdogs of all ranks: a heartbeat file per rank, and the verdict of one of them.

No clocks are compared: a rank is silent if its heartbeat does not change while another rank looks at it.
Price: one write of 200 bytes per rank and heartbeat. The files of others are read only when somebody waits.
"""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import msgspec

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.watchdog.progress import AGREE, TRAINER, WAIT

__all__ = [
    "ENDED",
    "PatientFiles",
    "RankState",
    "Verdict",
    "culprits_of",
    "describe",
    "place_of",
    "read_states",
    "to_json",
    "write_atomically",
]

WAITING_STAGES = ("plan", "broadcast", "reduce", "close", WAIT, AGREE)
"""Stages in which a rank waits for other ranks."""
ENDED = "ended"
"""Stage of a rank that has closed its data plane."""


class RankState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Heartbeat that a rank writes about itself."""

    rank: int
    host: str
    pid: int
    stage: str
    beat: int = 0
    step: int | None = None
    """The step whose batch is made, or the last one that was handed out."""
    stalled_s: float = 0.0
    """Seconds without progress."""
    shard: str | None = None
    rows: tuple[int, int] | None = None
    """First and last row that are read together."""
    silent: bool = False
    """True if its heartbeat has stopped."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The ranks that keep the others waiting; the content of `stalled.json`."""

    message: str
    ranks: Sequence[RankState]


class PatientFiles:
    """Runs file operations in a thread of their own: a hung file system must not stop the watchdog."""

    def __init__(self) -> None:
        """Begin without an operation."""
        self._thread: Thread | None = None

    def run(self, operation: Callable[[], None], timeout_s: float = 2.0) -> None:
        """Run `operation`, and return after `timeout_s` at the latest. Do nothing while an earlier one still runs."""
        if self._thread is not None and self._thread.is_alive():
            return

        def guarded() -> None:
            # A full disk or a deleted folder is no reason to end the watchdog.
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                operation()

        self._thread = Thread(target=guarded, name="watchdog files", daemon=True)
        self._thread.start()
        self._thread.join(timeout_s)

    def finish(self, timeout_s: float = 2.0) -> None:
        """Wait for an operation in progress."""
        if self._thread is not None:
            self._thread.join(timeout_s)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that readers see whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def read_states(folder: RunFolder, attempt: int, num_ranks: int) -> dict[int, RankState]:
    """Return the last state of every rank that has written one."""
    states = {}
    for rank in range(num_ranks):
        # A rank that cannot be read now is compared with what was read before.
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            states[rank] = msgspec.json.decode(folder.heartbeat(attempt, rank).read_bytes(), type=RankState)
    return states


def culprits_of(states: Mapping[int, RankState], silent: Sequence[int], limit_s: float) -> list[RankState]:
    """Return the ranks at fault: silent ones, and those stuck in work of their own; else those in the trainer's code.

    If all ranks wait for each other, all of them are returned.

    Args:
        states: of every rank that has written one.
        silent: ranks whose heartbeat has stopped.
        limit_s: a rank that reads, tokenizes or packs without progress for that long is stuck.
    """
    running = [state for state in states.values() if state.stage != ENDED and state.rank not in silent]
    fault = [states.get(rank, RankState(rank=rank, host="unknown node", pid=0, stage="unknown")) for rank in silent]
    fault = [msgspec.structs.replace(state, silent=True) for state in fault if state.stage != ENDED]
    own_work = [state for state in running if state.stage not in (TRAINER, *WAITING_STAGES)]
    fault += [state for state in own_work if state.stalled_s >= limit_s]
    if not fault:
        # Whoever still works is waited for, although it has not been stuck for that long.
        fault = [state for state in running if state.stage == TRAINER] or own_work
    return sorted(fault or running, key=lambda state: state.rank)


def describe(ranks: Sequence[RankState]) -> str:
    """Name up to four ranks, with their nodes and what they do."""
    names = [_describe_one(state) for state in ranks[:4]]
    if len(ranks) > 4:
        names.append(f"and {len(ranks) - 4} more ranks")
    return "; ".join(names)


def place_of(state: RankState) -> str:
    """Return the stage of a rank, and its step, shard and rows as far as they are known."""
    place = f"stage {state.stage}"
    if state.step is not None:
        place += f", step {state.step}"
    if state.shard is not None:
        place += f", shard {state.shard}"
    if state.rows is not None:
        place += f", rows {state.rows[0]} to {state.rows[1]}"
    return place


def _describe_one(state: RankState) -> str:
    place = place_of(state)
    name = f"rank {state.rank} on {state.host}"
    if state.silent:
        return f"{name} is silent: stopped, or its node is lost (last seen in {place})"
    return f"{name} is stuck for {state.stalled_s:.0f} s ({place})"


def to_json(value: Any) -> bytes:
    """Return one line of JSON."""
    return msgspec.json.encode(value) + b"\n"
