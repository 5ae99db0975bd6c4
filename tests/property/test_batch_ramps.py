"""Batch ramps: every step has its size, counts stay exact, and no number of ranks, resume or edit changes a step."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose_plain
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.core.planner import Planner
from mixtera_hpc.core.slots.batch_schedule import BatchSchedule
from mixtera_hpc.dataplane.plane import Batch, DataPlane
from mixtera_hpc.dataplane.recording.run_history import History
from mixtera_hpc.dataplane.resume.run_edits import read_run_edits, record_run_edit, run_edit_between
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.testing.thread_ranks import run_ranks
from mixtera_hpc.trace.list import planned_sequences, served_sequences
from mixtera_hpc.trace.locate import locate_row
from mixtera_hpc.trace.served_run import ServedRun
from mixtera_hpc.trace.verify import verify_run

from .examples import whole_runs

SLOW = whole_runs(12)
STAGES = st.dictionaries(st.integers(1, 17), st.sampled_from([2, 4, 8, 12]), max_size=3)
DYNAMIC = {"kind": "dynamic", "algorithm": {"name": "ado", "warmup": 4, "refit_interval": 4}}


def ramp(stages: dict[int, int], size: int = 4) -> BatchSchedule:
    return BatchSchedule.ramp(size, sorted(stages.items()))


def as_config(stages: dict[int, int]) -> list[dict[str, int]]:
    return [{"start": start, "size": size} for start, size in sorted(stages.items())]


@settings(deadline=None)
@given(STAGES, st.integers(0, 25), st.integers(0, 99))
def test_sequences_are_counted_over_all_stages(stages: dict[int, int], step: int, sequence: int) -> None:
    schedule = ramp(stages)
    sizes = [max([(start, size) for start, size in [(0, 4), *stages.items()] if start <= s])[1] for s in range(60)]
    ends = list(accumulate(sizes))
    assert schedule.size_at(step) == sizes[step]
    assert schedule.sequences_before(step) == sum(sizes[:step])
    number = next(s for s in range(60) if sequence < ends[s])
    assert schedule.locate(sequence) == (number, sequence - (ends[number] - sizes[number]))


@settings(deadline=None)
@given(
    STAGES,
    st.lists(st.floats(0.01, 1), min_size=1, max_size=5),
    st.integers(1, 7),
)
def test_counts_are_exact_after_every_step_of_a_ramp(stages: dict[int, int], weights: list[float], chunk: int) -> None:
    schedule = ramp(stages)
    shares = np.array(weights) / sum(weights)
    planner = Planner(
        capacity=np.full(len(weights), Planner.UNLIMITED),
        batch_schedule=schedule,
        chunk_steps=chunk,
        on_exhausted="repeat",
    )
    state = PlannerState.start(len(weights))
    counts = np.zeros(len(weights), np.int64)
    while state.step < 40:
        plan, after = planner.plan(state, shares)
        slots = planner.slots(plan).domain
        first = 0
        for step in range(plan.first_step, plan.first_step + plan.num_steps):
            of_step = slots[first : first + schedule.size_at(step)]
            first += len(of_step)
            counts += np.bincount(of_step, minlength=len(weights))
            assert np.abs(counts - shares * schedule.sequences_before(step + 1)).max() < 1 + 1e-6
            assert (planner.state_at(plan, step + 1).cursors == counts).all()
        assert first == len(slots)
        state = after


@settings(deadline=None)
@given(STAGES, st.integers(1, 200), st.sampled_from(["drop", "pad"]), st.integers(1, 5))
def test_the_data_end_in_a_full_step_or_in_one_with_padding(
    stages: dict[int, int], capacity: int, last_batch: str, chunk: int
) -> None:
    schedule = ramp(stages)
    planner = Planner(
        capacity=np.array([capacity]),
        batch_schedule=schedule,
        chunk_steps=chunk,
        on_exhausted="redistribute",
        last_batch=last_batch,  # type: ignore[arg-type]
    )
    state = PlannerState.start(1)
    while True:
        plan, state = planner.plan(state, np.ones(1))
        if plan.last:
            break
    step, position = schedule.locate(capacity)
    assert state.step == step + (last_batch == "pad" and position > 0)
    assert planner.end_of_data(plan)[1] == position


@pytest.fixture(scope="module")
def plain(collection: list[str]) -> dict[str, Any]:
    words = ["dataplane.audit=true", "dataplane.workers=0", "dataplane.global_batch_size=4", "dataplane.seq_len=16"]
    return compose_plain([*collection, *words])


@pytest.fixture
def new_folder(tmp_path: Path) -> Callable[[], Path]:
    """Return a new folder for every example."""
    made = iter(range(10**6))

    def make() -> Path:
        folder = tmp_path / str(next(made))
        folder.mkdir()
        return folder

    return make


def config_of(plain: dict[str, Any], mixture: dict[str, Any], **plane: Any) -> Config:
    sections = {"mixture": {**plain["mixture"], **mixture}, "dataplane": {**plain["dataplane"], **plane}}
    return from_plain(Config, {**plain, **sections})


def serve(
    config: Config, folder: Path, attempt: int, steps: int, state: dict[str, Any] | None = None, comm: Any = None
) -> tuple[list[Batch], dict[str, Any]]:
    """Return the batches until `steps` are done, and the state after them."""
    with DataPlane.open(config, comm or Local(), RunFolder(folder), attempt) as plane:
        if state is not None:
            plane.load_state_dict(state)
        batches = []
        for batch in plane if plane.next_step < steps else []:
            batches.append(batch)
            half = max(len(batch.positions) // 2, 1)
            for rows in (slice(0, half), slice(half, None)):
                loss = 1.0 + (batch.tokens[rows, 1:] % 97) / (3 + batch.domain_ids[rows, None])
                if len(loss):
                    plane.record(batch, loss, rows=rows)
            if batch.step + 1 == steps:
                break
        return batches, plane.state_dict()


def digests_of(ranks: list[tuple[list[Batch], Any]]) -> list[list[str]]:
    steps = zip(*(batches for batches, _ in ranks), strict=True)
    return [[digest for batch in step for digest in batch.digests or []] for step in steps]


@SLOW
@given(STAGES, st.integers(0, 19), st.integers(1, 5), st.sampled_from([1, 16]), st.booleans())
def test_steps_are_the_same_on_any_number_of_ranks_and_after_a_resume(
    plain: dict[str, Any],
    new_folder: Callable[[], Path],
    stages: dict[int, int],
    stop: int,
    chunk: int,
    lanes: int,
    learns: bool,
) -> None:
    mixture = {"group_by": ["source"], **(DYNAMIC if learns else {})}
    config = config_of(plain, mixture, batch_schedule=as_config(stages), chunk_steps=chunk, lanes=lanes)
    whole, _ = serve(config, new_folder(), 1, 20)
    sizes = [len(batch.positions) for batch in whole]
    assert sizes == [ramp(stages).size_at(step) for step in range(20)]

    folder = new_folder()
    begun = run_ranks(2, partial(serve, config, folder, 1, stop, None))
    rest, _ = serve(config, folder, 2, 20, begun[0][1])
    assert digests_of(begun) + [batch.digests for batch in rest] == [batch.digests for batch in whole]
    run = RunFolder(folder)
    history = History(run.journal)
    assert verify_run(ServedRun(run, config)).num_sequences == sum(sizes)
    # `plan` and `trace` agree on every step, if nothing is learned.
    source = ServedRun(run, config).source_of(history.attempts[0])
    if not learns:
        planned = [record["segments"] for record in planned_sequences(source, 0, 20)]
        attempts = history.extents()
        served = [r for a, steps in attempts for r in served_sequences(ServedRun(run, config).source_of(a), a, steps)]
        assert [record["segments"] for record in served] == planned


@SLOW
@given(STAGES, STAGES, st.integers(0, 11), st.sampled_from([8, 32]), st.booleans())
def test_a_replay_proves_a_ramp_and_a_change_of_length_in_one_run(
    plain: dict[str, Any],
    new_folder: Callable[[], Path],
    before: dict[int, int],
    after: dict[int, int],
    at_step: int,
    seq_len: int,
    learns: bool,
) -> None:
    mixture = {"group_by": ["source"], **(DYNAMIC if learns else {})}
    first = config_of(plain, mixture, batch_schedule=as_config(before), chunk_steps=3)
    second = config_of(plain, mixture, batch_schedule=as_config(after), chunk_steps=3, seq_len=seq_len)
    folder = new_folder()
    _, state = serve(first, folder, 1, at_step)
    run = RunFolder(folder)
    edit = run_edit_between(
        first, second, read_run_edits(run.decisions), at_step=at_step, skip_steps=(at_step, at_step)
    )
    assert edit is not None
    record_run_edit(run.decisions, edit)
    ranks = run_ranks(2, partial(serve, second, folder, 2, 22, state))
    sizes = [ramp(before).size_at(step) for step in range(at_step)]
    # One data step was skipped: the ramp counts data steps.
    sizes += [ramp(after).size_at(step + 1) for step in range(at_step, 22)]
    assert [len(digests) for digests in digests_of(ranks)] == sizes[at_step:]
    history = History(run.journal)
    assert verify_run(ServedRun(run, second)).num_sequences == sum(sizes)
    # Both ways to look at a document agree.
    source = ServedRun(run, second).source_of(history.attempts[-1])
    [record, *_] = served_sequences(source, history.attempts[-1], range(20, 21))
    shard, row, _, _ = record["segments"][0]
    places = [(p["step"], p["position"]) for p in locate_row(ServedRun(run, second), shard, row)]
    assert (20, record["position"]) in places


@pytest.mark.slow
@pytest.mark.parametrize("words", [{"workers": 2}, {"delivery": "lead", "model_parallel_size": 2}])
def test_processes_and_leaders_serve_the_batches_of_a_ramp(
    plain: dict[str, Any], new_folder: Callable[[], Path], words: dict[str, Any]
) -> None:
    stages = [{"start": 3, "size": 12}, {"start": 7, "size": 8}]
    config = config_of(plain, {"group_by": ["source"]}, batch_schedule=stages, chunk_steps=4)
    whole, _ = serve(config, new_folder(), 1, 12)
    other = replace(config, dataplane=replace(config.dataplane, **words))
    ranks = run_ranks(2, partial(serve, other, new_folder(), 1, 12, None))
    ranks = ranks[:1] if "delivery" in words else ranks
    assert digests_of(ranks) == [batch.digests for batch in whole]
    for batches, _ in ranks:
        for own, batch in zip(batches, whole, strict=True):
            assert (own.tokens == batch.tokens[own.positions]).all()
            assert (own.loss_mask == batch.loss_mask[own.positions]).all()


@pytest.mark.parametrize(("size", "stop"), [(4, 5), (4, 6), (4, 9), (2, 6)])
def test_ranks_need_not_share_the_stages_that_are_past(
    plain: dict[str, Any], new_folder: Callable[[], Path], size: int, stop: int
) -> None:
    # Three ranks cannot share batches of 4 or 2. Step 5 lies inside of a chunk that begins with such a batch.
    sizes = {"global_batch_size": size, "batch_schedule": as_config({5: 12})}
    config = config_of(plain, {"group_by": ["source"]}, **sizes, chunk_steps=4)
    whole, _ = serve(config, new_folder(), 1, 12)
    folder = new_folder()
    begun, state = serve(config, folder, 1, stop)
    ranks = run_ranks(3, partial(serve, config, folder, 2, 12, state))
    assert [batch.digests for batch in begun] + digests_of(ranks) == [batch.digests for batch in whole]
    assert verify_run(ServedRun(RunFolder(folder), config)).num_sequences == 5 * size + 7 * 12


@pytest.mark.parametrize("stop", [0, 4])
def test_ranks_that_cannot_share_a_coming_stage_are_refused_before_its_first_batch(
    plain: dict[str, Any], new_folder: Callable[[], Path], stop: int
) -> None:
    config = config_of(plain, {"group_by": ["source"]}, batch_schedule=as_config({5: 12}), chunk_steps=4)
    state = serve(config, new_folder(), 1, stop)[1] if stop else None
    with pytest.raises(ConfigError, match=r"dataplane\.global_batch_size=4 cannot be shared evenly by 3"):
        run_ranks(3, partial(serve, config, new_folder(), 1, 12, state))
