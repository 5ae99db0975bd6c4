"""Recorded events, as one uninterrupted run would have written them."""

from pathlib import Path
from typing import Any

import msgspec

from mixtera_hpc.errors import DataError

__all__ = ["read_events"]


def read_events(path: Path, *, every_attempt: bool = False) -> list[dict[str, Any]]:
    """The events of one stream, in order, each step told once.

    An attempt that resumed at step s did everything from s on again, so what earlier attempts wrote about those steps is
    dropped: the last attempt that covers a step wins (`every_attempt` keeps all of them). A last line cut by a kill is
    skipped; a missing file has no events.

    Raises:
        DataError: a line that is no event, other than the last; names it.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    complete = lines[:-1]  # What follows the last newline was cut, or is empty.
    events = [_decode(line, number, path) for number, line in enumerate(complete, 1) if line]
    return events if every_attempt else _without_repeats(events)


def _decode(line: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        event = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        event = None
    if not isinstance(event, dict):
        raise DataError(f"{path} line {number} is not a metric event: {line[:60]!r}.\n  Delete that line to go on.")
    return event


def _without_repeats(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first: dict[int, float] = {}
    for event in events:
        attempt = event.get("attempt", 1)
        first[attempt] = min(first.get(attempt, float("inf")), event.get("step", float("inf")))
    ends: dict[int, float] = {}
    end = float("inf")
    for attempt in sorted(first, reverse=True):
        ends[attempt] = end
        end = min(end, first[attempt])
    return [event for event in events if event.get("step", -1) < ends[event.get("attempt", 1)]]
