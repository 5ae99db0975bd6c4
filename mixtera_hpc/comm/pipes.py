"""Wait until the other end of a pipe has read everything that was written."""

import fcntl
import os
import stat
import struct
import termios
import time

__all__ = ["wait_until_read"]

POLL_S = 0.002


def wait_until_read(descriptor: int, limit_s: float) -> bool:
    """Wait until the reader of a pipe has read everything that was written to it, for at most `limit_s`.

    Return True if the pipe is empty, or if `descriptor` is no pipe (a file, a terminal, closed).
    """
    deadline = time.monotonic() + limit_s
    while _unread_bytes(descriptor) > 0:
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)
    return True


def _unread_bytes(descriptor: int) -> int:
    try:
        if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            return 0
        return int(struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))[0])
    except OSError:  # Closed, or the system does not support FIONREAD.
        return 0
