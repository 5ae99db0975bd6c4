"""Descriptors that the process of the tests holds."""

import gc
import os

__all__ = ["num_open"]


def num_open() -> int:
    """Return the number of open descriptors, without those that only garbage of earlier tests holds."""
    gc.collect()
    # The entries change while they are listed, and pathlib may open files by a function that a test replaces.
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208
