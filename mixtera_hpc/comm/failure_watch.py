"""Naming the rank that dies without a word: killed by the kernel, by a node's owner, or by a bug in a library.

MPICH's mpiexec prints a process number at best. Every node gets one `sentinel.py`, which waits on the processes of its
ranks, and a board in shared memory on which each rank notes its step and its goodbye. Price: one Allgather of 24 bytes per
rank and one of 8 at start, one store per step.
"""

import contextlib
import hashlib
import mmap
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import numpy as np

from mixtera_hpc.comm import sentinel
from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.comm.sentinel import GOODBYE, SLOT, TOLD
from mixtera_hpc.errors import MixteraError, is_clean_exit

__all__ = ["FailureWatch", "start_failure_watch"]

GIVE_WAY_S = 2.0
"""How long the sentinel gets to name a dead rank before a survivor's error is taken for the cause."""


class FailureWatch:
    """One rank's word to the sentinel of its node. As a context manager it takes leave, or records what failed."""

    def __init__(self, comm: Communicator, folder: Path | None, board: mmap.mmap | None = None, slot: int = 0) -> None:
        self._comm = comm
        self._folder = folder
        self._board = board
        self._offset = slot * SLOT.size
        self._step = -1
        self._held: list[object] = []

    def step(self, number: int) -> None:
        """Note that step `number` is done; costs a store."""
        self._step = number
        self._put(sentinel.RUNNING)

    def goodbye(self) -> None:
        """This rank leaves in an orderly way; its end is not news."""
        self._put(GOODBYE)

    def failed(self, error: BaseException) -> None:
        """Record that this rank failed, unless another did before; others may be killed from now on without being named.

        What a library says of a peer it lost (gloo: connection reset) is heard sooner than the death itself: an error that is
        not our own gives way to the sentinel.
        """
        if isinstance(error, Exception) and not isinstance(error, MixteraError):
            self._give_way()
        self._put(TOLD)
        if self._folder is not None:
            words = str(error).strip().splitlines()
            facts = {"rank": self._comm.rank, "host": self._comm.hostname, "pid": os.getpid()}
            reason = f"{type(error).__name__}: {words[0] if words else ''}"
            step = self._step if self._step >= 0 else None
            sentinel.report(str(self._folder), {**facts, "step": step, "reason": reason})

    def __enter__(self) -> "FailureWatch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or is_clean_exit(error):
            self.goodbye()
        else:
            self.failed(error)

    def hold(self, thing: object) -> None:
        """Keep what must live as long as this rank."""
        self._held.append(thing)

    def _give_way(self) -> None:
        deadline = time.monotonic() + GIVE_WAY_S
        while self._board is not None and time.monotonic() < deadline and not self._is_named():
            time.sleep(0.02)

    def _is_named(self) -> bool:
        return self._folder is not None and (self._folder / "failure.json").exists()

    def _put(self, state: int) -> None:
        if self._board is not None:
            SLOT.pack_into(self._board, self._offset, self._step, state)


def start_failure_watch(comm: Communicator, folder: Path | None) -> FailureWatch:
    """Watch over the ranks of every node; `folder` is the attempt's, for `failure.json`. **Collective.**

    Where the kernel has no pidfds (before 5.3), or ranks of a node cannot see each other, nothing is named.
    """
    if comm.size == 1:
        return FailureWatch(comm, folder)
    own = _make_board(comm.size)
    reading, writing = os.pipe()
    rows = comm.Allgather(np.array([_node_key(), os.getpid(), own, reading], np.int64))
    mates = [rank for rank in range(comm.size) if rows[rank, 0] == rows[comm.rank, 0]]
    board = _open_board(pid=int(rows[mates[0], 1]), fd=int(rows[mates[0], 2]))
    ready = bool(comm.Allgather(np.array([board is not None], np.int64))[mates].all())
    watch = FailureWatch(comm, folder, board if ready else None, mates.index(comm.rank))
    if ready and comm.rank == mates[0]:
        words = [f"{rank}:{rows[rank, 1]}:{rows[rank, 3]}" for rank in mates]
        watch.hold(_start_sentinel([str(own), str(folder or ""), comm.hostname, *words], own))
    comm.Barrier()
    watch.hold(writing)  # The kernel closes it with the process, which is what the sentinel waits for.
    os.close(reading)
    if own >= 0:
        os.close(own)
    return watch


def _node_key() -> int:
    """The same for two processes that see each other's process numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    parts = [socket.gethostname(), boot.read_text() if boot.exists() else ""]
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return int.from_bytes(hashlib.blake2b("|".join(parts).encode(), digest_size=8).digest(), "big", signed=True)


def _make_board(num_ranks: int) -> int:
    """Nameless shared memory with a slot per rank; -1 where there is none, or no pidfds to go with it."""
    try:
        os.close(os.pidfd_open(os.getpid()))
        board = os.memfd_create("mixtera-watch", os.MFD_CLOEXEC)
        os.ftruncate(board, num_ranks * SLOT.size)
    except (AttributeError, OSError):
        return -1
    return board


def _open_board(pid: int, fd: int) -> mmap.mmap | None:
    """The board of the node's first rank; None when it made none or cannot be reached."""
    try:
        board = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    with contextlib.closing(os.fdopen(board, "r+b", buffering=0)):
        return mmap.mmap(board, 0)


def _start_sentinel(arguments: list[str], board: int) -> subprocess.Popen[bytes]:
    """Start it and wait until it watches. Its own session, so that a launcher's clean-up passes it by.

    `Popen` uses vfork, which is safe after MPI_Init; nothing of the network stack is copied.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-E", sentinel.__file__, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        pass_fds=[board],
        start_new_session=True,
    )
    if process.stdout is not None:
        with process.stdout as ready:
            ready.read()
    return process
