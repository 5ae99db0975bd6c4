"""The process that reports which rank of a node died first. `failure_watch.py` starts one per node.

    python -I -S -E sentinel.py BOARD_FD FAILURE_FILE HOST LINK HEARTBEAT_S LAUNCHER_PID RANK:PID:PIPE_FD…

It runs as a script with the standard library only.

How a death is seen: every rank holds the write end of a pipe. When a rank dies, the kernel closes its files, the pipe
before the launcher's socket (files opened later are closed first). epoll keeps the order of these events, however late
this process is scheduled. A process's own end (its pidfd) is signalled only after its last thread is gone. By then the
launcher is already killing the other ranks, so pidfds alone named the wrong rank in 4 of 10 measured cases.

Why a process: it runs in a separate session, which the launcher's clean-up does not reach. A thread in a surviving rank
would be killed before it could report.

How a lost node is seen: the sentinels of the other nodes are connected to that of the first one by TCP, and both sides
send one byte every HEARTBEAT_S seconds. A node is lost if its connection closes without a farewell, or is silent for
three heartbeats.

How a killed launcher is seen: its process is gone when the first rank dies.

Price: one interpreter of 8 MB per node, one byte per heartbeat and node, and no CPU time. It ends after its report, or
with the last rank.
"""

import contextlib
import errno
import json
import mmap
import os
import resource
import select
import socket
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

ENDING = 0x4
"""The kernel's flag of a process that is ending (PF_EXITING), in the ninth field of `/proc/PID/stat`."""

CLOSED_GRACE_S = 1.0
"""A node whose connection closed is lost if nobody has reported another cause within this time."""
FAREWELL = b"F"
NODE_LOST = -1
"""The value for a lost node where positions of ranks are expected."""


class Link:
    """The connection to the sentinel of another node."""

    def __init__(self, connection: socket.socket, key: str, reply: bytes = b"") -> None:
        connection.setblocking(False)
        self.key = key
        self.reply = reply
        """Message to the other sentinel, sent when its key has arrived."""
        self.connection = connection
        self.node = ""
        """Name and ranks of the node, sent by its sentinel."""
        self.last_received_s = time.monotonic()
        self.closed: float | None = None
        """Time at which the connection closed without a farewell."""
        self.has_left = False

    def receive(self) -> None:
        """Read what has arrived."""
        try:
            data = self.connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.last_received_s = time.monotonic()
        if not data and not self.has_left and self.closed is None:
            self.closed = self.last_received_s
        self.has_left = self.has_left or data.endswith(FAREWELL)
        first_line, end_of_line, _ = data.partition(b"\n")
        key, _, node = first_line.decode(errors="replace").lstrip(".").partition(" ")
        if end_of_line and key == self.key:
            self.node = node
            self.send(self.reply)

    def send(self, data: bytes) -> None:
        """Send, or do nothing: a lost connection is noticed by its silence."""
        with contextlib.suppress(OSError):
            self.connection.send(data)

    def loss(self, silence_s: float) -> "str | None":
        """Return why the node counts as lost; None if it does not."""
        now = time.monotonic()
        if self.has_left or not self.node:
            return None
        if self.closed is not None:
            return "its connection closed" if now - self.closed >= CLOSED_GRACE_S else None
        return f"no sign of life for {silence_s:g} s" if now - self.last_received_s >= silence_s else None


class Links:
    """The connections of this sentinel. The first node's listens; the others connect to it."""

    def __init__(self, word: str, hello: str, heartbeat_s: float) -> None:
        """Open them; without a network there are none.

        Args:
            word: `fd:N:KEY` for a listening socket, `HOST:PORT:KEY` to connect to, or `-`. Connections without the key
                are ignored.
            hello: name and ranks of this node.
            heartbeat_s: seconds between two signs of life.
        """
        self.hello = hello
        self.heartbeat_s = heartbeat_s
        self.epoll = select.epoll()
        self.links: dict[int, Link] = {}
        self.listener: socket.socket | None = None
        # The first node sees a lost one earlier than the lost one, if it still runs, misses the first.
        self.silence_s = 3 * heartbeat_s
        self.next_beat = time.monotonic()
        address, _, self.key = word.rpartition(":")
        host, _, number = address.rpartition(":")
        with contextlib.suppress(OSError):
            if host == "fd":
                self.listener = socket.socket(fileno=int(number))
                self.listener.setblocking(False)
                self.epoll.register(self.listener, select.EPOLLIN)
            elif number:
                self.silence_s += 2 * heartbeat_s
                link = Link(socket.create_connection((host, int(number)), timeout=2), self.key)
                link.node = f"{host}, the first node,"  # Until it has sent the numbers of its ranks.
                link.send(f"{self.key} {hello}\n".encode())
                self._add(link)

    def timeout_s(self) -> float:
        """Return how long to wait for events."""
        if self.listener is None and not self.links:
            return -1
        return 0.5 if any(link.closed for link in self.links.values()) else self.heartbeat_s

    def handle_events(self) -> None:
        """Accept and read what has arrived."""
        for fd, _ in self.epoll.poll(0):
            if self.listener is not None and fd == self.listener.fileno():
                self._accept(self.listener)
                continue
            link = self.links[fd]
            link.receive()
            if link.closed is not None or link.has_left:
                self.epoll.unregister(fd)

    def beat(self) -> None:
        """Send a byte to every other node if it is time."""
        if time.monotonic() >= self.next_beat:
            self.next_beat = time.monotonic() + self.heartbeat_s
            for link in self.links.values():
                link.send(b".")

    def lost_node(self) -> "str | None":
        """Return the description of a lost node; None if there is none."""
        for link in self.links.values():
            if reason := link.loss(self.silence_s):
                return f"node {link.node} was lost: {reason}"
        return None

    def say_farewell(self) -> None:
        """Tell the other nodes that this sentinel ends on purpose."""
        for link in self.links.values():
            link.send(FAREWELL)

    def _accept(self, listener: socket.socket) -> None:
        try:
            link = Link(listener.accept()[0], self.key, f"{self.key} {self.hello}, the first node,\n".encode())
        except OSError as error:
            # Without free descriptors, further nodes are not watched. Other errors affect this connection only.
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self.epoll.unregister(listener.fileno())
            return
        self._add(link)

    def _add(self, link: Link) -> None:
        self.links[link.connection.fileno()] = link
        self.epoll.register(link.connection, select.EPOLLIN)


def record_failure(failure_file: str, facts: "dict[str, object]") -> None:
    """Write `failure_file`, unless it exists because a failure of any rank is recorded already, or the disk is full."""
    facts = {**facts, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    try:
        # Exclusive creation: of several nodes, the first one wins.
        file = os.open(failure_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError:
        return
    line = json.dumps(facts).encode() + b"\n"
    is_written = False
    with contextlib.suppress(OSError):
        is_written = os.write(file, line) == len(line)
    os.close(file)
    if not is_written:
        # The failure itself is what the user must see. Another rank may find space to record it.
        os.unlink(failure_file)  # noqa: PTH108 - this module imports little: it starts with every node.


def main(argv: "list[str]") -> None:
    """Wait until a rank dies without having finished or reported, and report it."""
    # The sentinel of the first node has a connection to every other node; 1,024 descriptors are the usual soft limit.
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    board = mmap.mmap(int(argv[1]), 0, prot=mmap.PROT_READ)
    failure_file = argv[2]
    host = argv[3]
    heartbeat_s = float(argv[5])
    launcher = int(argv[6])
    ranks = [tuple(map(int, word.split(":"))) for word in argv[7:]]
    numbers = ", ".join(str(rank) for rank, _, _ in ranks)
    links = Links(argv[4], f"{host} with rank{'s' if len(ranks) > 1 else ''} {numbers}", heartbeat_s)
    try:
        for slot in _deaths([(pid, pipe) for _, pid, pipe in ranks], links):
            slots = [SLOT.unpack_from(board, number * SLOT.size) for number in range(len(ranks))]
            if any(state == REPORTED for _, state in slots):
                return
            if slot == NODE_LOST:
                if all(state == RUNNING for _, state in slots):
                    step = max(step for step, _ in slots)
                    reason = links.lost_node() or ""
                    _report(
                        {"rank": None, "host": host, "pid": None, "step": _known(step), "reason": reason}, failure_file
                    )
                return
            step, state = slots[slot]
            if state == RUNNING:
                rank, pid, _ = ranks[slot]
                _report(_facts_of_rank(rank, host, pid, _known(step), launcher), failure_file)
                return
    finally:
        links.say_farewell()


def _known(step: int) -> "int | None":
    return step if step >= 0 else None


def _facts_of_rank(rank: int, host: str, pid: int, step: "int | None", launcher: int) -> "dict[str, object]":
    when = "before its first step ended" if step is None else f"after step {step}"
    reason = f"was killed or crashed {when}"
    if launcher and not _is_alive(launcher):
        reason = f"ended {when}, because the launcher of the ranks (process {launcher}) was killed"
    return {"rank": rank, "host": host, "pid": pid, "step": step, "reason": reason}


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return False
    # A zombie has ended, but its parent has not asked for its exit code. A process that is ending has closed its
    # connections before it becomes a zombie, and the ranks may die of that first.
    return fields[0] not in "ZX" and not int(fields[6]) & ENDING


def _deaths(processes: "list[tuple[int, int]]", links: Links) -> "Iterator[int]":
    """Yield positions in `processes` in the order in which they die, some twice; end when all are gone.

    Yield NODE_LOST if another node is lost.

    Args:
        processes: process id, and number of its pipe's write end in that process.
        links: connections to other nodes.
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

    epoll.register(links.epoll, select.EPOLLIN)
    yield from already_dead
    while alive:
        for fd, _ in epoll.poll(links.timeout_s()):
            if fd == links.epoll.fileno():
                links.handle_events()
                continue
            epoll.unregister(fd)
            alive.discard(fd)
            yield slots[fd]
        links.beat()
        if links.lost_node():
            yield NODE_LOST


def _report(facts: "dict[str, object]", failure_file: str) -> None:
    """Write to stderr and, unless it is empty, to `failure_file` that a rank died."""
    if os.path.exists(failure_file):  # noqa: PTH110
        return  # A rank of another node failed first, and the launcher killed the ranks of this node.
    with contextlib.suppress(OSError):  # stderr may be closed by now; the file remains.
        who = "[{host}] {reason}\n" if facts["rank"] is None else "[rank {rank} on {host}] {reason} (pid {pid})\n"
        os.write(2, who.format(**facts).encode())
    if failure_file:
        record_failure(failure_file, facts)


if __name__ == "__main__":
    main(sys.argv)
