"""Read recorded events, as one uninterrupted run would have written them."""

from pathlib import Path
from typing import Any

import msgspec

from mixtera_hpc.errors import DataError

__all__ = ["read_events"]


def read_events(path: Path, *, every_attempt: bool = False) -> list[dict[str, Any]]:
    """Return the events of one stream, in order, with one event per step.

    An attempt that resumes at step s repeats everything from s on. So the events of earlier attempts from s on are
    dropped: the last attempt that covers a step wins. An incomplete last line, left by a killed process, is skipped. A
    missing file has no events.

    Args:
        path: of `metrics/<stream>.jsonl`.
        every_attempt: return the events of all attempts, including repeated steps.

    Raises:
        DataError: a complete line is not an event; the message has its number.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    complete = lines[:-1]  # The text after the last newline is empty, or an incomplete line.
    events = [_decode(line, number, path) for number, line in enumerate(complete, 1) if line]
    return events if every_attempt else _without_repeats(events)


def _decode(line: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        event = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        event = None
    if not isinstance(event, dict):
        raise DataError(f"{path} line {number} is not a metric event: {line[:60]!r}.\n  Delete that line to continue.")
    return event


def _without_repeats(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events that no later attempt repeats."""
    # An attempt counts up to the first step of any later attempt.
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
