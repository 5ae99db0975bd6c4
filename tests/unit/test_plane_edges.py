"""A data plane at the edges of its life: asked after the end, left by a script, never asked for what it collects."""

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config, DataPlaneConfig
from mixtera_hpc.core.planner import ChunkPlan, PlannerState
from mixtera_hpc.dataplane import session
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import Batch, BatchSlice
from mixtera_hpc.dataplane.reading.prefetcher import Prefetcher
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.errors import CommError, ConfigError, DataError

SMALL = ["dataplane.seq_len=16", "dataplane.global_batch_size=4", "dataplane.chunk_steps=2"]


@pytest.fixture(scope="module")
def config(collection: list[str]) -> Config:
    return compose([*collection, *SMALL])


@pytest.fixture(scope="module")
def ending(collection: list[str]) -> Config:
    return compose([*collection, *SMALL, "mixture.group_by=[]", "mixture.on_exhausted=stop", "mixture.max_epochs=0.2"])


def test_after_the_end_there_is_nothing_more_however_often_one_asks(ending: Config) -> None:
    with DataPlane.open(ending, comm=Local()) as plane:
        assert sum(1 for _ in plane) > 1
        assert [list(plane), list(plane)] == [[], []]


def test_what_went_wrong_in_the_reader_is_said_again(own_collection: list[str]) -> None:
    shard = next(Path(word.partition("=")[2]) for word in own_collection if word.startswith("data.root")) / "a.jsonl"
    with DataPlane.open(compose([*own_collection, *SMALL, "dataplane.shuffle=none"]), comm=Local()) as plane:
        shard.write_bytes(b"")
        for _ in range(2):
            with pytest.raises(DataError, match=r"a\.jsonl"):
                list(plane)


@pytest.mark.parametrize("code", [None, 0, 75])
def test_a_script_that_leaves_with_a_code_of_success_closes_its_journal(
    config: Config, tmp_path: Path, code: int | None
) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(SystemExit), DataPlane.open(config, comm=Local(), folder=run) as plane:
        for batch in plane:
            if batch.step == 2:
                sys.exit(code)
    assert json.loads(run.journal.read_text().splitlines()[-1]) == {"kind": "close", "attempt": 1, "next_step": 3}


def test_a_script_that_leaves_with_a_failure_does_not(config: Config, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(SystemExit), DataPlane.open(config, comm=Local(), folder=run) as plane:
        next(iter(plane))
        sys.exit(1)
    assert "close" not in run.journal.read_text()


def test_statistics_nobody_asks_for_do_not_pile_up(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_UNREAD_STATISTICS", 3)
    with DataPlane.open(config, comm=Local()) as plane:
        for batch in plane:
            if batch.step == 9:
                break
        plane.state_dict()
        assert [s.step for s in plane.completed_statistics()] == [7, 8, 9]


def test_no_state_is_no_state_to_go_on_from(config: Config) -> None:
    with DataPlane.open(config, comm=Local()) as plane, pytest.raises(ValueError, match="no state on rank 0"):
        plane.load_state_dict(None)


class Hanging(BatchMaker):
    """A file system that does not answer until it is let go."""

    let_go, reading, closed = threading.Event(), threading.Event(), threading.Event()

    def batches(self, plan: ChunkPlan, first_step: int) -> Iterator[Batch]:
        self.reading.set()
        self.let_go.wait()
        yield from super().batches(plan, first_step)

    def close(self) -> None:
        self.closed.set()
        super().close()


def test_files_are_not_closed_under_a_read_and_closing_waits_for_it(config: Config) -> None:
    source = open_source(config, Local())
    maker = Hanging(source, BatchSlice(first=0, size=4), audit=False)
    prefetcher = Prefetcher(maker, 2)
    plan, _ = source.planner.plan(PlannerState.start(source.num_domains), source.weights)
    prefetcher.submit(plan, 0)
    maker.reading.wait()
    prefetcher.close(timeout_s=0.01)
    assert not maker.closed.is_set()
    maker.let_go.set()
    prefetcher.close()
    assert maker.closed.is_set()


def test_a_reader_that_is_left_alone_frees_what_it_holds_when_its_read_returns() -> None:
    returns, closed = threading.Event(), threading.Event()

    class Slow:
        def batches(self, plan: ChunkPlan, first_step: int) -> Iterator[Batch]:
            returns.wait()
            yield from ()

        def close(self) -> None:
            closed.set()

    none = np.zeros(0, np.int64)
    prefetcher = Prefetcher(Slow(), 1)
    plan = ChunkPlan(chunk=0, first_step=0, num_steps=1, last=False, cursors=none, lags=none, weights=none)
    prefetcher.submit(plan, 0)
    prefetcher.close(timeout_s=0)
    assert not closed.is_set()
    returns.set()
    assert closed.wait(timeout=10)


def test_ranks_of_a_dp_group_share_and_one_of_them_speaks() -> None:
    plane = DataPlaneConfig(global_batch_size=12, model_parallel_size=2)
    shares = [BatchSlice.of(plane, rank, 6) for rank in range(6)]
    assert [(share.first, share.size) for share in shares] == [(0, 4), (0, 4), (4, 4), (4, 4), (8, 4), (8, 4)]
    assert [share.is_group_leader for share in shares] == [True, False] * 3


@pytest.mark.parametrize(
    ("num_ranks", "answer"),
    [(5, "does not divide the 5 ranks.*\n.*multiple of 2"), (10, "shared evenly by 10 ranks.*\n.*multiple of 5")],
)
def test_ranks_that_cannot_share_a_batch_are_refused(num_ranks: int, answer: str) -> None:
    with pytest.raises(ConfigError, match=answer):
        BatchSlice.of(DataPlaneConfig(global_batch_size=12, model_parallel_size=2), 0, num_ranks)


def test_a_sequence_recorded_twice_is_named(config: Config) -> None:
    half = slice(0, 2)
    with (
        pytest.raises(CommError, match="Sequence 0 of step 0 was recorded 2 times"),
        DataPlane.open(config, comm=Local()) as plane,
    ):
        for batch in plane:
            losses = np.ones((2, 16), np.float32)
            plane.record(batch, losses, half)
            plane.record(batch, losses, half)
            if batch.step == 3:
                break


def test_a_request_to_save_waits_for_the_one_who_asks_now_and_then(config: Config, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    asked = []
    with DataPlane.open(config, comm=Local(), folder=run) as plane:
        for batch in plane:
            if batch.step == 1:
                run.control.mkdir(exist_ok=True)
                (run.control / "save").touch()
            if batch.step % 4 == 3:
                asked.append(plane.save_requested())
            if batch.step == 11:
                break
    assert asked == [True, False, False]
