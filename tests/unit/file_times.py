"""Times of files. A clock of files may stand still for milliseconds or, on some file systems, for seconds."""

import os
import time
from pathlib import Path

__all__ = ["make_old", "wait_for_new_time"]

OLD_NS = 10**18
"""A time in the past: whoever writes or touches the file gives it another one."""


def make_old(*paths: Path) -> None:
    """Give files a modification time in the past, so that every later write is seen by its time."""
    for path in paths:
        os.utime(path, ns=(OLD_NS, OLD_NS))


def wait_for_new_time(path: Path) -> None:
    """Wait until the clock has moved on since `path` was changed, so that the next change gives another change time."""
    probe = path.with_name(f".{path.name}.clock")
    changed_ns = path.stat().st_ctime_ns
    probe.touch()
    while probe.stat().st_ctime_ns <= changed_ns:
        time.sleep(1e-3)
        probe.touch()
    probe.unlink()
