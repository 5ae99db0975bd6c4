"""States of ranks, as heartbeats carry them, and the decision which ranks keep the others waiting."""

from collections.abc import Mapping, Sequence

import msgspec

from mixtera_hpc.dataplane.watchdog.progress import AGREE, TRAINER, WAIT

__all__ = ["ENDED", "RankState", "Verdict", "culprits_of", "describe", "place_of"]

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
