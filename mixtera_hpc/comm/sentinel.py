"""One small process per node that names the rank that died first. Started by `watch.py` as a script; standard library only.

    python -I -S -E sentinel.py BOARD_FD FOLDER HOST RANK:PID:PIPE_FD…

Every rank holds one end of a pipe, which the kernel closes when it dies, before the launcher's own socket (later files go
first); epoll keeps the order of such events however late we are woken. A process's end itself, its pidfd, is told only
after the last of its threads is gone, and by then the launcher is killing the others: measured, that alone names the wrong
rank 4 times in 10. The sentinel has its own session, where that clean-up does not reach it; a thread in a surviving rank is
dead before it can speak. Price: one interpreter of 8 MB per node, no CPU. It ends with its report, or with the last rank.
"""

import contextlib
import json
import mmap
import os
import select
import struct
import sys
import time
from collections.abc import Iterator

__all__ = ["GOODBYE", "RUNNING", "SLOT", "TOLD", "main", "report"]

SLOT = struct.Struct("<qq")
"""A rank's place on the board: last step (-1: none), and one of the states below."""
RUNNING, GOODBYE, TOLD = 0, 1, 2
"""At work; left in an orderly way; failed and has said so itself."""


def report(folder: str, facts: "dict[str, object]") -> bool:
    """Write `failure.json` unless a failure is recorded already, whoever saw it; whether this was the first."""
    facts = {**facts, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    try:
        file = os.open(os.path.join(folder, "failure.json"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)  # noqa: PTH118
    except OSError:
        return False
    os.write(file, json.dumps(facts).encode() + b"\n")
    os.close(file)
    return True


def main(argv: "list[str]") -> None:
    board = mmap.mmap(int(argv[1]), 0, prot=mmap.PROT_READ)
    folder, host = argv[2], argv[3]
    ranks = [tuple(map(int, word.split(":"))) for word in argv[4:]]
    for slot in _deaths([(pid, pipe) for _, pid, pipe in ranks]):
        slots = [SLOT.unpack_from(board, number * SLOT.size) for number in range(len(ranks))]
        step, state = slots[slot]
        if any(state == TOLD for _, state in slots):
            return
        if state == RUNNING:
            facts = {"rank": ranks[slot][0], "host": host, "pid": ranks[slot][1], "step": step if step >= 0 else None}
            _name(facts, folder)
            return


def _deaths(processes: "list[tuple[int, int]]") -> "Iterator[int]":
    """Positions in `processes` in the order in which they die, some of them twice; ends when all are gone."""
    epoll, alive, slots = select.epoll(), set(), {}
    early = []
    for slot, (pid, pipe) in enumerate(processes):
        try:
            end = os.pidfd_open(pid)
            closing = os.open(f"/proc/{pid}/fd/{pipe}", os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            early.append(slot)
            continue
        slots[end] = slots[closing] = slot
        alive.add(end)
        epoll.register(end, select.EPOLLIN)
        epoll.register(closing, 0)  # A hang-up is always told.
    os.write(1, b"!")  # Ready: `start_watch` waits for this.
    os.close(1)
    yield from early
    while alive:
        for fd, _ in epoll.poll():
            epoll.unregister(fd)
            alive.discard(fd)
            yield slots[fd]


def _name(facts: "dict[str, object]", folder: str) -> None:
    if folder and os.path.exists(os.path.join(folder, "failure.json")):  # noqa: PTH110, PTH118
        return  # Another node lost the first one; ours were cleaned up after it.
    when = "before its first step ended" if facts["step"] is None else f"after step {facts['step']}"
    facts["reason"] = f"vanished {when}"
    with contextlib.suppress(OSError):  # Perhaps nobody listens any more; the file remains.
        os.write(2, "[rank {rank} on {host}] {reason} (pid {pid})\n".format(**facts).encode())
    if folder:
        report(folder, facts)


if __name__ == "__main__":
    main(sys.argv)
