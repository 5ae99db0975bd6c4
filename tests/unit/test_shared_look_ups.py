"""Processes of a node share look-ups of shards, and never one that began before the end of a read."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.dataplane.reading.unchanged import shard_guard
from mixtera_hpc.dataplane.reading.unchanged.shard_guard import ShardGuard
from mixtera_hpc.dataplane.reading.unchanged.shard_stamps import ShardStamps, share_stamps
from mixtera_hpc.errors import DataError
from mixtera_hpc.index.shards import fingerprint_of_shard
from mixtera_hpc.testing.thread_ranks import run_ranks
from tests.unit.file_times import make_old, wait_for_new_time

NAMES = [f"{letter}.jsonl" for letter in "abcdefgh"]
ALL = np.arange(len(NAMES))


class Node:
    """Some shards, and the reading processes of a node."""

    def __init__(self, root: Path, num_readers: int) -> None:
        for name in NAMES:
            (root / name).write_text("text " * 9)
            make_old(root / name)
        self.root = root
        states = np.zeros((len(NAMES), 4), np.int64)
        for number, name in enumerate(NAMES):
            status = (root / name).stat()
            states[number, :2] = status.st_size, status.st_mtime_ns
            digest = bytes.fromhex(fingerprint_of_shard(root / name, status.st_size))
            states[number, 2:] = np.frombuffer(digest.ljust(16, b"\0"), "<i8")
        stamps = run_ranks(num_readers, lambda comm: share_stamps(comm, len(NAMES), num_readers))
        assert all(isinstance(of_rank, ShardStamps) for of_rank in stamps)
        self.readers = [ShardGuard(str(root), NAMES, states, of_rank) for of_rank in stamps]

    def read(self, reader: int, shards: Any = ALL) -> None:
        """Read some shards, and check them."""
        self.readers[reader].use(shards)
        self.readers[reader].check()

    def rewrite(self, name: str, text: str) -> None:
        """Replace the content of a shard, and keep its size and modification time."""
        path = self.root / name
        times = path.stat()
        wait_for_new_time(path)
        path.write_text(text)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """Two processes that have read every shard."""
    node = Node(tmp_path, 2)
    node.read(0)
    node.read(1)
    return node


@contextmanager
def looked_up(before: Callable[[str], object] = lambda name: None) -> Iterator[list[str]]:
    """Return the names of the shards that are looked up; `before` is called before each look-up."""
    names: list[str] = []
    real = os.stat
    with pytest.MonkeyPatch.context() as patch:

        def counted(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
            names.append(Path(path).name)
            before(names[-1])
            return real(path, *arguments, **options)

        patch.setattr(shard_guard.os, "stat", counted)
        yield names


def wait_for_next_tick() -> None:
    """Wait until the clock of the stamps has moved on."""
    now = shard_guard.now_ticks()
    while shard_guard.now_ticks() == now:
        pass


def test_reads_that_end_together_look_up_each_shard_once(node: Node) -> None:
    """During the first look-up of a process, another one looks up all shards."""

    def other_process(_: str) -> None:
        if len(names) == 1:
            wait_for_next_tick()
            node.read(1)

    with looked_up(other_process) as names:
        node.read(0)
    assert sorted(names[1:]) == NAMES, "the second process looks up all, and the first one no other shard"


def test_a_look_up_before_the_end_of_a_read_proves_nothing(node: Node) -> None:
    node.readers[0].use(0)
    node.read(1)
    (node.root / "a.jsonl").write_text("TEXT " * 9)
    with pytest.raises(DataError, match=r"a\.jsonl has changed while the run reads it"):
        node.readers[0].check()


def test_every_read_is_checked(node: Node) -> None:
    with looked_up() as names:
        for _ in range(3):
            node.read(0, [1, 2])
            node.read(1, [2, 3])
    assert sorted(names) == sorted([*NAMES[1:3], *NAMES[2:4]] * 3)


def test_a_shard_that_another_process_accepted_with_new_times_is_compared_by_each(node: Node) -> None:
    """The look-up of another process counts only for the state that this one has accepted."""
    os.utime(node.root / "a.jsonl")
    node.read(1)

    def other_process(_: str) -> None:
        if len(names) == 1:
            wait_for_next_tick()
            node.read(1)

    with looked_up(other_process) as names:
        node.read(0)
    # One of the other process; two of this one, before and after it computes the fingerprint.
    assert names.count("a.jsonl") == 3


def test_a_restored_time_is_noticed_by_a_process_that_has_not_read_the_shard(tmp_path: Path) -> None:
    node = Node(tmp_path, 2)
    node.read(0, 0)
    node.rewrite("a.jsonl", "TEXT " * 9)
    with pytest.raises(DataError, match=r"a\.jsonl has changed while the run reads it: its first or last MiB differs"):
        node.read(1, 0)


@pytest.mark.parametrize(("num_shards", "readers"), [(8, 1), (0, 4)])
def test_one_process_or_no_shard_needs_no_memory(num_shards: int, readers: int) -> None:
    def share(comm: Communicator) -> ShardStamps | None:
        return share_stamps(comm, num_shards, readers)

    assert run_ranks(2, share) == [None, None]
