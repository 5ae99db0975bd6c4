"""Batches of reading processes, taken in the trainer's thread: all of them, in order, and without a thread."""

import json
import os
import queue
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.core.chunk_plan import ChunkPlan, PlannerState
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import Batch, BatchSlice
from mixtera_hpc.dataplane.reading.processes.process_feed import ProcessFeed
from mixtera_hpc.dataplane.reading.processes.workers import Workers
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.errors import DataError
from mixtera_hpc.index.build.build import build_index

pytestmark = pytest.mark.slow
"""Every test starts processes that import the data plane."""

WORDS = ["dataplane.seq_len=32", "dataplane.global_batch_size=4", "dataplane.chunk_steps=7", "dataplane.audit=true"]
ONE_EPOCH = ["mixture.max_epochs=1", "mixture.on_exhausted=redistribute"]
WAIT_S = 600
"""A guard against a test that would never end."""


def plans_of(source: Source) -> Iterator[ChunkPlan]:
    """Yield all plans of a run that ends."""
    state = PlannerState.start(source.num_domains)
    while True:
        plan, state = source.planner.plan(state, source.weights)
        yield plan
        if plan.last:
            return


def taken(feed: ProcessFeed) -> Batch | None:
    """Return the next batch of a feed, however long it takes."""
    while True:
        try:
            return feed.get(0.1)
        except queue.Empty:
            continue


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("first_step", [0, 9])
def test_a_feed_serves_all_plans_to_the_end(collection: list[str], count: int, first_step: int) -> None:
    source = open_source(compose([*collection, *WORDS, *ONE_EPOCH]), Local())
    plans = list(plans_of(source))
    maker = BatchMaker(source, BatchSlice(), audit=True)
    expected = [batch.digests for plan in plans for batch in maker.batches(plan, first_step)]
    assert len(plans) > 2
    assert len(expected) > 7

    feed = ProcessFeed(Workers(source, BatchSlice(), count), prefetch_batches=2)
    with pytest.raises(queue.Empty):
        feed.get(0.0)  # No plan yet.
    for plan in plans:
        feed.submit(plan, first_step)
    served = []
    while (batch := taken(feed)) is not None:
        served.append(batch.digests)
        feed.advance()
    assert served == expected
    assert feed.get(0.0) is None, "the end of the data is repeated"
    assert feed.num_ready == 1
    feed.close()


def test_a_killed_process_is_reported_after_its_batches_and_again(collection: list[str]) -> None:
    source = open_source(compose([*collection, *WORDS]), Local())
    workers = Workers(source, BatchSlice(), 1)
    feed = ProcessFeed(workers, prefetch_batches=2)
    plans = plans_of(source)
    feed.submit(next(plans), 0)
    steps = [taken(feed).step]  # type: ignore[union-attr]
    workers._workers[0].process.kill()
    feed.submit(next(plans), 0)
    for _ in range(2):
        with pytest.raises(DataError, match="Reading process 0 of 1 was ended by signal 9"):
            while True:
                steps.append(taken(feed).step)  # type: ignore[union-attr]
    assert steps == list(range(7))
    feed.close()


class InterruptedWorkers(Workers):
    """Reading processes whose rank is interrupted by the user after the first batch of an answer."""

    def receive(self) -> Iterator[Batch]:
        yield next(super().receive())
        raise KeyboardInterrupt


def test_an_interrupt_inside_an_answer_loses_no_batch_silently(collection: list[str]) -> None:
    source = open_source(compose([*collection, *WORDS]), Local())
    feed = ProcessFeed(InterruptedWorkers(source, BatchSlice(), 1), prefetch_batches=2)
    feed.submit(next(plans_of(source)), 0)
    with pytest.raises(KeyboardInterrupt):
        taken(feed)
    first = feed.get(0.0)
    assert first is not None
    assert first.step == 0
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            feed.get(0.0)
    feed.close()


def test_no_thread_of_the_rank_receives_batches(collection: list[str]) -> None:
    before = set(threading.enumerate())
    words = [*collection, *WORDS, "dataplane.workers=1", "dataplane.watchdog_s=0"]
    with DataPlane.open(compose(words), Local()) as plane:
        batches = iter(plane)
        for _ in range(9):
            next(batches)
        assert set(threading.enumerate()) <= before


def test_a_plan_that_does_not_fit_into_the_socket_does_not_deadlock(collection: list[str], tmp_path: Path) -> None:
    rows = [{"text": f"{number} words", "domain": str(number)} for number in range(1000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = next(word for word in collection if word.startswith("dataplane.tokenizer="))
    data = [f"data.root={tmp_path}", "data.properties.domain=domain", tokenizer]
    shape = ["dataplane.seq_len=8", "dataplane.global_batch_size=1024", "dataplane.chunk_steps=2"]
    config = compose([*data, *shape, "mixture.group_by=[domain]"])
    build_index(config)
    source = open_source(config, Local())
    workers = Workers(source, BatchSlice(), 1)
    with socket.socket(fileno=os.dup(workers._workers[0].pipe.fileno())) as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    feed = ProcessFeed(workers, prefetch_batches=4)
    steps: list[int] = []

    def serve() -> None:
        plans = plans_of(source)
        for _ in range(5):
            feed.submit(next(plans), 0)
        while len(steps) < 10:
            batch = taken(feed)
            assert batch is not None
            steps.append(batch.step)
            feed.advance()

    trainer = threading.Thread(target=serve, daemon=True)
    trainer.start()
    trainer.join(timeout=WAIT_S)
    feed.close()
    assert steps == list(range(10)), "both ends of the pipe wait for each other"


def test_closing_at_once_leaves_no_process(collection: list[str]) -> None:
    source = open_source(compose([*collection, *WORDS]), Local())
    workers = Workers(source, BatchSlice(), 2)
    feed = ProcessFeed(workers, prefetch_batches=2)
    feed.submit(next(plans_of(source)), 0)  # The processes are still starting.
    feed.close()
    assert all(worker.process.poll() is not None for worker in workers._workers)


def test_advance_holds_no_more_than_one_answer_beyond_the_prefetched_batches(collection: list[str]) -> None:
    source = open_source(compose([*collection, *WORDS]), Local())
    workers = Workers(source, BatchSlice(), 1)
    feed = ProcessFeed(workers, prefetch_batches=2)
    plans = plans_of(source)
    for _ in range(4):
        feed.submit(next(plans), 0)
    first = taken(feed)
    assert first is not None
    np.testing.assert_equal(first.step, 0)
    for _ in range(20):
        assert workers.can_receive(WAIT_S)
        feed.advance()
        assert feed.num_ready <= 7 + 1
    feed.close()
