"""What every communicator must do. Call each check on all ranks, with the communicator of that rank.

A new one passes when all of `CHECKS` do, for any number of ranks: collectives agree for every root and type the data plane
uses, requests complete while others are still to come, and shared arrays are the same and read-only everywhere.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

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
]

LARGE = 300_001
"""Elements: more than one message of a small-message protocol, and no round number."""


def check_ranks_are_numbered(comm: Communicator) -> None:
    """Ranks are 0 to size − 1, each once; node-local ranks too, on every host."""
    assert isinstance(comm, Communicator)
    ranks = comm.Allgather(np.array([comm.rank, comm.local_rank, comm.local_size], np.int64))
    assert ranks[:, 0].tolist() == list(range(comm.size))
    assert all(0 <= local < size <= comm.size for _, local, size in ranks.tolist())
    assert np.count_nonzero(ranks[:, 1] == 0) == round(float((1 / ranks[:, 2]).sum()))


def check_bcast_reaches_every_rank_from_every_root(comm: Communicator) -> None:
    for root in range(comm.size):
        for size in (0, 1, LARGE):
            expected = np.arange(size, dtype=np.int64) * (root + 1)
            buffer = expected.copy() if comm.rank == root else np.full(size, -1, np.int64)
            comm.Bcast(buffer, root)
            assert np.array_equal(buffer, expected)


def check_reductions_are_exact_integers(comm: Communicator) -> None:
    """Sums of int64 beyond 2^53 keep their last bit, and minimum and maximum their sign."""
    big = np.array([(1 << 55) + comm.rank, -comm.rank, 1], np.int64)
    above = comm.size * (comm.size - 1) // 2
    assert comm.Allreduce(big).tolist() == [comm.size * (1 << 55) + above, -above, comm.size]
    assert comm.Allreduce(big, "max").tolist() == [(1 << 55) + comm.size - 1, 0, 1]
    assert comm.Allreduce(big, "min").tolist() == [1 << 55, 1 - comm.size, 1]
    assert big.tolist() == [(1 << 55) + comm.rank, -comm.rank, 1]


def check_allgather_stacks_by_rank(comm: Communicator) -> None:
    own = np.full((2, 3), comm.rank, np.float64)
    gathered = comm.Allgather(own)
    assert gathered.shape == (comm.size, 2, 3)
    assert [set(part.ravel()) for part in gathered] == [{float(rank)} for rank in range(comm.size)]


def check_requests_complete_in_any_order(comm: Communicator) -> None:
    """Several collectives under way at once complete in any order of asking."""
    plans = [np.full(64, 10 + i if comm.rank == 0 else 0, np.int64) for i in range(4)]
    sums = [np.zeros(64, np.int64) for _ in range(4)]
    requests = [comm.Ibcast(plan) for plan in plans]
    requests += [comm.Iallreduce(np.full(64, i, np.int64), sums[i]) for i in range(4)]
    for request in reversed(requests):
        wait(request)
    assert [int(plan[-1]) for plan in plans] == [10, 11, 12, 13]
    assert [int(total[0]) for total in sums] == [i * comm.size for i in range(4)]


def check_duplicates_do_not_mix_messages(comm: Communicator) -> None:
    """Ranks may wait for two communicators in different orders."""
    first, second = comm.Dup(), comm.Dup()
    a, b = (np.full(8, value if comm.rank == 0 else 0, np.int64) for value in (1, 2))
    started = [first.Ibcast(a), second.Ibcast(b)]
    for request in started if comm.rank % 2 else reversed(started):
        wait(request)
    assert (int(a[0]), int(b[0])) == (1, 2)


def check_shared_arrays_are_read_only_copies(comm: Communicator) -> None:
    for array in (np.arange(LARGE, dtype=np.int64), np.ones((7, 3), np.float32), np.zeros(0, np.uint8)):
        shared = comm.Allocate_shared(array if comm.rank == 0 else None)
        assert shared.dtype == array.dtype and np.array_equal(shared, array)
        assert not shared.flags.writeable


def check_counters_are_atomic(comm: Communicator) -> None:
    """Whoever asks, whenever: what was there before an addition is told to one rank only, and nothing is lost."""
    counters = comm.Allocate_counters(2)
    taken = [counters.Fetch_and_add(0, 1) for _ in range(50 + comm.rank)]
    for number in taken:
        counters.Fetch_and_add(1, number)
    comm.Barrier()
    total = counters.Fetch_and_add(0, 0)
    assert total == sum(50 + rank for rank in range(comm.size))
    assert taken == sorted(taken) and counters.Fetch_and_add(1, 0) == total * (total - 1) // 2
    comm.Barrier()
    counters.Free()


def check_bcast_bytes_keeps_every_byte(comm: Communicator) -> None:
    for data in (b"", b"\x00", bytes(range(256)) * 1000):
        assert bcast_bytes(comm, data if comm.rank == 0 else None) == data


def check_free_is_idempotent(comm: Communicator) -> None:
    """Shared memory and duplicates go with the communicator they came from."""
    own = comm.Dup()
    own.Dup().Barrier()
    own.Allocate_shared(_ones() if comm.rank == 0 else None)
    own.Free()
    own.Free()
    comm.Barrier()


def _ones() -> NDArray[np.int64]:
    return np.ones(1000, np.int64)


CHECKS: tuple[Callable[[Communicator], None], ...] = (
    check_ranks_are_numbered,
    check_bcast_reaches_every_rank_from_every_root,
    check_reductions_are_exact_integers,
    check_allgather_stacks_by_rank,
    check_requests_complete_in_any_order,
    check_duplicates_do_not_mix_messages,
    check_shared_arrays_are_read_only_copies,
    check_counters_are_atomic,
    check_bcast_bytes_keeps_every_byte,
    check_free_is_idempotent,
)
