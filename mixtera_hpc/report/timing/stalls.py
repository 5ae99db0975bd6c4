"""Steps in which the trainer waited for the data plane, and which rank and stage was the cause."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["STALL_COLUMNS", "Stall", "find_stalls", "host_of"]

MIN_STALL_S = 0.1
MIN_SHARE = 0.1
"""A wait counts as a stall if it takes that long, and that share of the step."""
BACKGROUND = ("read", "decode", "tokenize", "pack")
"""Stages beside the trainer: they stall it only if it waits for them."""
EXPLAINED_SHARE = 0.5
"""A stage that took at least this share of a wait is its cause."""

STALL_COLUMNS = ("rank", "node", "stage", "steps", "total", "longest")

Event = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """A rank that kept the others waiting in one stage."""

    rank: int
    host: str
    stage: str
    num_steps: int
    """Lines of `steps.jsonl` with such a stall; with `training.log_every` above 1, a line may hold several."""
    total_s: float
    longest_s: float


def find_stalls(steps: Sequence[Event], hosts: Sequence[Event]) -> tuple[Stall, ...]:
    """Return all stalls, the most expensive first. The first line of an attempt waits for the start, and is left out.

    Args:
        steps: events of `steps.jsonl`.
        hosts: events of `hosts.jsonl`, of all attempts.
    """
    seconds: dict[tuple[int, str, str], list[float]] = defaultdict(list)
    attempt: int | None = None
    for event in steps:
        is_first = event.get("attempt") != attempt
        attempt = event.get("attempt")
        if is_first:
            continue
        for stage, rank, stall_s in _stalls_of(event):
            seconds[rank, host_of(rank, attempt, hosts), stage].append(stall_s)
    stalls = (
        Stall(rank=rank, host=host, stage=stage, num_steps=len(each), total_s=sum(each), longest_s=max(each))
        for (rank, host, stage), each in seconds.items()
    )
    return tuple(sorted(stalls, key=lambda stall: -stall.total_s))


def _stalls_of(event: Event) -> list[tuple[str, int, float]]:
    """Return stage, rank and seconds of the stalls of one line."""
    longest = event.get("stage_max_s", {})
    ranks = event.get("stage_rank", {})
    limit_s = max(MIN_STALL_S, MIN_SHARE * float(event.get("step_s", 0.0)))
    stalls = []
    for stage in ("wait", "plan", "broadcast", "reduce"):
        stall_s = longest.get(stage, 0.0)
        # Other ranks wait for the plan as long as rank 0 makes it.
        is_consequence = stage == "broadcast" and longest.get("plan", 0.0) >= EXPLAINED_SHARE * stall_s
        if stall_s < limit_s or is_consequence:
            continue
        cause = stage
        if stage == "wait":
            slowest = max(BACKGROUND, key=lambda name: longest.get(name, 0.0))
            if longest.get(slowest, 0.0) >= EXPLAINED_SHARE * stall_s:
                cause = slowest
        stalls.append((cause, int(ranks[cause]), float(stall_s)))
    return stalls


def host_of(rank: int, attempt: int | None, hosts: Sequence[Event]) -> str:
    """Return the node of a rank in an attempt; empty if it was not recorded."""
    event = next((event for event in reversed(hosts) if event.get("attempt") == attempt), None)
    first = 0
    for host, count in event["hosts"] if event else ():
        if first <= rank < first + count:
            return str(host)
        first += count
    return ""
