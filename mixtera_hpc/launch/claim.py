"""Claim an attempt for this process: a run has one writer, and others can see that it lives.

The process that creates `attempts/NNN/claim` owns the attempt. While it lives, it counts in `attempts/NNN/alive`.
Another process compares two values of that counter, so the clocks of hosts do not matter. Batch scripts do the same in
shell (`batch/prologue.sh`). Price: one small file every 3 s, written by one process of a run.
"""

import contextlib
import os
import socket
import threading
import time

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.errors import LaunchError
from mixtera_hpc.launch.attempts import is_alive, read_end, read_start

__all__ = ["Claim", "is_owned_by_other", "is_renewed"]

RENEWAL_S = 3.0
"""Time between two values of the counter."""

SILENCE_S = 12.0
"""An owner whose counter stands still for this long is dead. A file system that several nodes share may delay files."""


class Claim:
    """The claim of this process on one attempt, which a thread renews until `close`."""

    def __init__(self, folder: RunFolder, attempt: int) -> None:
        """Create the claim in the folder of the attempt and start to renew it.

        Raises:
            LaunchError: Another process has claimed the attempt.
        """
        self._counter = folder.alive_counter(attempt)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="mixtera-claim", daemon=True)
        try:
            with folder.claim(attempt).open("x") as file:
                file.write(f"{os.getpid()} 0 {socket.gethostname()}\n")
        except FileExistsError:
            raise LaunchError(
                f"Attempt {attempt} of {folder.run_id} belongs to another process, and a run has one writer.\n"
                f"  See mixtera-hpc status {folder.path}"
            ) from None

        self._thread.start()

    def close(self) -> None:
        """End the renewal."""
        self._ended.set()
        self._thread.join()

    def _renew(self) -> None:
        temporary = self._counter.with_name(f".{self._counter.name}")
        counter = 0
        while not self._ended.wait(RENEWAL_S if counter else 0):
            counter += 1
            # A full disk must not end training; then the owner only looks dead to other hosts.
            with contextlib.suppress(OSError):
                temporary.write_text(f"{counter}\n")
                temporary.rename(self._counter)


def is_owned_by_other(folder: RunFolder, attempt: int) -> bool:
    """Return True if another process or job works on an attempt; a silent owner on another host takes 12 s.

    Attempt 0 stands for none.
    """
    if attempt == 0:
        return False
    start = read_start(folder, attempt)
    if read_end(folder, attempt) is not None or not folder.claim(attempt).exists():
        return False
    if start is not None and start.host == socket.gethostname():
        return start.pid != os.getpid() and is_alive(start)
    return is_renewed(folder, attempt)


def is_renewed(folder: RunFolder, attempt: int) -> bool:
    """Return True if the owner of an attempt lives; waits up to 12 s for its counter to change."""
    # An owner that has just claimed the attempt has no counter yet.
    before = _read(folder, attempt)
    deadline = time.monotonic() + SILENCE_S
    while time.monotonic() < deadline:
        time.sleep(RENEWAL_S / 3)
        if _read(folder, attempt) != before:
            return True
    return False


def _read(folder: RunFolder, attempt: int) -> str | None:
    try:
        return folder.alive_counter(attempt).read_text()
    except OSError:
        return None
