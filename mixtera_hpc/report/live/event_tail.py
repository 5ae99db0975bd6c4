"""Read the events that a run has recorded since the last look. Price: every byte of a file is read once."""

from pathlib import Path
from typing import Any

import msgspec

from mixtera_hpc.track.packed_events import EventUnpacker

__all__ = ["EventTail"]


class EventTail:
    """One stream of events, from its beginning on."""

    def __init__(self, path: Path) -> None:
        """Read nothing yet. The file may not exist yet."""
        self._path = path
        self._offset = 0
        self._unpacker = EventUnpacker()

    def new_events(self) -> list[dict[str, Any]]:
        """Return the events recorded since the last call. Damaged lines are left out; `report` names them."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        complete, newline, _ = data.rpartition(b"\n")
        self._offset += len(complete) + len(newline)
        decoded = (self._decode(line) for line in complete.split(b"\n") if line)
        return [event for event in decoded if event is not None]

    def _decode(self, line: bytes) -> dict[str, Any] | None:
        # Values that were packed and are damaged end in one of these errors, as damaged JSON does.
        try:
            event = msgspec.json.decode(line)
            is_event = isinstance(event, dict) and isinstance(event.get("step"), int)
            return self._unpacker.unpack(event) if is_event else None
        except (msgspec.DecodeError, RecursionError, ValueError, TypeError, KeyError, IndexError):
            return None
