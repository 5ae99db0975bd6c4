"""The process that reports which rank of a node died first. `failure_watch.py` starts one per node.

    python -I -S -E sentinel.py BOARD_FD FAILURE_FILE HOST RANK:PID:PIPE_FD…

It runs as a script with the standard library only.

How a death is seen: every rank holds the write end of a pipe. When a rank dies, the kernel closes its files, the pipe
before the launcher's socket (files opened later are closed first). epoll keeps the order of these events, however late
this process is scheduled. A process's own end (its pidfd) is signalled only after its last thread is gone. By then the
launcher is already killing the other ranks, so pidfds alone named the wrong rank in 4 of 10 measured cases.

Why a process: it runs in a separate session, which the launcher's clean-up does not reach. A thread in a surviving rank
would be killed before it could report.

Price: one interpreter of 8 MB per node, and no CPU time. It ends after its report, or with the last rank.
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

__all__ = ["FINISHED", "REPORTED", "RUNNING", "SLOT", "main", "record_failure"]

SLOT = struct.Struct("<qq")
"""One rank's slot on the board: its last step (-1 before the first one), and its state."""
RUNNING = 0
"""The rank is at work."""
FINISHED = 1
"""The rank exits cleanly."""
REPORTED = 2
"""The rank failed and has reported it itself."""


def record_failure(failure_file: str, facts: "dict[str, object]") -> None:
    """Write `failure_file`, unless it exists because a failure of any rank is recorded already."""
    facts = {**facts, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    try:
        # Exclusive creation: of several nodes, the first one wins.
        file = os.open(failure_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError:
        return
    os.write(file, json.dumps(facts).encode() + b"\n")
    os.close(file)


def main(argv: "list[str]") -> None:
    """Wait until a rank dies without having finished or reported, and report it."""
    board = mmap.mmap(int(argv[1]), 0, prot=mmap.PROT_READ)
    failure_file = argv[2]
    host = argv[3]
    ranks = [tuple(map(int, word.split(":"))) for word in argv[4:]]
    for slot in _deaths([(pid, pipe) for _, pid, pipe in ranks]):
        slots = [SLOT.unpack_from(board, number * SLOT.size) for number in range(len(ranks))]
        step, state = slots[slot]
        if any(state == REPORTED for _, state in slots):
            return
        if state == RUNNING:
            rank, pid, _ = ranks[slot]
            _report({"rank": rank, "host": host, "pid": pid, "step": step if step >= 0 else None}, failure_file)
            return


def _deaths(processes: "list[tuple[int, int]]") -> "Iterator[int]":
    """Yield positions in `processes` in the order in which they die, some twice; end when all are gone.

    Args:
        processes: process id, and number of its pipe's write end in that process.
    """
    epoll = select.epoll()
    alive = set()
    slots = {}
    already_dead = []
    for slot, (pid, pipe) in enumerate(processes):
        try:
            process_end = os.pidfd_open(pid)
            pipe_end = os.open(f"/proc/{pid}/fd/{pipe}", os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            already_dead.append(slot)
            continue
        slots[process_end] = slots[pipe_end] = slot
        alive.add(process_end)
        epoll.register(process_end, select.EPOLLIN)
        epoll.register(pipe_end, 0)  # epoll always reports a hang-up; no other event is of interest.
    os.write(1, b"!")  # Ready: `start_failure_watch` waits for this.
    os.close(1)

    yield from already_dead
    while alive:
        for fd, _ in epoll.poll():
            epoll.unregister(fd)
            alive.discard(fd)
            yield slots[fd]


def _report(facts: "dict[str, object]", failure_file: str) -> None:
    """Write to stderr and, unless it is empty, to `failure_file` that a rank died."""
    if os.path.exists(failure_file):  # noqa: PTH110
        return  # A rank of another node failed first, and the launcher killed the ranks of this node.
    when = "before its first step ended" if facts["step"] is None else f"after step {facts['step']}"
    facts["reason"] = f"was killed or crashed {when}"
    with contextlib.suppress(OSError):  # stderr may be closed by now; the file remains.
        os.write(2, "[rank {rank} on {host}] {reason} (pid {pid})\n".format(**facts).encode())
    if failure_file:
        record_failure(failure_file, facts)


if __name__ == "__main__":
    main(sys.argv)
