"""Requests to save or to stop, from signals and from files. A handler only sets a flag; ranks agree on it later."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["STOP_SIGNALS", "RunControl", "block_time_limit_signal"]

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
"""Slurm's warning before the time limit (USR2; USR1 is NCCL's) and a plain request to end."""


def block_time_limit_signal() -> None:
    """From now on the kernel keeps Slurm's warning until a `RunControl` is there to take it; once that is gone, it is ignored.

    By default the signal ends a process: one that is still opening its index, or has just saved and is leaving. A program
    calls this first of all.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])


class RunControl:
    """What this rank has been asked. `control/stop` and `control/save` are looked for by rank 0 only, and removed when seen."""

    def __init__(self, folder: Path | None, watch_files: bool) -> None:
        self._folder = folder if watch_files else None
        self._stop = threading.Event()
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._held: set[signal.Signals] = set()
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._on_signal) for s in STOP_SIGNALS}
            self._held = {signal.Signals(s) for s in signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)}

    def poll(self) -> tuple[bool, bool]:
        """Whether a stop, and whether a save, was asked for since the last poll. A stop stays."""
        if self._take("stop"):
            self._stop.set()
        return self._stop.is_set(), self._take("save")

    def mixture_request(self) -> str | None:
        """What was left in `control/mixture.json` since the last call, which takes it away."""
        if self._folder is None or not (path := self._folder / "mixture.json").exists():
            return None
        text = path.read_text()
        path.unlink(missing_ok=True)
        return text

    def close(self) -> None:
        """Put the signal handlers back; a warning that was held before is ignored: there is nothing more to save."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if number in self._held else handler)
        self._previous = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()

    def _take(self, name: str) -> bool:
        if self._folder is None or not (self._folder / name).exists():
            return False
        (self._folder / name).unlink(missing_ok=True)
        return True
