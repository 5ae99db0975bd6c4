"""Promises 2 and 3: a step depends neither on ranks nor on restarts, and no sample is lost or served twice."""

from contextlib import closing
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose_plain
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.chunk_plan import ChunkPlan, PlannerState
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import Batch, BatchSlice
from mixtera_hpc.dataplane.reading.source import Source, open_source

from .examples import whole_runs

BATCH = 12
Settings = dict[str, object]


@pytest.fixture(scope="module")
def plain(collection: list[str]) -> dict[str, object]:
    return compose_plain([*collection, f"dataplane.global_batch_size={BATCH}", "dataplane.audit=true"])


def source_of(plain: dict[str, object], mixture: Settings, plane: Settings) -> Source:
    changed = {**plain, "mixture": {**plain["mixture"], **mixture}, "dataplane": {**plain["dataplane"], **plane}}
    return open_source(from_plain(Config, changed), Local())


MIXTURES = st.fixed_dictionaries(
    {
        "kind": st.just("natural"),
        "group_by": st.sampled_from([["source"], [], ["tags"]]),
        "on_exhausted": st.sampled_from(["repeat", "redistribute", "stop"]),
        "max_epochs": st.sampled_from([None, 0.5, 1.0, 2.5]),
        "unit": st.sampled_from(["tokens", "samples"]),
    }
)
PLANES = st.fixed_dictionaries(
    {
        "seq_len": st.sampled_from([5, 32, 200]),
        "overlap_one_token": st.booleans(),
        "add_eos": st.booleans(),
        "chunk_steps": st.integers(1, 5),
        "seed": st.integers(0, 3),
        "shuffle": st.sampled_from(["none", "block", "window", "window", "sequence"]),
        "window_bytes": st.sampled_from([1, 5000, 20_000, 100_000, 10**9]),
        "lanes": st.sampled_from([1, 2, 3, None, 500]),
        "pack": st.sampled_from(["concat", "best_fit"]),
        "pack_group": st.sampled_from([2, 3, 8]),
        "balance": st.sampled_from(["none", "attention"]),
        "balance_group": st.sampled_from([None, 2, 4, 12]),
    }
)


def make_plans(
    source: Source, num_chunks: int, state: PlannerState | None = None
) -> list[tuple[ChunkPlan, PlannerState]]:
    state = state or PlannerState.start(source.num_domains)
    plans = []
    for _ in range(num_chunks):
        plan, state = source.planner.plan(state, source.weights)
        plans.append((plan, state))
        if plan.last:
            break
    return plans


def content(batch: Batch) -> list[object]:
    return list(batch.digests) if batch.digests else [repr(p) for p in batch.payloads or []]


def served(
    source: Source, rank: int, num_ranks: int, group: int, chosen: list[ChunkPlan], first: int = 0
) -> list[Batch]:
    with closing(
        BatchMaker(source, BatchSlice(group=rank // group, num_groups=num_ranks // group), audit=True)
    ) as maker:
        return [batch for plan in chosen for batch in maker.batches(plan, first)]


SHAPES = st.sampled_from([(2, 1), (3, 1), (4, 2), (12, 1), (6, 3)])


@whole_runs(60)
@given(MIXTURES, PLANES, SHAPES, st.integers(0, 12))
def test_content_does_not_depend_on_ranks_groups_and_restarts(
    plain: dict[str, object], mixture: Settings, plane: Settings, shape: tuple[int, int], stop: int
) -> None:
    check_shapes(source_of(plain, mixture, plane), shape, stop)


@whole_runs(16)
@given(MIXTURES, PLANES, SHAPES, st.integers(0, 12))
def test_content_does_not_depend_on_ranks_with_the_lanes_of_a_large_batch(
    plain: dict[str, object], mixture: Settings, plane: Settings, shape: tuple[int, int], stop: int
) -> None:
    large = {"lanes": None, "chunk_steps": 3, "batch_schedule": [{"start": 10, "size": 86 * BATCH}]}
    source = source_of(plain, mixture, {**plane, **large, "balance_group": None})
    assert source.identity()["lanes"] == (32 if plane["shuffle"] == "window" else 16)
    check_shapes(source, shape, stop)


def check_shapes(source: Source, shape: tuple[int, int], stop: int) -> None:
    """Compare four chunks of one rank with those of ranks in groups, and with those after a restart at a step."""
    made = make_plans(source, 4)
    whole = {b.step: content(b) for b in served(source, 0, 1, 1, [plan for plan, _ in made])}
    num_ranks, group = shape
    parts: dict[int, list[object]] = {}
    for rank in range(0, num_ranks, group):
        peers = [served(source, rank + k, num_ranks, group, [p for p, _ in made]) for k in range(group)]
        for peer in peers[1:]:
            assert [content(b) for b in peer] == [content(b) for b in peers[0]]
        for batch in peers[0]:
            parts.setdefault(batch.step, []).extend(content(batch))
    assert parts == whole
    resumed = [p for p, _ in made if p.first_step + p.num_steps > stop]
    again = served(source, 0, 1, 1, resumed, first=stop)
    assert {b.step: content(b) for b in again} == {s: c for s, c in whole.items() if s >= stop}


@whole_runs(40)
@given(PLANES, st.sampled_from([["source"], []]))
def test_an_epoch_serves_every_sample_once(plain: dict[str, object], plane: Settings, by: list[str]) -> None:
    mixture = {"group_by": by, "unit": "samples", "on_exhausted": "redistribute", "max_epochs": 1.0}
    source = source_of(plain, mixture, plane)
    batches = served(source, 0, 1, 1, [plan for plan, _ in make_plans(source, 1000)])
    payloads = [p for b in batches for p in b.payloads or []]
    ids = [p["meta"]["id"] for p in payloads]
    rows, _ = source.layout.table.totals()
    assert len(set(ids)) == len(ids) == rows.sum() - rows.sum() % BATCH
    if by:
        names = [source.names[d] for b in batches for d in b.domain_ids]
        assert names == [f"source={p['meta']['source']}" for p in payloads]


@whole_runs(40)
@given(PLANES, st.integers(0, 9))
def test_sequences_cover_the_stream_of_a_domain_without_gaps(
    plain: dict[str, object], plane: Settings, domain: int
) -> None:
    """The sequences of two epochs contain the tokens of all documents of the domain twice."""
    source = source_of(plain, {"max_epochs": 2.0, "on_exhausted": "redistribute"}, plane)
    grid = source.grid
    items = int(source.layout.epoch_items()[domain])
    capacity = int(source.planner.capacity[domain])
    if not capacity:
        return
    maker = BatchMaker(source, BatchSlice(), audit=False)

    def tokens(start: int, stop: int) -> NDArray[np.int32]:
        output = np.empty(stop - start, np.int32)
        maker._reader.prepare(maker._streams.documents(domain, start, stop), [len(output)]).write(0, output)
        return output

    with closing(maker):
        stream = np.concatenate([tokens(*grid.span(k, 1))[: grid.stride] for k in range(capacity)])
        whole = tokens(0, 2 * items)
    assert np.array_equal(stream, whole[: len(stream)])
    assert len(whole) - len(stream) < grid.length + grid.stride
    assert np.array_equal(np.sort(whole[:items]), np.sort(whole[items:]))


@whole_runs(30)
@given(PLANES)
def test_all_tokens_count_except_the_first_of_a_document(plain: dict[str, object], plane: Settings) -> None:
    source = source_of(plain, {}, plane)
    [plan] = [p for p, _ in make_plans(source, 1)]
    with closing(BatchMaker(source, BatchSlice(), audit=False)) as maker:
        batches = list(islice(maker.batches(plan, 0), 3))
    for batch in batches:
        borders = np.diff(batch.document_ids, axis=1) != 0
        assert np.array_equal(batch.loss_mask, ~borders)
        assert (np.diff(batch.document_ids, axis=1) >= 0).all()
