"""The reduction of a step names the slowest rank of every stage."""

import weakref
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.core.statistics import STAGES, StageMaxima
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading import batch_maker
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.processes.batch_memory import TokenArrays
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.dataplane.reading.stored.stored_sequences import StoredSequences
from mixtera_hpc.dataplane.steps.reduction.stage_times import maxima_of, pack_times, times_alone
from mixtera_hpc.dataplane.steps.reduction.step_buffer import StepContribution
from mixtera_hpc.dataplane.steps.reduction.step_reducer import RankFlags, StepReducer
from mixtera_hpc.testing.thread_ranks import ThreadCommunicator, run_ranks


def test_times_survive_packing_to_4_percent() -> None:
    seconds = np.geomspace(1.1e-5, 3000, 200)
    for i, stage in enumerate(STAGES):
        of_stage = np.roll(seconds, i)
        packed = np.array([pack_times({stage: time_s}) for time_s in of_stage], np.int64)
        maxima = maxima_of(packed)
        assert maxima.ranks == {stage: int(np.argmax(of_stage))}
        assert maxima.seconds[stage] == pytest.approx(3000, rel=0.041)
        for time_s in of_stage:
            single = maxima_of(np.array([pack_times({stage: time_s})], np.int64))
            assert single.seconds[stage] == pytest.approx(time_s, rel=0.041)
            assert times_alone({stage: time_s}) == StageMaxima(seconds={stage: time_s}, ranks=single.ranks)


def test_times_out_of_range_are_bounds() -> None:
    maxima = maxima_of(np.array([pack_times({"wait": 1e-6, "read": 1e9})], np.int64))
    assert maxima.ranks == {"read": 0} and 3000 < maxima.seconds["read"] < 3600
    assert times_alone({"wait": 1e-6, "read": 1e-3}).ranks == {"read": 0}


def test_the_reduction_carries_the_times_of_every_rank() -> None:
    def reduce(comm: ThreadCommunicator) -> StageMaxima | None:
        reducer = StepReducer(comm, 3, lambda step: 5, BatchSlice(group=comm.rank, num_groups=5))
        times = {"read": 2.0 if comm.rank == 3 else 0.1, "plan": 0.5 if comm.rank == 0 else 0.0}
        flags = RankFlags(stop=False, save=False, digest=7, times=times)
        reducer.post(0, StepContribution(), flags)
        (result,) = reducer.wait_for(0)
        return result.statistics.stages

    first, *others = run_ranks(5, reduce)
    assert first is not None and first.ranks == {"read": 3, "plan": 0}
    assert first.seconds["read"] == pytest.approx(2.0, rel=0.041)
    assert others == [None] * 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_plane_measures_its_stages(workers: int, collection: list[str], tmp_path: Path) -> None:
    words = [*collection, "dataplane.seq_len=16", "dataplane.global_batch_size=8", "dataplane.chunk_steps=2"]
    with DataPlane.open(compose([*words, f"dataplane.workers={workers}"])) as plane:
        seen = set()
        for batch in plane:
            plane.record(batch, np.ones(batch.loss_mask.shape))
            for statistics in plane.completed_statistics():
                assert statistics.stages is not None
                assert set(statistics.stages.ranks.values()) <= {0}
                seen |= statistics.stages.seconds.keys()
            if batch.step == 12:
                break
    assert {"wait", "decode", "tokenize", "pack", "plan"} <= seen


def test_a_read_is_written_a_few_steps_at_a_time(collection: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_maker, "TOKENS_PER_WRITE", 2 * 8 * 16)
    words = ["dataplane.seq_len=16", "dataplane.global_batch_size=8", "dataplane.chunk_steps=5"]
    source = open_source(compose([*collection, *words]), Local())
    with closing(BatchMaker(source, BatchSlice(), audit=False)) as maker:
        plan = source.planner.plan(PlannerState.start(source.num_domains), source.weights)[0]
        seen = [(batch.step, maker.places[0].now().step, maker.next_is_made) for batch in maker.batches(plan, 0)]
    # The place has the first step of those that are written together; the last of them waits for more to be written.
    assert seen == [(0, 0, True), (1, 0, False), (2, 2, True), (3, 2, False), (4, 4, False)]


def test_batches_that_were_dropped_are_free_before_the_next_are_written(
    collection: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_maker, "TOKENS_PER_WRITE", 2 * 8 * 16)
    words = ["dataplane.seq_len=16", "dataplane.global_batch_size=8", "dataplane.chunk_steps=5"]
    source = open_source(compose([*collection, *words]), Local())
    served: list[weakref.ref[Any]] = []
    num_held: list[int] = []
    write = StoredSequences.write

    def write_and_count(self: StoredSequences, number: int, memory: TokenArrays | None = None) -> TokenArrays:
        num_held.append(sum(tokens() is not None for tokens in served))
        return write(self, number, memory)

    monkeypatch.setattr(StoredSequences, "write", write_and_count)
    with closing(BatchMaker(source, BatchSlice(), audit=False)) as maker:
        plan = source.planner.plan(PlannerState.start(source.num_domains), source.weights)[0]
        batches = maker.batches(plan, 0)
        for _ in range(5):
            served.append(weakref.ref(next(batches).tokens))
    assert num_held == [0] * 5
