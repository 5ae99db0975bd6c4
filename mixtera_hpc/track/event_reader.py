"""Read recorded events, as one uninterrupted run would have written them."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import msgspec

from mixtera_hpc.track.packed_events import EventUnpacker

__all__ = ["read_events"]

_logger = logging.getLogger("mixtera_hpc")


def read_events(path: Path, *, every_attempt: bool = False) -> list[dict[str, Any]]:
    """Return the events of one stream, in order, with one event per step.

    An attempt that resumes at step s repeats everything from s on. So the events of earlier attempts from s on are
    dropped: the last attempt that covers a step wins. An incomplete last line, left by a killed process, is skipped. A
    missing file has no events. A damaged line is skipped with a warning.

    Args:
        path: of `metrics/<stream>.jsonl`.
        every_attempt: return the events of all attempts, including repeated steps.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    complete = lines[:-1]  # The text after the last newline is empty, or an incomplete line.
    unpacker = EventUnpacker()
    decoded = (_decode(line, number, path, unpacker) for number, line in enumerate(complete, 1) if line)
    events = [event for event in decoded if event is not None]
    return events if every_attempt else _without_repeats(events)


def _decode(line: bytes, number: int, path: Path, unpacker: EventUnpacker) -> dict[str, Any] | None:
    # Values that were packed and are damaged end in one of these errors, as damaged JSON does.
    with contextlib.suppress(msgspec.DecodeError, RecursionError, ValueError, TypeError, KeyError, IndexError):
        event = msgspec.json.decode(line)
        numbers = [event.get(name, 0) for name in ("step", "attempt")] if isinstance(event, dict) else []
        if numbers and all(isinstance(number, int | float) for number in numbers):
            return unpacker.unpack(event)
    _logger.warning("%s line %d is not a metric event and is skipped: %r.", path, number, line[:60])
    return None


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
