"""Limit the work of code under test by what it does, not by a clock: executed lines of Python and allocated bytes.

Where counting would be too slow, a generous limit of time turns an endless loop into a failure.
"""

import signal
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["WorkLimitExceeded", "limited_time", "limited_work"]


class WorkLimitExceeded(BaseException):
    """The code did too much. Not an `Exception`, so that the code under test does not handle it."""


@contextmanager
def limited_work(*, lines: int, num_bytes: int) -> Iterator[None]:
    """Stop the body after `lines` executed lines of Python, and measure the peak of the memory it allocates.

    The count is the same on every machine. A loop inside a library of another language is not counted. Memory is that
    of Python and numpy, in bytes.

    Raises:
        WorkLimitExceeded: the body executed more lines, or allocated more than `num_bytes` at a time.
    """
    lines_left = lines

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines_left
        lines_left -= event == "line"
        if lines_left < 0:
            raise WorkLimitExceeded(f"more than {lines} lines, now in {frame.f_code.co_filename}:{frame.f_lineno}")
        return trace

    previous = sys.gettrace()
    tracemalloc.start()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    if peak > num_bytes:
        raise WorkLimitExceeded(f"{peak} bytes of memory at a time, more than {num_bytes}")


@contextmanager
def limited_time(seconds: float) -> Iterator[None]:
    """Stop the body, in the main thread, after some seconds. A loop inside a library of another language goes on.

    Raises:
        WorkLimitExceeded: the time is over.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        place = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "an unknown place"
        raise WorkLimitExceeded(f"more than {seconds} s, now in {place}")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
