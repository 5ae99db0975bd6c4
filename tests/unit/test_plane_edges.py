"""The beginning and the end of a data plane, and wrong calls."""

import itertools
import json
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config, DataPlaneConfig
from mixtera_hpc.core.chunk_plan import ChunkPlan, PlannerState
from mixtera_hpc.dataplane import step_results
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading import prefetcher as prefetcher_module
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import Batch, BatchSlice
from mixtera_hpc.dataplane.reading.prefetcher import Prefetcher
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.errors import CommError, ConfigError, DataError

SMALL = ["dataplane.seq_len=16", "dataplane.global_batch_size=4", "dataplane.chunk_steps=2"]

NOTHING = np.zeros(0, np.int64)
EMPTY_PLAN = ChunkPlan(chunk=0, first_step=0, num_steps=1, last=False, cursors=NOTHING, lags=NOTHING, weights=NOTHING)


@pytest.fixture(scope="module")
def config(collection: list[str]) -> Config:
    return compose([*collection, *SMALL])


@pytest.fixture(scope="module")
def ending(collection: list[str]) -> Config:
    return compose([*collection, *SMALL, "mixture.group_by=[]", "mixture.on_exhausted=stop", "mixture.max_epochs=0.2"])


def test_iterating_after_the_end_yields_nothing(ending: Config) -> None:
    with DataPlane.open(ending, comm=Local()) as plane:
        assert sum(1 for _ in plane) > 1
        assert [list(plane), list(plane)] == [[], []]


def test_an_error_of_the_reading_thread_is_raised_in_every_iteration(own_collection: list[str]) -> None:
    shard = next(Path(word.partition("=")[2]) for word in own_collection if word.startswith("data.root")) / "a.jsonl"
    with DataPlane.open(compose([*own_collection, *SMALL, "dataplane.shuffle=none"]), comm=Local()) as plane:
        shard.write_bytes(b"")
        for _ in range(2):
            with pytest.raises(DataError, match=r"a\.jsonl"):
                list(plane)


@pytest.mark.parametrize("code", [None, 0, 75])
def test_an_exit_with_a_code_of_success_closes_the_journal(config: Config, tmp_path: Path, code: int | None) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(SystemExit), DataPlane.open(config, comm=Local(), folder=run) as plane:
        for batch in plane:
            if batch.step == 2:
                sys.exit(code)
    assert json.loads(run.journal.read_text().splitlines()[-1]) == {"kind": "close", "attempt": 1, "next_step": 3}


def test_an_exit_with_a_failure_does_not_close_the_journal(config: Config, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(SystemExit), DataPlane.open(config, comm=Local(), folder=run) as plane:
        next(iter(plane))
        sys.exit(1)
    assert "close" not in run.journal.read_text()


def test_only_the_newest_unread_statistics_are_kept(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_results, "MAX_UNREAD_STATISTICS", 3)
    with DataPlane.open(config, comm=Local()) as plane:
        for batch in plane:
            if batch.step == 9:
                break
        plane.state_dict()
        assert [s.step for s in plane.completed_statistics()] == [7, 8, 9]


def test_loading_no_state_is_refused(config: Config) -> None:
    with DataPlane.open(config, comm=Local()) as plane, pytest.raises(ValueError, match="no state on rank 0"):
        plane.load_state_dict(None)


class HangingMaker(BatchMaker):
    """Reads from a file system that does not answer until `let_go` is set."""

    let_go = threading.Event()
    reading = threading.Event()
    closed = threading.Event()

    def batches(self, plan: ChunkPlan, first_step: int) -> Iterator[Batch]:
        self.reading.set()
        self.let_go.wait()
        yield from super().batches(plan, first_step)

    def close(self) -> None:
        self.closed.set()
        super().close()


def test_closing_waits_for_a_read_in_progress(config: Config) -> None:
    source = open_source(config, Local())
    maker = HangingMaker(source, BatchSlice(), audit=False)
    prefetcher = Prefetcher(maker, 2)
    plan, _ = source.planner.plan(PlannerState.start(source.num_domains), source.weights)
    prefetcher.submit(plan, 0)
    maker.reading.wait()
    prefetcher.close(timeout_s=0.01)
    assert not maker.closed.is_set()
    maker.let_go.set()
    prefetcher.close()
    assert maker.closed.is_set()


def test_an_abandoned_reading_thread_frees_its_files_when_its_read_returns() -> None:
    returns = threading.Event()
    closed = threading.Event()

    class SlowMaker:
        places = ()
        next_is_made = False

        def batches(self, plan: ChunkPlan, first_step: int) -> Iterator[Batch]:
            returns.wait()
            yield from ()

        def close(self) -> None:
            closed.set()

    prefetcher = Prefetcher(SlowMaker(), 1)
    prefetcher.submit(EMPTY_PLAN, 0)
    prefetcher.close(timeout_s=0)
    assert not closed.is_set()
    returns.set()
    assert closed.wait(timeout=600)


class EndlessMaker:
    """Makes empty batches, and calls functions before and after each of them."""

    places = ()
    next_is_made = False

    def __init__(self, before: Callable[[int], object], after: Callable[[], object] = lambda: None) -> None:
        self._before = before
        self._after = after

    def batches(self, plan: ChunkPlan, first_step: int) -> Iterator[Batch]:
        for step in itertools.count():
            self._before(step)
            yield Batch(
                step=step,
                domain_ids=NOTHING,
                positions=NOTHING,
                tokens=np.zeros((0, 0), np.int64),
                loss_mask=np.zeros((0, 0), np.bool_),
                document_ids=np.zeros((0, 0), np.int32),
            )
            self._after()

    def close(self) -> None:
        pass


def test_no_more_batches_are_prepared_than_asked_for() -> None:
    made: queue.SimpleQueue[int] = queue.SimpleQueue()
    prefetcher = Prefetcher(EndlessMaker(before=made.put), 3)
    prefetcher.submit(EMPTY_PLAN, 0)
    for step in range(5):
        batch = prefetcher.get(timeout_s=600)
        assert batch is not None
        assert batch.step == step
    # Three more than were taken, and one that waits for room.
    assert [made.get(timeout=600) for _ in range(9)] == list(range(9))
    prefetcher.close()
    assert prefetcher.num_ready == 3
    assert made.empty()


def test_a_batch_that_the_trainer_waits_for_is_taken_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetcher_module, "HAND_OVER_S", 600)
    has_begun = threading.Event()
    ready_after: list[int] = []

    def wait_for_trainer(step: int) -> None:
        has_begun.wait()
        while step < 5 and not prefetcher._is_awaited:
            time.sleep(1e-4)

    prefetcher = Prefetcher(EndlessMaker(wait_for_trainer, lambda: ready_after.append(prefetcher.num_ready)), 3)
    has_begun.set()
    prefetcher.submit(EMPTY_PLAN, 0)
    for _ in range(5):
        assert prefetcher.get(timeout_s=600) is not None
    prefetcher.close()
    assert ready_after[:5] == [0] * 5


@pytest.mark.parametrize(("next_is_made", "expected"), [(False, 1), (True, 3)])
def test_batches_that_were_made_together_are_handed_over_together(
    next_is_made: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetcher_module, "HAND_OVER_S", 600)
    asked: queue.SimpleQueue[int] = queue.SimpleQueue()
    maker = EndlessMaker(before=asked.put)
    maker.next_is_made = next_is_made
    prefetcher = Prefetcher(maker, 3)
    # As if a trainer waited that does not get its turn.
    prefetcher._is_awaited = True
    prefetcher.submit(EMPTY_PLAN, 0)
    for step in range(expected):
        assert asked.get(timeout=600) == step
    if next_is_made:
        # Made, and waits for room.
        assert asked.get(timeout=600) == expected
    else:
        with pytest.raises(queue.Empty):
            asked.get(timeout=0.2)
    assert prefetcher.num_ready == expected
    prefetcher.close()


def test_a_thread_that_hands_batches_over_is_woken_when_all_of_them_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetcher_module, "HAND_OVER_S", 600)

    def make(step: int) -> None:
        maker.next_is_made = step < 2

    maker = EndlessMaker(before=make)
    prefetcher = Prefetcher(maker, 3)
    # As if a trainer waited that does not get its turn.
    prefetcher._is_awaited = True
    prefetcher.submit(EMPTY_PLAN, 0)
    while not prefetcher._is_handing_over:
        time.sleep(1e-4)
    notify = prefetcher._has_room.notify
    ready_at_turns: list[int] = []

    def notify_and_count() -> None:
        ready_at_turns.append(prefetcher.num_ready)
        notify()

    monkeypatch.setattr(prefetcher._has_room, "notify", notify_and_count)
    for _ in range(3):
        assert prefetcher.get(timeout_s=600) is not None
    assert ready_at_turns == [0]
    prefetcher.close()


def test_the_reading_thread_holds_no_batch_that_the_trainer_has_dropped() -> None:
    dropped: queue.SimpleQueue[weakref.ref[Any]] = queue.SimpleQueue()
    is_held: list[bool] = []

    def look(step: int) -> None:
        if 0 < step < 4:
            is_held.append(dropped.get(timeout=600)() is not None)

    prefetcher = Prefetcher(EndlessMaker(before=look), 1)
    prefetcher.submit(EMPTY_PLAN, 0)
    for _ in range(4):
        batch = prefetcher.get(timeout_s=600)
        assert batch is not None
        tokens = weakref.ref(batch.tokens)
        del batch
        dropped.put(tokens)
    prefetcher.close()
    assert is_held == [False] * 3


def test_ranks_of_a_group_get_the_same_slice_and_the_first_is_the_leader() -> None:
    plane = DataPlaneConfig(global_batch_size=12, model_parallel_size=2)
    slices = [BatchSlice.of(plane, rank, 6) for rank in range(6)]
    places = [(part.positions(12).start, part.size_of(12)) for part in slices]
    assert places == [(0, 4), (0, 4), (4, 4), (4, 4), (8, 4), (8, 4)]
    assert [part.is_group_leader for part in slices] == [True, False] * 3


@pytest.mark.parametrize(
    ("num_ranks", "message"),
    [(5, "does not divide the 5 ranks.*\n.*multiple of 2"), (10, "shared evenly by 10 ranks.*\n.*multiple of 5")],
)
def test_ranks_that_cannot_share_the_global_batch_are_refused(num_ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchSlice.of(DataPlaneConfig(global_batch_size=12, model_parallel_size=2), 0, num_ranks)


def test_a_sequence_recorded_twice_is_reported(config: Config) -> None:
    half = slice(0, 2)
    with (
        pytest.raises(CommError, match="Sequence 0 of step 0 was recorded 2 times"),
        DataPlane.open(config, comm=Local()) as plane,
    ):
        for batch in plane:
            losses = np.ones((2, 16), np.float32)
            plane.record(batch, losses, rows=half)
            plane.record(batch, losses, rows=half)
            if batch.step == 3:
                break


def test_a_save_request_waits_until_the_trainer_asks(config: Config, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    answers = []
    with DataPlane.open(config, comm=Local(), folder=run) as plane:
        for batch in plane:
            if batch.step == 1:
                run.control.mkdir(exist_ok=True)
                (run.control / "save").touch()
            if batch.step % 4 == 3:
                answers.append(plane.save_requested())
            if batch.step == 11:
                break
    assert answers == [True, False, False]


def test_a_long_wait_for_a_read_tests_for_messages_less_often(
    own_collection: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each test takes work from the trainer's thread; 0.5 ms apart there would be 2,000 per second."""
    function = "def pause(row, sample):\n    time.sleep(0.2)\n    return 1\n"
    (tmp_path / "slow_rows.py").write_text(f"import time\n\n{function}")
    monkeypatch.syspath_prepend(tmp_path)
    words = ["mixture.unit=samples", "data.transform=slow_rows.pause", "dataplane.workers=0", *SMALL[1:]]
    num_asked = 0
    real_get = Prefetcher.get

    def counted(prefetcher: Prefetcher, timeout_s: float) -> Batch | None:
        nonlocal num_asked
        num_asked += 1
        return real_get(prefetcher, timeout_s)

    monkeypatch.setattr(Prefetcher, "get", counted)
    with DataPlane.open(compose([*own_collection, *words]), comm=Local()) as plane:
        next(iter(plane))
        assert plane.data_wait_s > 0.5
        assert 10 < num_asked < 20 + plane.data_wait_s / 1.8e-3


def test_the_first_weights_are_computed_once(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(config, Local())
    weights = source.weights
    monkeypatch.setattr(type(source), "mixer", None)
    assert source.weights is weights and weights.sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="read-only"):
        weights[0] = 1


@pytest.mark.parametrize("has_begun", [True, False])
def test_a_forked_process_is_refused(has_begun: bool, config: Config) -> None:
    """A worker process of a DataLoader is such a fork. Without a reading thread, it would wait for ever."""
    with DataPlane.open(config, comm=Local()) as plane:
        batches = iter(plane)
        if has_begun:
            next(batches)
        pid = os.fork()
        if pid == 0:
            try:
                next(batches)
            except ConfigError as error:
                os._exit(7 if "was forked from it" in str(error) else 1)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert next(batches).step == int(has_begun)
