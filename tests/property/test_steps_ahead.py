"""Chunks that are looked up together: the same batches as one after the other, and errors at the same step."""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose, compose_plain
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.chunk_plan import ChunkPlan, PlannerState
from mixtera_hpc.core.planner import Planner
from mixtera_hpc.core.slots.batch_schedule import BatchSchedule
from mixtera_hpc.core.slots.chunk_order import counts_of_chunks, slots_of_chunks
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import Batch, BatchSlice
from mixtera_hpc.dataplane.reading.lookup import steps_ahead
from mixtera_hpc.dataplane.reading.processes.batch_memory import TokenArrays
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.errors import DataError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.testing.megatron import write_megatron

from .examples import whole_runs

NUM_DOMAINS = 3
SEQ_LEN = 15
BATCH = 12


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the settings of a collection of token files."""
    folder = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(0)
    for domain in range(NUM_DOMAINS):
        documents = [rng.integers(1, 200, rng.integers(1, 40)) for _ in range(300 + 200 * domain)]
        write_megatron(folder / f"d{domain}.bin", documents)
    words = [
        f"data.root={folder}",
        f"index.path={folder / 'i.h5'}",
        "data.properties.source={path: __stem__, pattern: '^([^-]*)'}",
        "mixture=natural",
        "mixture.group_by=[source]",
        "index.block_rows=8",
        "dataplane.vocab_size=256",
        "dataplane.eos_id=0",
        f"dataplane.seq_len={SEQ_LEN}",
        f"dataplane.global_batch_size={BATCH}",
        "dataplane.audit=true",
    ]
    build_index(compose(words))
    return words


@pytest.fixture(scope="module")
def plain(tokens: list[str]) -> dict[str, Any]:
    return compose_plain(tokens)


@pytest.fixture(scope="module")
def plain_text(collection: list[str]) -> dict[str, Any]:
    return compose_plain([*collection, f"dataplane.global_batch_size={BATCH}", "dataplane.audit=true"])


def source_of(plain: dict[str, Any], mixture: dict[str, Any], plane: dict[str, Any]) -> Source:
    changed = {**plain, "mixture": {**plain["mixture"], **mixture}, "dataplane": {**plain["dataplane"], **plane}}
    return open_source(from_plain(Config, changed), Local())


def plans_of(source: Source, weights: Sequence[np.ndarray]) -> Iterator[ChunkPlan]:
    """Yield the plans of chunks with some weights, or fewer if the data ends."""
    state = PlannerState.start(source.num_domains)
    for own in weights:
        plan, state = source.planner.plan(state, own)
        yield plan
        if plan.last:
            return


def content(batch: Batch) -> tuple[Any, ...]:
    arrays = (batch.domain_ids, batch.positions, batch.tokens, batch.loss_mask, batch.document_ids)
    values = tuple((array.dtype.str, array.shape, array.tobytes()) for array in arrays)
    plan = batch.chunk, batch.plan_digest, batch.micro_batches
    return (batch.step, plan, values, tuple(batch.digests or []), repr(batch.payloads))


def served(
    source: Source, weights: Sequence[np.ndarray], batch_slice: BatchSlice, max_chunks: int, first_step: int = 0
) -> tuple[list[Any], int]:
    """Return the content of all batches, and how many chunks were looked up before their plans arrived."""
    contents = []
    num_ahead = 0
    with at_most(max_chunks), closing(BatchMaker(source, batch_slice, audit=True)) as maker:
        for plan in plans_of(source, weights):
            num_ahead += len(maker._ahead._lookups) > 0
            contents += [content(batch) for batch in maker.batches(plan, first_step)]
    return contents, num_ahead


@contextmanager
def at_most(max_chunks: int) -> Iterator[None]:
    """Look up at most so many chunks together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps_ahead, "MAX_CHUNKS", max_chunks)
        yield


PLANES = st.fixed_dictionaries(
    {
        "seq_len": st.sampled_from([5, 15, 60]),
        "overlap_one_token": st.booleans(),
        "chunk_steps": st.integers(1, 4),
        "seed": st.integers(0, 3),
        "shuffle": st.sampled_from(["none", "block", "window", "sequence", "sequence"]),
        "window_bytes": st.sampled_from([500, 5000, 10**9]),
        "lanes": st.sampled_from([1, 3, None]),
        "pack": st.sampled_from(["concat", "concat", "best_fit"]),
        "pack_group": st.sampled_from([2, 8]),
        "balance": st.sampled_from(["none", "attention"]),
        "batch_schedule": st.sampled_from([[], [{"start": 5, "size": 24}]]),
        "last_batch": st.sampled_from(["drop", "pad"]),
    }
)
MIXTURES = st.fixed_dictionaries(
    {
        "on_exhausted": st.sampled_from(["repeat", "redistribute", "stop"]),
        "max_epochs": st.sampled_from([None, 0.5, 1.0, 2.5]),
    }
)
# Weights of chunks, as a learned mixture or a schedule may have them: the same ones for a while, then others.
WEIGHTS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 4)), min_size=1, max_size=4)


def weights_of(runs: Sequence[tuple[int, int]], source: Source) -> list[np.ndarray]:
    drawn = []
    for count, seed in runs:
        weights = source.weights if seed == 0 else np.random.default_rng(seed).dirichlet(np.ones(source.num_domains))
        drawn += [weights] * count
    return drawn


@whole_runs(80)
@given(PLANES, MIXTURES, WEIGHTS, st.integers(0, 2), st.sampled_from([1, 2, 3]), st.integers(0, 20))
def test_chunks_that_are_looked_up_together_have_the_same_batches(
    plain: dict[str, Any],
    plane: dict[str, Any],
    mixture: dict[str, Any],
    runs: list[tuple[int, int]],
    group: int,
    ranks: int,
    first_step: int,
) -> None:
    """Also where a run continues inside a chunk, and inside chunks that the run before has looked up together."""
    source = source_of(plain, mixture, plane)
    weights = weights_of(runs, source)
    batch_slice = BatchSlice(group=group % ranks, num_groups=ranks)
    alone, num_ahead = served(source, weights, batch_slice, 1)
    assert num_ahead == 0
    together, _ = served(source, weights, batch_slice, 8)
    assert together == alone
    resumed, _ = served(source, weights, batch_slice, 8, first_step)
    assert resumed == [own for own in alone if own[0] >= first_step]


@whole_runs(30)
@given(WEIGHTS, st.integers(1, 3), st.sampled_from([None, 5000]), st.sampled_from(["window", "sequence"]))
def test_samples_that_are_looked_up_together_are_the_same(
    plain_text: dict[str, Any], runs: list[tuple[int, int]], chunk_steps: int, budget: int | None, shuffle: str
) -> None:
    plane: dict[str, Any] = {"chunk_steps": chunk_steps, "shuffle": shuffle}
    if budget is not None:
        plane |= {"sample_budget": budget, "sample_cost": "bytes"}
    source = source_of(plain_text, {"unit": "samples"}, plane)
    weights = weights_of(runs, source)
    assert served(source, weights, BatchSlice(), 8)[0] == served(source, weights, BatchSlice(), 1)[0]


@pytest.mark.parametrize("shuffle", ["window", "sequence"])
def test_more_and_more_chunks_are_looked_up_while_weights_stay(plain: dict[str, Any], shuffle: str) -> None:
    source = source_of(plain, {}, {"chunk_steps": 2, "shuffle": shuffle})
    lengths = []
    other = np.array([0.2, 0.2, 0.6])
    with closing(BatchMaker(source, BatchSlice(), audit=False)) as maker:
        for plan in plans_of(source, [source.weights] * 18 + [other] * 3):
            list(maker.batches(plan, 0))
            lengths.append(len(maker._ahead._lookups))
    # One chunk, then two, four, and eight. What was expected of the chunk with other weights is dropped.
    assert lengths == [0, 1, 0, 3, 2, 1, 0, 7, 6, 5, 4, 3, 2, 1, 0, 7, 6, 5, 0, 1, 0]


def test_a_learned_mixture_is_not_looked_up_ahead(plain: dict[str, Any]) -> None:
    source = source_of(plain, {}, {"chunk_steps": 2})
    rng = np.random.default_rng(0)
    _, num_ahead = served(source, [rng.dirichlet(np.ones(NUM_DOMAINS)) for _ in range(12)], BatchSlice(), 8)
    assert num_ahead == 0


def test_no_more_is_looked_up_than_one_read_may_hold(plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(plain, {}, {"chunk_steps": 2})
    with closing(BatchMaker(source, BatchSlice(), audit=False)) as maker:
        maker._items_per_read = 5 * BATCH * (SEQ_LEN + 1)
        for plan in plans_of(source, [source.weights] * 9):
            list(maker.batches(plan, 0))
            assert len(maker._ahead._lookups) <= 1


def test_nothing_is_looked_up_after_the_last_step_of_the_run(tokens: list[str]) -> None:
    source = open_source(compose([*tokens, "training.num_steps=11", "dataplane.chunk_steps=2"]), Local())
    with closing(BatchMaker(source, BatchSlice(), audit=False)) as maker:
        for plan in plans_of(source, [source.weights] * 6):
            list(maker.batches(plan, 0))
            assert all(lookup.planned.steps.start <= 10 for lookup in maker._ahead._lookups)


def test_batches_are_written_to_the_memory_that_they_get_when_they_are_served(plain: dict[str, Any]) -> None:
    source = source_of(plain, {}, {"chunk_steps": 2, "shuffle": "sequence"})
    expected, _ = served(source, [source.weights] * 10, BatchSlice(), 1)
    contents = []
    with closing(BatchMaker(source, BatchSlice(), audit=True)) as maker:
        for plan in plans_of(source, [source.weights] * 10):
            steps = range(plan.first_step, plan.first_step + plan.num_steps)
            maker.shared_arrays = {step: TokenArrays.new(BATCH + 1, SEQ_LEN + 1) for step in steps}
            for batch in maker.batches(plan, 0):
                assert np.may_share_memory(batch.tokens, maker.shared_arrays[batch.step].tokens)
                contents.append(content(batch))
    assert contents == expected


def test_a_process_that_serves_some_steps_of_a_chunk_looks_up_these_only(plain: dict[str, Any]) -> None:
    source = source_of(plain, {}, {"chunk_steps": 4})
    expected, _ = served(source, [source.weights] * 10, BatchSlice(), 1)
    with closing(BatchMaker(source, BatchSlice(), audit=True)) as maker:
        for plan in plans_of(source, [source.weights] * 10):
            steps = range(plan.first_step + 2, plan.first_step + 4)
            assert [content(batch) for batch in maker.batches_of(plan, steps)] == [
                own for own in expected if own[0] in steps
            ]
            assert not maker._ahead._lookups


def test_what_was_looked_up_is_not_used_for_a_part_of_the_chunk(plain: dict[str, Any]) -> None:
    source = source_of(plain, {}, {"chunk_steps": 4})
    plans = list(plans_of(source, [source.weights] * 4))
    expected, _ = served(source, [source.weights] * 4, BatchSlice(), 1)
    with closing(BatchMaker(source, BatchSlice(), audit=True)) as maker:
        for plan in plans[:2]:
            list(maker.batches(plan, 0))
        assert maker._ahead._lookups
        assert [content(batch) for batch in maker.batches_of(plans[2], range(9, 11))] == expected[9:11]


def damage(path: Path, kind: str) -> None:
    """Change a token file: its length and times, or the table of its documents with all facts that are compared."""
    status = path.stat()
    if kind == "changed":
        path.write_bytes(path.read_bytes()[:-2])
    else:
        table = path.with_suffix(".idx")
        table_status = table.stat()
        table.write_bytes(table.read_bytes()[:-8])
        os.utime(table, ns=(table_status.st_atime_ns, table_status.st_mtime_ns))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("kind", ["changed", "removed", "damaged"])
@pytest.mark.parametrize("chunk", [3, 4, 5, 8, 9, 12])
def test_an_error_in_a_later_chunk_comes_at_its_own_step(tmp_path: Path, kind: str, chunk: int) -> None:
    """One file has the documents of one domain, which no chunk before `chunk` has."""
    rng = np.random.default_rng(0)
    for domain in range(2):
        write_megatron(tmp_path / f"d{domain}.bin", [rng.integers(1, 200, 20) for _ in range(400)])
    words = [f"data.root={tmp_path}", f"index.path={tmp_path / 'i.h5'}", "mixture=natural", "mixture.group_by=[source]"]
    words += ["data.properties.source={path: __stem__, pattern: '^([^-]*)'}", "index.block_rows=8"]
    words += ["dataplane.vocab_size=256", "dataplane.eos_id=0", "dataplane.seq_len=15", "dataplane.chunk_steps=2"]
    config = compose([*words, "dataplane.global_batch_size=4", "dataplane.shuffle=sequence", "dataplane.workers=0"])
    build_index(config)
    source = open_source(config, Local())
    # A rare domain, whose first sequence comes at a known step.
    rare = 1 / (8 * (chunk + 0.5))
    weights = np.array([1 - rare, rare])
    plans = list(plans_of(source, [weights] * 16))
    with closing(BatchMaker(source, BatchSlice(), audit=True)) as maker:
        expected = [content(batch) for plan in plans for batch in maker.batches(plan, 0)]
        rare_step = next(batch[0] for batch in expected if 1 in np.frombuffer(batch[2][0][2], np.int64))
    path = tmp_path / "d1.bin"
    if kind == "removed":
        path.unlink()
    else:
        damage(path, kind)

    ends = []
    for max_chunks in (1, 8):
        contents = []
        with (
            at_most(max_chunks),
            closing(BatchMaker(source, BatchSlice(), audit=True)) as maker,
            pytest.raises(DataError, match=r"d1"),
        ):
            for plan in plans:
                for batch in maker.batches(plan, 0):
                    contents.append(content(batch))
        assert contents == expected[: len(contents)]
        ends.append(len(contents))
    assert ends[0] == ends[1]
    # A changed file ends the run with the first chunk that needs it, at the latest.
    assert rare_step // 2 * 2 <= ends[0] <= rare_step


@whole_runs(60)
@given(st.integers(1, 6), st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 20))
def test_the_order_of_chunks_is_the_same_together(num_domains: int, seed: int, chunk_steps: int, batch: int) -> None:
    rng = np.random.default_rng(seed)
    planner = Planner(
        capacity=np.full(num_domains, Planner.UNLIMITED),
        batch_schedule=BatchSchedule.constant(batch),
        chunk_steps=chunk_steps,
        on_exhausted="repeat",
    )
    weights = rng.dirichlet(np.full(num_domains, 0.5))
    state = PlannerState.start(num_domains)
    orders = []
    for _ in range(5):
        plan, state = planner.plan(state, weights)
        orders.append(planner.order(plan))
    size = orders[0].num_slots
    borders = [np.unique(rng.integers(0, size + 3, 6)) for _ in orders]
    ranges = [list(zip(own[:-1:2].tolist(), own[1::2].tolist(), strict=False)) for own in borders]
    together = counts_of_chunks(orders, borders)
    for order, own, counts in zip(orders, borders, together, strict=True):
        assert np.array_equal(counts, order.cursors + order.counts_before(own))
    slots = slots_of_chunks(orders, ranges)
    alone = [order.slots(own) for order, own in zip(orders, ranges, strict=True) if own]
    assert np.array_equal(slots.together.domain, np.concatenate([own.together.domain for own in alone]))
    assert np.array_equal(slots.together.ordinal, np.concatenate([own.together.ordinal for own in alone]))
    assert np.array_equal(np.diff(slots.borders), np.concatenate([np.diff(own.borders) for own in alone]))
