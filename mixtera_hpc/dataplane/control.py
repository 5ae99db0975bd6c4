"""Requests to save or to stop, from signals and control files.

A signal handler only sets a flag. The flags of all ranks travel with the reduction of a step's losses, see
`step_reducer`. This module imports nothing heavy: signals must be blocked before numpy starts threads that would
receive them.
"""

import contextlib
import logging
import os
import signal
import stat
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from mixtera_hpc.config.files.file_trust import is_trusted_request
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.errors import ConfigError

__all__ = ["STOP_SIGNALS", "RunControl", "block_time_limit_signal"]

logger = logging.getLogger("mixtera_hpc")

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
"""Slurm's warning before the time limit (USR2; USR1 is NCCL's) and a plain request to end."""


def block_time_limit_signal() -> None:
    """Block SIGUSR2, so that the kernel keeps Slurm's warning until a `RunControl` takes it.

    By default the signal kills a process: one that is still opening its index, or one that has saved and is leaving. A
    program calls this before anything else. After the `RunControl` is closed, the signal is ignored.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])


class RunControl:
    """Requests that this rank received. Takes over the stop signals of the process until it is closed."""

    def __init__(self, run: RunFolder | None, watch_files: bool) -> None:
        """Install the signal handlers, if this is the main thread.

        Args:
            run: the run's folder; None for a run without one.
            watch_files: look for control files; True on rank 0 only, which removes each file when it sees it.
        """
        self._pid = os.getpid()
        # Joined once, because every step looks for these files, and joining a path takes longer than that.
        self._stop_file = run.stop_request if run is not None else None
        self._save_file = run.save_request if run is not None and watch_files else None
        self._mixture_file = run.mixture_request if run is not None and watch_files else None
        self._ignored: set[tuple[str, int]] = set()
        """Path and inode of the control files of other users, about which a warning was logged."""
        self._stop = threading.Event()
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        """The handlers to restore. Only the main thread may install handlers."""
        self._blocked_before: set[signal.Signals] = set()
        self._wakeup: tuple[int, int] | None = None
        """A pipe to which the interpreter writes the number of every signal, before its handler runs."""
        # Python allows only the main thread to install handlers. A plane that is opened elsewhere sees control files
        # only.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
            self._wakeup = _open_wakeup_pipe()
            # A signal that was blocked and is pending arrives now, at our handler.
            mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            self._blocked_before = {signal.Signals(number) for number in mask}
            leave = weakref.WeakMethod(self._leave_to_parent)
            os.register_at_fork(after_in_child=lambda: (method := leave()) and method())

    def check_process(self) -> None:
        """Refuse a process that was forked from this one.

        It has no reading threads and shares the pipes: it would wait for ever, or serve the same batches again.

        Raises:
            ConfigError: this is another process.
        """
        if os.getpid() != self._pid:
            raise ConfigError(
                f"The data plane was opened in process {self._pid}, and process {os.getpid()} was forked from it.\n"
                "  Iterate it in the process that opens it: set num_workers=0 in a DataLoader. To read in several "
                "processes, set dataplane.workers."
            )

    def poll(self) -> tuple[bool, bool]:
        """Return whether a stop was ever requested, and whether a save was requested since the last call."""
        if self._save_file is None or self._stop_file is None:
            return self._stop.is_set(), False
        if self._exists(self._stop_file) and _take_file(self._stop_file):
            self._stop.set()
        return self._stop.is_set(), self._exists(self._save_file) and _take_file(self._save_file)

    def stop_was_requested(self, look_for_file: bool) -> bool:
        """Return whether a stop was ever requested. For threads: the main thread may be stuck in native code.

        Args:
            look_for_file: also look for `control/stop`, and leave it there.
        """
        if self._wakeup is not None:
            with contextlib.suppress(BlockingIOError):
                if set(STOP_SIGNALS) & set(os.read(self._wakeup[0], 4096)):
                    self._stop.set()
        if look_for_file and self._stop_file is not None and self._exists(self._stop_file):
            self._stop.set()
        return self._stop.is_set()

    def take_mixture_request(self) -> str | None:
        """Return the text of a requested mixture and remove the file; None without one, or if files are not watched.

        Something else under that name (a folder, a pipe, bytes that are not text) is moved aside: reading a pipe would
        wait for ever. Its text is then empty, so that it is refused as a request.
        """
        path = self._mixture_file
        if path is None or not self._exists(path):
            return None
        try:
            is_file = stat.S_ISREG(path.stat().st_mode)
        except OSError:  # No request.
            return None
        try:
            if not is_file:
                raise ValueError("it is not a file")
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            _move_aside(path, str(error))
            return ""
        # The user may have withdrawn the request meanwhile.
        path.unlink(missing_ok=True)
        return text

    def _exists(self, path: Path) -> bool:
        """Return whether a control file exists and counts; warn once about a file that does not count."""
        # One system call without an exception in almost every step. A link that leads nowhere is no request.
        if not os.access(path, os.F_OK):
            return False
        try:
            if is_trusted_request(path):
                return True
            key = str(path), path.lstat().st_ino
        except OSError:
            return False
        if key not in self._ignored:
            self._ignored.add(key)
            logger.warning(
                "%s is ignored: it belongs neither to the owner of %s nor, if the group of that folder may write, to "
                "that group. Remove it.",
                path,
                path.parent,
            )
        return False

    def close(self) -> None:
        """Restore the signal handlers. Signals that were blocked before are ignored: there is nothing left to save."""
        # Restoring the default handler would let a late warning kill a process that is leaving in order.
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if number in self._blocked_before else handler)
        self._previous = {}
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            for end in self._wakeup:
                os.close(end)
            self._wakeup = None

    def _leave_to_parent(self) -> None:
        """Restore the handlers in a process that was forked: signals to it are no requests to this run.

        A pool or loader of the trainer ends its processes with SIGTERM, and waits until they have ended. It also waits
        for their results, so Slurm's warning, which may reach every process of a step, must not end them.
        """
        for number, handler in self._previous.items():
            is_fatal_warning = number == signal.SIGUSR2 and handler == signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if is_fatal_warning else handler)
        self._previous = {}
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            self._wakeup = None  # The pipe is the parent's: a byte in it would stop the run.

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()


def _open_wakeup_pipe() -> tuple[int, int] | None:
    """Let the interpreter write signal numbers to a pipe; return None if another library does that already."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    previous = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    if previous == -1:
        return read_end, write_end
    signal.set_wakeup_fd(previous)
    os.close(read_end)
    os.close(write_end)
    return None


def _take_file(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # A folder: it is a request all the same, and must not be one again.
        _move_aside(path, str(error))
    return True


def _move_aside(path: Path, problem: str) -> None:
    """Rename what cannot be read as a request, so that it is looked at once."""
    aside = path.with_name(f"{path.name}.refused-{time.time_ns()}")
    logger.warning("%s cannot be read as a request (%s); it is moved to %s.", path, problem, aside.name)
    with contextlib.suppress(OSError):
        path.rename(aside)
