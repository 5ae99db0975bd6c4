"""Report the rank that dies without an exception: killed by the kernel, killed by a user, or crashed in native code.

MPICH's mpiexec prints a process id at best. Every node gets one sentinel process (`sentinel.py`), which waits for the
ends of the node's ranks, and a board in shared memory, where each rank stores its step and its state.

Price: one Allgather of 32 bytes per rank and one of 8 bytes at start, and one store per step.
"""

import contextlib
import mmap
import os
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import numpy as np

from mixtera_hpc.comm import sentinel
from mixtera_hpc.comm.communicator import Communicator, bcast_bytes
from mixtera_hpc.comm.node_memory import machine_key
from mixtera_hpc.comm.sentinel import FINISHED, REPORTED, RUNNING, SLOT
from mixtera_hpc.errors import MixteraError, is_clean_exit

__all__ = ["FailureWatch", "start_failure_watch"]

SENTINEL_GRACE_S = 3.0
"""Seconds for which a rank with a foreign error waits for the sentinel to report another rank as the cause."""


LAUNCHERS = ("mpiexec", "mpiexec.hydra", "mpirun", "prterun", "orterun", "srun", "torchrun", "pt_elastic")
"""Names of processes that start ranks."""


class FailureWatch:
    """Tell the sentinel of this node how this rank is doing.

    As a context manager it marks a clean exit as such, and records any other exception as the failure of the run.
    """

    def __init__(
        self, comm: Communicator, failure_file: Path | None, board: mmap.mmap | None = None, slot: int = 0
    ) -> None:
        """Use `start_failure_watch`, which makes the board and starts the sentinel.

        Args:
            comm: names this rank in reports.
            failure_file: receives the first failure of the attempt; None to record nothing.
            board: shared memory with one slot per rank of the node; None without a sentinel.
            slot: position of this rank on the board.
        """
        self._comm = comm
        self._failure_file = failure_file
        self._board = board
        self._offset = slot * SLOT.size
        self._step = -1
        self._owned: list[object] = []

    def step(self, number: int) -> None:
        """Record that step `number` is complete. Costs one store."""
        self._step = number
        self._set_state(RUNNING)

    def mark_finished(self) -> None:
        """Record that this rank exits cleanly, so that its end is not reported."""
        self._set_state(FINISHED)

    def record_failure(self, error: BaseException) -> None:
        """Record that this rank failed, unless another failure is recorded. Ranks killed from now on are not reported.

        A library notices a lost peer before the kernel has ended it (gloo: connection reset). So an exception that is
        not one of ours waits for the sentinel first, which may know the rank that caused it.
        """
        if isinstance(error, Exception) and not isinstance(error, MixteraError):
            self._wait_for_sentinel()
        self._set_state(REPORTED)
        if self._failure_file is not None:
            first_line = str(error).strip().partition("\n")[0]
            facts = {
                "rank": self._comm.rank,
                "host": self._comm.hostname,
                "pid": os.getpid(),
                "step": self._step if self._step >= 0 else None,
                "reason": f"{type(error).__name__}: {first_line}",
            }
            sentinel.record_failure(str(self._failure_file), facts)

    def __enter__(self) -> "FailureWatch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or is_clean_exit(error):
            self.mark_finished()
        else:
            self.record_failure(error)

    def own(self, resource: object) -> None:
        """Keep a reference to `resource` for as long as this object lives."""
        self._owned.append(resource)

    def _wait_for_sentinel(self) -> None:
        deadline = time.monotonic() + SENTINEL_GRACE_S
        while self._board is not None and time.monotonic() < deadline and not self._failure_is_recorded():
            time.sleep(0.02)

    def _failure_is_recorded(self) -> bool:
        return self._failure_file is not None and self._failure_file.exists()

    def _set_state(self, state: int) -> None:
        if self._board is not None:
            SLOT.pack_into(self._board, self._offset, self._step, state)


def start_failure_watch(comm: Communicator, failure_file: Path | None, *, heartbeat_s: float = 5.0) -> FailureWatch:
    """Start the sentinel of every node and return this rank's connection to it. **Collective.**

    Without pidfds (kernels before 5.3), or if the ranks of a node cannot see each other's processes, no sentinel is
    started. Exceptions are still recorded.

    Args:
        comm: the ranks to watch.
        failure_file: receives the first failure of the attempt; None to record nothing.
        heartbeat_s: seconds between two signs of life of a node, as `job.heartbeat_s`.
    """
    if comm.size == 1:
        return FailureWatch(comm, failure_file)

    # The first rank of every node makes the board; the others open it through /proc.
    own_board = _make_board(comm.size)
    read_end, write_end = os.pipe()
    rows = comm.Allgather(np.array([_node_key(), os.getpid(), own_board, read_end], np.int64))
    node_ranks = [rank for rank in range(comm.size) if rows[rank, 0] == rows[comm.rank, 0]]
    first = node_ranks[0]
    board = _open_board(pid=int(rows[first, 1]), fd=int(rows[first, 2]))
    can_watch = bool(comm.Allgather(np.array([board is not None], np.int64))[node_ranks].all())
    watch = FailureWatch(comm, failure_file, board if can_watch else None, node_ranks.index(comm.rank))
    link, listener = _open_link(comm, num_nodes=len(set(rows[:, 0].tolist())), is_first_of_node=comm.rank == first)
    if can_watch and comm.rank == first:
        ranks = [f"{rank}:{rows[rank, 1]}:{rows[rank, 3]}" for rank in node_ranks]
        facts = [str(own_board), str(failure_file or ""), comm.hostname, link, str(heartbeat_s), str(_launcher_pid())]
        watch.own(_start_sentinel([*facts, *ranks], [own_board, *([] if listener is None else [listener.fileno()])]))
    comm.Barrier()
    if listener is not None:
        listener.close()

    # The sentinel has opened the pipes by now. The kernel closes the write end when this process dies.
    watch.own(write_end)
    os.close(read_end)
    if own_board >= 0:
        os.close(own_board)
    return watch


def _open_link(comm: Communicator, num_nodes: int, *, is_first_of_node: bool) -> tuple[str, socket.socket | None]:
    """Return how the sentinel of this node reaches the others, and rank 0's listening socket. **Collective.**"""
    if num_nodes == 1:
        return "-", None
    listener: socket.socket | None = None
    address = b"-"
    if comm.rank == 0:
        # Without a network, nodes are watched each on its own.
        with contextlib.suppress(OSError):
            listener = socket.create_server(("", 0), backlog=num_nodes)
            address = f"{comm.hostname}:{listener.getsockname()[1]}:{secrets.token_hex(8)}".encode()
    address = bcast_bytes(comm, address if comm.rank == 0 else None)
    if listener is not None:
        return f"fd:{listener.fileno()}:{address.decode().rpartition(':')[2]}", listener
    return address.decode() if is_first_of_node else "-", None


def _launcher_pid() -> int:
    """Return the process id of the launcher that started this process; 0 if none of its ancestors is one."""
    pid = os.getppid()
    launcher = 0
    with contextlib.suppress(OSError, IndexError, ValueError):
        while pid > 1:
            name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
            if name in LAUNCHERS:
                launcher = pid
            pid = int(rest.split()[1])
    return launcher


def _node_key() -> int:
    """Return a number that is equal for two processes that see each other's process ids."""
    namespaces = []
    with contextlib.suppress(OSError):
        namespaces.append(str(Path("/proc/self/ns/pid").readlink()))
    return machine_key(*namespaces)


def _make_board(num_ranks: int) -> int:
    """Create anonymous shared memory with one slot per rank; return -1 if that or pidfds are not available."""
    try:
        os.close(os.pidfd_open(os.getpid()))
        board = os.memfd_create("mixtera-watch", os.MFD_CLOEXEC)
        os.ftruncate(board, num_ranks * SLOT.size)
    except (AttributeError, OSError):
        return -1
    return board


def _open_board(pid: int, fd: int) -> mmap.mmap | None:
    """Map the board of the node's first rank; return None if it has none or cannot be reached."""
    try:
        board = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    with contextlib.closing(os.fdopen(board, "r+b", buffering=0)):
        return mmap.mmap(board, 0)


def _start_sentinel(arguments: list[str], inherited: list[int]) -> subprocess.Popen[bytes]:
    """Start the sentinel in a separate session, and wait until it watches.

    `Popen` uses vfork, which is safe after MPI_Init: no state of the network library is copied.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-E", sentinel.__file__, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        pass_fds=inherited,
        start_new_session=True,
    )
    if process.stdout is not None:
        with process.stdout as ready:
            ready.read()
    return process
