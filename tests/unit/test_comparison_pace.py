"""Comparisons of files take a bounded part of the time, and a file is compared at once after its first read."""

import os
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.core.index_tables import ShardTable
from mixtera_hpc.dataplane.reading.unchanged.comparison_pace import MAX_PAUSE_S, ComparisonPace
from mixtera_hpc.dataplane.reading.unchanged.shard_guard import ShardGuard, shard_states
from mixtera_hpc.errors import DataError
from mixtera_hpc.index.shards import fingerprint_of_shard


class Reader:
    """Reads and comparisons on a clock of their own."""

    def __init__(self, compare_s: float) -> None:
        self.now_s = 100.0
        self.compare_s = compare_s
        self.pace = ComparisonPace(lambda: self.now_s)
        self.num_comparisons = 0

    def compare(self) -> None:
        self.now_s += self.compare_s
        self.num_comparisons += 1

    def read(self, duration_s: float) -> bool:
        """Read, and return True if the read was compared."""
        self.now_s += duration_s
        is_due = self.pace.is_due()
        if is_due:
            self.pace.measure(self.compare)
        return is_due


@pytest.mark.parametrize("compare_s", [1e-5, 1e-3, 0.1])
def test_comparisons_take_a_twentieth_of_the_time(compare_s: float) -> None:
    reader = Reader(compare_s)
    began_s = reader.now_s
    while reader.num_comparisons < 50:
        reader.read(compare_s / 3)
    share = reader.num_comparisons * compare_s / (reader.now_s - began_s)
    assert 0.04 < share < 0.053


@pytest.mark.parametrize(("compare_s", "read_s"), [(15e-6, 1e-3), (0.05, 1.0), (3.0, MAX_PAUSE_S)])
def test_slow_reads_are_all_compared(compare_s: float, read_s: float) -> None:
    reader = Reader(compare_s)
    assert all(reader.read(read_s) for _ in range(5))
    assert reader.pace.exposure() == "No batch with changed data was served."


def test_a_comparison_before_a_late_read_does_not_replace_the_one_after_it() -> None:
    reader = Reader(0.1)
    reader.read(0.0)
    assert not reader.pace.is_late()
    reader.now_s += 60
    assert reader.pace.is_late()
    reader.pace.measure(reader.compare, is_before_read=True)
    assert reader.read(0.5)
    assert not reader.pace.is_late()


def test_every_read_is_compared_on_request() -> None:
    reader = Reader(0.1)
    assert reader.read(0.0)
    assert not reader.read(0.5)
    assert reader.pace.exposure() == "Batches that were served during the last 0 s may hold changed data."
    reader.now_s += 0.25
    assert "during the last 0.25 s" in reader.pace.exposure()
    reader.pace.every_read = True
    assert reader.read(0.0)
    assert reader.read(0.0)


def test_a_comparison_that_raises_stays_due() -> None:
    pace = ComparisonPace(lambda: 1.0)

    def fail() -> None:
        raise DataError("changed")

    with pytest.raises(DataError):
        pace.measure(fail)
    assert pace.is_due()


def new_guard(root: Path, names: list[str]) -> ShardGuard:
    for name in names:
        (root / name).write_text("text " * 9)
    status = [(root / name).stat() for name in names]
    shards = ShardTable(
        path=tuple(names),
        format=("jsonl",) * len(names),
        rows=np.ones(len(names), np.int64),
        size_bytes=np.array([state.st_size for state in status]),
        mtime_ns=np.array([state.st_mtime_ns for state in status]),
        fingerprint=tuple(fingerprint_of_shard(root / name, 45) for name in names),
    )
    return ShardGuard(str(root), names, shard_states(shards))


def test_only_shards_that_were_never_compared_are_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = new_guard(tmp_path, ["a", "b", "c"])
    looked_up: list[str] = []
    real_stat = os.stat

    def counted(path: str) -> os.stat_result:
        looked_up.append(Path(path).name)
        return real_stat(path)

    monkeypatch.setattr(os, "stat", counted)
    guard.use(0)
    assert guard.has_read_new
    guard.check()
    guard.use(np.array([0]))
    assert not guard.has_read_new
    guard.use(np.array([0, 1]))
    assert guard.has_read_new
    guard.check_new()
    assert not guard.has_read_new
    assert looked_up == ["a", "b"]
    guard.check()
    assert looked_up == ["a", "b", "a"], "a shard that was used stays so until it is compared"


def test_a_changed_shard_is_noticed_at_its_first_read_and_by_every_later_check(tmp_path: Path) -> None:
    guard = new_guard(tmp_path, ["a", "b"])
    guard.use(0)
    guard.check()
    (tmp_path / "b").write_text("other")
    guard.use(1)
    for check in (guard.check_new, guard.check, guard.check_new):
        assert guard.has_read_new
        with pytest.raises(DataError, match="b has changed while the run reads it"):
            check()
