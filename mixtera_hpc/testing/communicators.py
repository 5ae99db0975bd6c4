"""Conformance suite for communicators: every rank calls every function of `CHECKS` with its communicator.

Each check is collective and raises AssertionError. A communicator must pass with any number of ranks: collectives are
correct for every root and dtype that the data plane uses, requests complete in any order, and shared arrays are equal
and read-only on all ranks.
"""

from collections.abc import Callable

import numpy as np

from mixtera_hpc.comm.communicator import Communicator, bcast_bytes, wait

__all__ = [
    "CHECKS",
    "check_allgather_stacks_by_rank",
    "check_bcast_bytes_keeps_every_byte",
    "check_bcast_reaches_every_rank_from_every_root",
    "check_counters_are_atomic",
    "check_duplicates_do_not_mix_messages",
    "check_free_is_idempotent",
    "check_ranks_are_numbered",
    "check_reductions_are_exact_integers",
    "check_requests_complete_in_any_order",
    "check_shared_arrays_are_read_only_copies",
    "check_split_separates_colors",
]

LARGE = 300_001
"""Number of elements that exceeds any small-message protocol, and is not a multiple of a block size."""


def check_ranks_are_numbered(comm: Communicator) -> None:
    """Check that the ranks are 0 to size - 1, each once, and that every node has exactly one local rank 0."""
    assert isinstance(comm, Communicator)
    ranks = comm.Allgather(np.array([comm.rank, comm.local_rank, comm.local_size], np.int64))
    assert ranks[:, 0].tolist() == list(range(comm.size))
    assert all(0 <= local < size <= comm.size for _, local, size in ranks.tolist())
    # Every rank of a node adds 1 / local_size, so the sum is the number of nodes.
    num_nodes = round(float((1 / ranks[:, 2]).sum()))
    assert np.count_nonzero(ranks[:, 1] == 0) == num_nodes


def check_bcast_reaches_every_rank_from_every_root(comm: Communicator) -> None:
    """Check `Bcast` and `Ibcast` for every root and for empty, small and large arrays."""
    for root in range(comm.size):
        for size in (0, 1, LARGE):
            expected = np.arange(size, dtype=np.int64) * (root + 1)
            own = expected if comm.rank == root else np.full(size, -1, np.int64)
            first, second = own.copy(), own.copy()
            comm.Bcast(first, root)
            wait(comm.Ibcast(second, root))
            assert np.array_equal(first, expected)
            assert np.array_equal(second, expected)


def check_reductions_are_exact_integers(comm: Communicator) -> None:
    """Check that int64 sums beyond 2^53 are exact (float64 rounds them), and "max" and "min" for any sign."""
    big = np.array([(1 << 55) + comm.rank, -comm.rank, 1], np.int64)
    sum_of_ranks = comm.size * (comm.size - 1) // 2
    assert comm.Allreduce(big).tolist() == [comm.size * (1 << 55) + sum_of_ranks, -sum_of_ranks, comm.size]
    assert comm.Allreduce(big, "max").tolist() == [(1 << 55) + comm.size - 1, 0, 1]
    assert comm.Allreduce(big, "min").tolist() == [1 << 55, 1 - comm.size, 1]
    assert big.tolist() == [(1 << 55) + comm.rank, -comm.rank, 1]


def check_allgather_stacks_by_rank(comm: Communicator) -> None:
    """Check that `Allgather` returns the arrays of all ranks in rank order."""
    own = np.full((2, 3), comm.rank, np.float64)
    gathered = comm.Allgather(own)
    assert gathered.shape == (comm.size, 2, 3)
    assert [set(array.ravel()) for array in gathered] == [{float(rank)} for rank in range(comm.size)]


def check_requests_complete_in_any_order(comm: Communicator) -> None:
    """Check that several collectives can be in progress at once and waited for in any order."""
    plans = [np.full(64, 10 + i if comm.rank == 0 else 0, np.int64) for i in range(4)]
    sums = [np.zeros(64, np.int64) for _ in range(4)]
    requests = [comm.Ibcast(plan) for plan in plans]
    requests += [comm.Iallreduce(np.full(64, i, np.int64), sums[i]) for i in range(4)]
    for request in reversed(requests):
        wait(request)
    assert [int(plan[-1]) for plan in plans] == [10, 11, 12, 13]
    assert [int(total[0]) for total in sums] == [i * comm.size for i in range(4)]


def check_duplicates_do_not_mix_messages(comm: Communicator) -> None:
    """Check that ranks may wait for requests of two duplicates in different orders."""
    first = comm.Dup()
    second = comm.Dup()
    ones = np.full(8, 1 if comm.rank == 0 else 0, np.int64)
    twos = np.full(8, 2 if comm.rank == 0 else 0, np.int64)
    requests = [first.Ibcast(ones), second.Ibcast(twos)]
    if comm.rank % 2 == 0:
        requests.reverse()
    for request in requests:
        wait(request)
    assert (int(ones[0]), int(twos[0])) == (1, 2)


def check_split_separates_colors(comm: Communicator) -> None:
    """Check that `Split` returns the ranks of one color in order, and that colors communicate by themselves."""
    for num_colors in (1, 2, comm.size):
        color = comm.rank % num_colors
        part = comm.Split(color)
        members = list(range(color, comm.size, num_colors))
        assert (part.rank, part.size) == (members.index(comm.rank), len(members))
        assert part.Allgather(np.array([comm.rank], np.int64))[:, 0].tolist() == members
        content = np.array([comm.rank if part.rank == part.size - 1 else -1], np.int64)
        wait(part.Ibcast(content, part.size - 1))
        assert content[0] == members[-1]
        # Only one color takes part, and none waits for the others.
        if color == 0:
            assert part.Allreduce(np.array([1], np.int64)).tolist() == [len(members)]
        assert part.Dup().size == part.size
    comm.Barrier()


def check_shared_arrays_are_read_only_copies(comm: Communicator) -> None:
    """Check that `Allocate_shared` gives every rank the array of rank 0, read-only."""
    for array in (np.arange(LARGE, dtype=np.int64), np.ones((7, 3), np.float32), np.zeros(0, np.uint8)):
        shared = comm.Allocate_shared(array if comm.rank == 0 else None)
        assert shared.dtype == array.dtype and np.array_equal(shared, array)
        assert not shared.flags.writeable


def check_counters_are_atomic(comm: Communicator) -> None:
    """Check that `Fetch_and_add` returns each previous value to one rank only, and loses no addition."""
    counters = comm.Allocate_counters(2)
    previous_values = [counters.Fetch_and_add(0, 1) for _ in range(50 + comm.rank)]
    for value in previous_values:
        counters.Fetch_and_add(1, value)
    comm.Barrier()

    total = counters.Fetch_and_add(0, 0)
    assert total == sum(50 + rank for rank in range(comm.size))
    assert previous_values == sorted(previous_values)
    # All ranks together got 0, 1, …, total - 1; counter 1 has the sum of these values.
    assert counters.Fetch_and_add(1, 0) == total * (total - 1) // 2
    comm.Barrier()
    counters.Free()


def check_bcast_bytes_keeps_every_byte(comm: Communicator) -> None:
    """Check `bcast_bytes` for empty, short and long messages with all byte values."""
    for data in (b"", b"\x00", bytes(range(256)) * 1000):
        assert bcast_bytes(comm, data if comm.rank == 0 else None) == data


def check_free_is_idempotent(comm: Communicator) -> None:
    """Check that `Free` also frees duplicates and shared memory of a communicator, and may be called twice."""
    duplicate = comm.Dup()
    duplicate.Dup().Barrier()
    duplicate.Allocate_shared(np.ones(1000, np.int64) if comm.rank == 0 else None)
    duplicate.Free()
    duplicate.Free()
    comm.Barrier()


CHECKS: tuple[Callable[[Communicator], None], ...] = (
    check_ranks_are_numbered,
    check_bcast_reaches_every_rank_from_every_root,
    check_reductions_are_exact_integers,
    check_allgather_stacks_by_rank,
    check_requests_complete_in_any_order,
    check_duplicates_do_not_mix_messages,
    check_split_separates_colors,
    check_shared_arrays_are_read_only_copies,
    check_counters_are_atomic,
    check_bcast_bytes_keeps_every_byte,
    check_free_is_idempotent,
)
