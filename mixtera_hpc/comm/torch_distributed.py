"""The communicator of a job that has a torch process group: torchrun, accelerate, Lightning and others.

Collectives run over gloo groups of our own beside the trainer's group. So they work on numpy arrays while the trainer's
group is NCCL, and neither delays the other. Threads of gloo carry the messages; they sleep while they wait.

Price: per communicator three threads and, on every rank, one TCP connection to each other rank. For thousands of ranks
set TORCH_GLOO_LAZY_INIT=1: gloo then connects only ranks that exchange messages.
"""

import contextlib
import os
import secrets
import socket
import sys
import time
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.distributed_c10d import _get_process_group_store

from mixtera_hpc.comm.communicator import (
    COMPLETED_REQUEST,
    CollectiveRequest,
    Op,
    SharedCounters,
    bcast_dtype_and_shape,
    byte_segments,
    wait,
)
from mixtera_hpc.comm.node_memory import create_memory, map_memory, memory_folder_key, unlink_memory
from mixtera_hpc.errors import CommError, LaunchError

__all__ = ["TorchDistributed", "create_process_group", "has_process_group"]

TIMEOUT = timedelta(days=7)
"""Time limit of a collective. Ranks wait for a broadcast of rank 0 as long as a step, a save or a compilation
takes, and MPI has no limit either. A rank that dies closes its connections, which is noticed at once."""

FAILED_RANK_KEY = "failed_rank"
"""In the store of the group: the first rank that aborted the job."""

FAILED_RANK_WAIT_S = 1.0
"""Seconds for which a rank that has lost a connection waits for the name of the rank that failed."""


def has_process_group() -> bool:
    """Return True if torch's default process group is initialised in this process."""
    return dist.is_available() and dist.is_initialized()


def create_process_group() -> None:
    """Create torch's default process group from the variables that torchrun sets. **Collective.**

    With GPUs, tensors on GPUs use NCCL and those on CPUs use gloo.
    """
    if torch.cuda.is_available() and dist.is_nccl_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")


class _GlooGroup:
    """Collectives of one gloo group on numpy arrays."""

    def __init__(self, store: dist.Store, failures: dist.Store, rank: int, size: int) -> None:
        """Connect the ranks. **Collective.**

        Args:
            store: belongs to this group alone; the ranks find each other through it.
            failures: where a rank that aborts leaves its name.
            rank: number of this process in the group.
            size: number of ranks.
        """
        self.rank = rank
        self.size = size
        self._failures = failures
        # Not dist.new_group: that is collective over the default group, not over the ranks of this one, and such a
        # group ends with the trainer's destroy_process_group().
        self._group: Any = dist.ProcessGroupGloo(store, rank, size, TIMEOUT)  # Any: torch's stubs lack its collectives.

    def broadcast(self, array: NDArray[Any], root: int) -> CollectiveRequest:
        """Start a broadcast of an array of any dtype. **Collective.**"""
        if array.nbytes == 0:
            return COMPLETED_REQUEST
        if not array.flags.writeable:
            array = array.copy()  # Only on the root: torch has no read-only tensors.
        options = dist.BroadcastOptions()
        options.rootRank = root
        return self._request(self._group.broadcast([_as_bytes(array)], options))

    def all_reduce(self, array: NDArray[Any], op: Op) -> CollectiveRequest:
        """Start a reduction in place. **Collective.**"""
        if array.size == 0:
            return COMPLETED_REQUEST
        options = dist.AllreduceOptions()
        operation: Any = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op]
        options.reduceOp = operation
        return self._request(self._group.allreduce([torch.from_numpy(array)], options))

    def all_gather(self, array: NDArray[Any], result: NDArray[Any]) -> CollectiveRequest:
        """Start to gather the arrays of all ranks in the rows of `result`. **Collective.**"""
        if array.nbytes == 0:
            return COMPLETED_REQUEST
        rows = [_as_bytes(row) for row in result]
        return self._request(self._group.allgather([rows], [_as_bytes(array.copy())]))

    def _request(self, work: dist.Work) -> CollectiveRequest:
        return _GlooRequest(work, self._failures)


class _GlooRequest:
    """A collective of gloo in progress. torch keeps its arrays alive."""

    def __init__(self, work: dist.Work, failures: dist.Store) -> None:
        self._work = work
        self._failures = failures
        self._is_complete = False

    def Test(self) -> bool:
        """Return True if the collective is complete.

        Raises:
            CommError: another rank aborted the job.
            RuntimeError: a connection was lost; the rank may have been killed.
        """
        if self._is_complete or not self._work.is_completed():
            return self._is_complete
        try:
            self._work.wait()  # Does not block any more; raises what went wrong.
        except RuntimeError as error:
            failed = _failed_rank(self._failures)
            if failed is None:
                raise
            raise CommError(f"{failed} has failed and ends the job.") from error
        self._is_complete = True
        return True


class _GlooCommunicator:
    """A `Communicator` over a gloo group of its own."""

    def __init__(self, store: dist.Store, failures: dist.Store, rank: int, size: int) -> None:
        """Connect the ranks. **Collective.** Arguments as for `_GlooGroup`."""
        self.rank = rank
        self.size = size
        self.hostname = socket.gethostname()
        self._store = store
        self._failures = failures
        self._group: _GlooGroup | None = _GlooGroup(dist.PrefixStore("ranks", store), failures, rank, size)

        # Ranks that share /dev/shm are one node. The token makes names in it unique.
        own = np.array([memory_folder_key(), secrets.randbits(63)], np.int64)
        rows = self.Allgather(own)
        node_ranks = np.flatnonzero(rows[:, 0] == own[0]).tolist()
        self._token = int(rows[0, 1])
        self.local_rank: int = node_ranks.index(rank)
        self.local_size: int = len(node_ranks)
        self._leaders = self._connect_leaders(rows[:, 0].tolist())

        self._duplicates: list[_GlooCommunicator] = []
        self._num_duplicates = 0
        self._num_shared = 0
        self._num_counters = 0

    def Dup(self) -> "_GlooCommunicator":
        return self._connect("duplicate", list(range(self.size)))

    def Split(self, color: int) -> "_GlooCommunicator":
        colors = self.Allgather(np.array([color], np.int64))[:, 0]
        return self._connect(f"color{color}.", np.flatnonzero(colors == color).tolist())

    def Barrier(self) -> None:
        # Not gloo's barrier: that one waits for every earlier request of the group.
        self.Allreduce(np.zeros(1, np.int64))

    def Bcast(self, buffer: NDArray[Any], root: int = 0) -> None:
        for segment in byte_segments(buffer):
            wait(self._open_group().broadcast(segment, root))

    def Ibcast(self, buffer: NDArray[Any], root: int = 0) -> CollectiveRequest:
        return self._open_group().broadcast(buffer, root)

    def Allreduce(self, buffer: NDArray[Any], op: Op = "sum") -> NDArray[Any]:
        result = np.empty_like(buffer)
        wait(self.Iallreduce(buffer, result, op))
        return result

    def Iallreduce(self, buffer: NDArray[Any], result: NDArray[Any], op: Op = "sum") -> CollectiveRequest:
        result[...] = buffer
        return self._open_group().all_reduce(result, op)

    def Allgather(self, buffer: NDArray[Any]) -> NDArray[Any]:
        result = np.empty((self.size, *buffer.shape), buffer.dtype)
        wait(self._open_group().all_gather(np.ascontiguousarray(buffer), result))
        return result

    def Allocate_shared(self, array: NDArray[Any] | None) -> NDArray[Any]:
        dtype, shape = bcast_dtype_and_shape(self, array)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        memory = self._map_node_memory(size)
        shared = np.frombuffer(memory, np.uint8, size).view(dtype).reshape(shape)

        # Rank 0 fills its own memory and sends the content to the first rank of every other node.
        if self.rank == 0:
            shared[...] = array
        if self._leaders is not None:
            for segment in byte_segments(shared):
                wait(self._leaders.broadcast(segment, 0))
        self.Barrier()
        shared.flags.writeable = False
        return shared

    def Allocate_counters(self, count: int) -> SharedCounters:
        self._num_counters += 1
        counters = _StoreCounters(self, dist.PrefixStore(f"counters{self._num_counters}", self._store), count)
        self.Barrier()
        return counters

    def Free(self) -> None:
        for duplicate in self._duplicates:
            duplicate.Free()
        self._duplicates.clear()
        # Shared memory is unmapped with the last array that refers to it; its name is gone already.
        self._leaders = None
        self._group = None

    def Abort(self, code: int) -> None:
        """End this process. The launcher ends the others, and their collectives fail because a connection is lost."""
        with contextlib.suppress(RuntimeError):  # The store may have ended with the rank that hosts it.
            self._failures.compare_set(FAILED_RANK_KEY, "", f"Rank {self.rank} on {self.hostname}")
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: gloo's threads may wait for other ranks, and the interpreter would wait for them.
        os._exit(code)

    def _open_group(self) -> _GlooGroup:
        if self._group is None:
            raise CommError("This communicator was freed.")
        return self._group

    def _connect(self, name: str, members: list[int]) -> "_GlooCommunicator":
        """Return a communicator of some ranks of this one, to which this rank belongs. **Collective.**"""
        self._num_duplicates += 1
        store = dist.PrefixStore(f"{name}{self._num_duplicates}", self._store)
        duplicate = _GlooCommunicator(store, self._failures, members.index(self.rank), len(members))
        self._duplicates.append(duplicate)
        return duplicate

    def _connect_leaders(self, node_of_rank: list[int]) -> _GlooGroup | None:
        """Return the group of the first ranks of all nodes, None on other ranks and on a single node."""
        leaders = [node_of_rank.index(node) for node in dict.fromkeys(node_of_rank)]
        if len(leaders) == 1 or self.rank not in leaders:
            return None
        store = dist.PrefixStore("leaders", self._store)
        return _GlooGroup(store, self._failures, leaders.index(self.rank), len(leaders))

    def _map_node_memory(self, size: int) -> Any:
        """Return `size` bytes that the ranks of this node share. **Collective.**

        Raises:
            CommError: /dev/shm of a node is too small, or a rank cannot map the memory; raised on every rank.
        """
        name = f"mixtera-{self._token:016x}-{self._num_shared}"
        self._num_shared += 1
        is_leader = self.local_rank == 0
        memory, problem = None, None
        try:
            if is_leader:
                memory, problem = _try_memory(create_memory, name, size)
            self._refuse_problem(problem, size)
            if not is_leader:
                memory, problem = _try_memory(map_memory, name, size)
            self._refuse_problem(problem, size)
        finally:
            # Also after a failure of another rank: nothing may stay in /dev/shm.
            if is_leader:
                unlink_memory(name)
        return memory

    def _refuse_problem(self, problem: OSError | None, size: int) -> None:
        """Raise CommError on every rank if one of them has a problem. **Collective.**"""
        failed = np.flatnonzero(self.Allgather(np.array([problem is not None])))
        if len(failed):
            reason = f" ({problem})" if problem else ""
            raise CommError(
                f"The node of rank {failed[0]} has no {size} bytes of shared memory in /dev/shm{reason}.\n"
                "  Give the container a larger /dev/shm (docker: --shm-size or --ipc=host)."
            )


class TorchDistributed(_GlooCommunicator):
    """The `Communicator` of the ranks of a torch process group, on gloo groups of its own beside that group."""

    def __init__(self, group: "dist.ProcessGroup | None" = None, *, owns_process_group: bool = False) -> None:
        """Connect the ranks of `group`. **Collective.**

        Args:
            group: any backend; None: the default group.
            owns_process_group: `Free` also destroys torch's default process group.

        Raises:
            LaunchError: there is no process group.
        """
        if not has_process_group():
            raise LaunchError(
                "There is no torch process group.\n  Call init_process_group (or create the Accelerator) first. To run "
                "without a process group, set dataplane.comm=auto."
            )
        self._owns_process_group = owns_process_group
        members = dist.group.WORLD if group is None else group
        assert members is not None  # An initialised default group is `dist.group.WORLD`.
        rank = dist.get_rank(members)
        store = dist.PrefixStore("mixtera_hpc", _get_process_group_store(members))
        # Every rank counts its own communicators of this group. They are opened in the same order, so the numbers
        # agree.
        number = store.add(f"opened/{rank}", 1)
        super().__init__(dist.PrefixStore(str(number), store), store, rank, dist.get_world_size(members))

    def Free(self) -> None:
        super().Free()
        if self._owns_process_group and has_process_group():
            dist.destroy_process_group()


class _StoreCounters:
    """Shared counters in the key-value store of the process group, whose additions are atomic."""

    def __init__(self, comm: _GlooCommunicator, store: dist.Store, count: int) -> None:
        self._comm = comm
        self._store = store
        self._count = count

    def Fetch_and_add(self, position: int, value: int) -> int:
        return int(self._store.add(str(position), value)) - value

    def Free(self) -> None:
        self._comm.Barrier()
        if self._comm.rank == 0:
            for position in range(self._count):
                self._store.delete_key(str(position))


def _as_bytes(array: NDArray[Any]) -> Tensor:
    """Return the bytes of a contiguous array as a tensor that shares its memory."""
    return torch.from_numpy(array.reshape(-1).view(np.uint8))


def _try_memory(open_memory: Any, name: str, size: int) -> "tuple[Any, OSError | None]":
    try:
        return open_memory(name, size), None
    except OSError as error:
        return None, error


def _failed_rank(failures: dist.Store) -> str | None:
    """Return the rank that aborted the job, or None if no rank says so in time."""
    deadline = time.monotonic() + FAILED_RANK_WAIT_S
    with contextlib.suppress(RuntimeError):  # The store may have ended with the rank that hosts it.
        while time.monotonic() < deadline:
            if failures.check([FAILED_RANK_KEY]):
                return failures.get(FAILED_RANK_KEY).decode()
            time.sleep(0.02)
    return None
