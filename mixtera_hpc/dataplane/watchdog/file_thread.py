"""File operations that the watchdog gives up after some seconds: a hung file system must not stop it."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import msgspec

__all__ = ["FileThread", "to_json", "write_atomically"]


class FileThread:
    """Run file operations in a thread of their own, one at a time."""

    def __init__(self) -> None:
        """Start no thread yet."""
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


def to_json(value: Any) -> bytes:
    """Return one line of JSON."""
    return msgspec.json.encode(value) + b"\n"
