"""Run edits: skipped data is skipped, the rest of an epoch is served once, and a replay proves it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.config.compose import compose_plain
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import Batch, DataPlane
from mixtera_hpc.dataplane.resume.run_edits import read_run_edits, record_run_edit, run_edit_between, subset_of_run
from mixtera_hpc.dataplane.resume.stream_version import StreamVersion
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.testing.thread_ranks import run_ranks
from mixtera_hpc.trace.served_run import ServedRun
from mixtera_hpc.trace.verify import verify_run

from .examples import whole_runs

STATE = dict[str, Any]
DYNAMIC = {"kind": "dynamic", "group_by": ["source"], "algorithm": {"name": "ado", "warmup": 4, "refit_interval": 4}}


@pytest.fixture(scope="module")
def plain(collection: list[str]) -> dict[str, Any]:
    return compose_plain([*collection, "dataplane.audit=true", "dataplane.seq_len=16"])


def config_of(plain: dict[str, Any], **sections: dict[str, object]) -> Config:
    return from_plain(Config, {**plain, **{k: {**plain[k], **v} for k, v in sections.items()}})


def serve(
    config: Config,
    folder: Path,
    attempt: int,
    steps: int,
    state: STATE | None = None,
    comm: Communicator | None = None,
) -> tuple[list[Batch], STATE]:
    """Return the batches until `steps` are done or the data ends, and the state after them (on rank 0)."""
    with DataPlane.open(config, comm or Local(), RunFolder(folder), attempt) as plane:
        if state is not None:
            plane.load_state_dict(state)
        batches = []
        for batch in plane if plane.next_step < steps else []:
            batches.append(batch)
            if batch.tokens.size:
                plane.record(batch, 1.0 + (batch.tokens[:, 1:] % 97) / (3 + batch.domain_ids[:, None]))
            if batch.step + 1 == steps:
                break
        saved = plane.state_dict()
        assert saved is not None
        return batches, saved


def record_edit(
    before: Config,
    after: Config,
    folder: Path,
    at_step: int,
    skip: tuple[int, int] | None = None,
    drop: Sequence[str] = (),
) -> None:
    path = RunFolder(folder).decisions
    edit = run_edit_between(before, after, read_run_edits(path), at_step=at_step, skip_steps=skip, drop=drop)
    assert edit is not None
    record_run_edit(path, edit)


@pytest.fixture
def new_folder(tmp_path: Path) -> Callable[[], Path]:
    """Return a new folder for every example."""
    made = iter(range(10**6))

    def make() -> Path:
        folder = tmp_path / str(next(made))
        folder.mkdir()
        return folder

    return make


SLOW = whole_runs(25)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=5), st.integers(0, 80))
def test_steps_count_the_data_steps_that_are_not_skipped(spans: list[tuple[int, int]], data_step: int) -> None:
    skips = [(first, first + length) for first, length in spans]
    version = StreamVersion.start(1).with_skips(skips)
    served = [d for d in range(200) if not any(a <= d <= b for a, b in skips)]
    assert [version.data_step(s) for s in range(100)] == served[:100]
    assert version.step_at(data_step) == sum(d < data_step for d in served)
    assert version.is_skipped(data_step) == (data_step not in served)


@SLOW
@given(
    st.sampled_from(["natural", "dynamic"]), st.integers(0, 9), st.integers(0, 9), st.integers(1, 14), st.integers(1, 4)
)
def test_skipped_steps_are_the_only_ones_missing(
    plain: dict[str, Any], new_folder: Callable[[], Path], kind: str, stop: int, ahead: int, count: int, chunk: int
) -> None:
    mixture = DYNAMIC if kind == "dynamic" else {"group_by": ["source"]}
    config = config_of(plain, mixture=mixture, dataplane={"global_batch_size": 6, "chunk_steps": chunk})
    folder = new_folder()
    first = stop + ahead
    before_edit, state = serve(config, folder, 1, stop)
    record_edit(config, config, folder, stop, (first, first + count - 1))
    after_edit, _ = serve(config, folder, 2, 30, state)
    assert [b.step for b in before_edit + after_edit] == list(range(30))
    if kind == "natural":
        whole, _ = serve(config, new_folder(), 1, 30 + count)
        expected = [b.digests for b in whole if not first <= b.step < first + count]
        assert [b.digests for b in before_edit + after_edit] == expected
    run = RunFolder(folder)
    assert verify_run(ServedRun(run, config)).num_steps == 30


@SLOW
@given(
    st.sampled_from(["none", "block", "window", "sequence"]),
    st.integers(1, 20),
    st.sampled_from([1, 3, None, 500]),
    st.integers(0, 30),
    st.sampled_from([["source == 'argparse'"], ["size < 300"], ["'def' in tags", "source in ['ast', 'enum']"]]),
    st.sampled_from([6, 4, 9]),
    st.sampled_from([None, "source"]),
)
def test_after_a_drop_the_rest_of_the_epoch_is_served_once(
    plain: dict[str, Any],
    new_folder: Callable[[], Path],
    shuffle: str,
    window: int,
    lanes: int | None,
    stop: int,
    drop: list[str],
    batch: int,
    by: str | None,
) -> None:
    mixture = {"group_by": [by] if by else [], "unit": "samples", "on_exhausted": "redistribute", "max_epochs": 1.0}
    plane = {
        "global_batch_size": 6,
        "chunk_steps": 4,
        "shuffle": shuffle,
        "window_bytes": window * 4000,
        "lanes": lanes,
    }
    before = config_of(plain, mixture=mixture, dataplane=plane)
    folder = new_folder()
    first_batches, state = serve(before, folder, 1, stop)
    after = replace(before, dataplane=replace(before.dataplane, global_batch_size=batch))
    record_edit(before, after, folder, stop, drop=drop)
    later_batches, _ = serve(after, folder, 2, 1000, state)
    ids = [p["meta"]["id"] for b in first_batches + later_batches for p in b.payloads or []]
    assert len(set(ids)) == len(ids)
    later = {p["meta"]["id"] for b in later_batches for p in b.payloads or []}
    everything, _ = serve(before, new_folder(), 1, 1000)
    rows = {p["meta"]["id"]: p for b in everything for p in b.payloads or []}
    dropped = {i for i, row in rows.items() if is_dropped(row, drop)}
    assert not later & dropped
    missing = rows.keys() - dropped - set(ids)
    assert len(missing) <= batch + 6


def is_dropped(row: dict[str, Any], drop: list[str]) -> bool:
    meta = row["meta"]
    names = {"source": meta["source"], "tags": meta["tags"], "size": meta["size"] if meta["size"] is not None else 1e9}
    return any(eval(expression, {}, names) for expression in drop)


@SLOW
@given(
    st.integers(0, 12),
    st.integers(0, 12),
    st.sampled_from(["natural", "dynamic"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([{}, {"shuffle": "sequence"}, {"pack": "best_fit", "pack_group": 6, "balance": "attention"}]),
)
def test_a_replay_proves_a_run_with_several_edits(
    plain: dict[str, Any],
    new_folder: Callable[[], Path],
    first: int,
    more: int,
    kind: str,
    reseed: bool,
    grow: bool,
    order: dict[str, object],
) -> None:
    mixture = DYNAMIC if kind == "dynamic" else {"group_by": ["source"]}
    config = config_of(plain, mixture=mixture, dataplane={"global_batch_size": 6, "chunk_steps": 3, **order})
    folder = new_folder()
    plane = replace(config.dataplane, seed=9 if reseed else 0, global_batch_size=10 if grow else 6)
    changed = replace(config, dataplane=plane)
    _, state = serve(config, folder, 1, first)
    record_edit(config, config, folder, first, (first + 2, first + 3), drop=["source == 'argparse'"])
    _, state = serve(config, folder, 2, first + more, state)
    record_edit(config, changed, folder, first + more, drop=["size > 2000"])
    serve(changed, folder, 3, 30, state)
    run = RunFolder(folder)
    result = verify_run(ServedRun(run, changed))
    assert result.num_steps == 30
    assert result.num_sequences == 6 * (first + more) + (10 if grow else 6) * (30 - first - more)


@pytest.mark.parametrize("on_exhausted", ["repeat", "redistribute", "stop"])
def test_the_others_take_the_share_of_a_domain_that_was_dropped(
    plain: dict[str, Any], new_folder: Callable[[], Path], on_exhausted: str
) -> None:
    domains = [{"key": {"source": s}, "weight": w} for s, w in (("ast", 0.5), ("enum", 0.3), ("inspect", 0.2))]
    mixture = {"kind": "static", "domains": domains, "on_exhausted": on_exhausted, "max_epochs": 4.0}
    config = config_of(plain, mixture=mixture, dataplane={"global_batch_size": 6})
    folder = new_folder()
    _, state = serve(config, folder, 1, 3)
    record_edit(config, config, folder, 3, drop=["source == 'ast'"])
    batches, _ = serve(config, folder, 2, 8, state)
    assert len(batches) == 5
    assert {d for batch in batches for d in batch.domain_ids.tolist()} == {1, 2}


def test_a_state_that_an_edit_abandoned_is_refused(plain: dict[str, Any], new_folder: Callable[[], Path]) -> None:
    config = config_of(plain, dataplane={"global_batch_size": 6})
    folder = new_folder()
    _, state = serve(config, folder, 1, 9)
    record_edit(config, config, folder, 5, (6, 7))
    with pytest.raises(ConfigError, match="continue from step 5"):
        serve(config, folder, 2, 12, state)


def test_a_change_that_is_not_recorded_is_refused(plain: dict[str, Any], new_folder: Callable[[], Path]) -> None:
    config = config_of(plain, dataplane={"global_batch_size": 6})
    folder = new_folder()
    _, state = serve(config, folder, 1, 4)
    with pytest.raises(ConfigError, match="seed was 0, is 3"):
        serve(replace(config, dataplane=replace(config.dataplane, seed=3)), folder, 2, 8, state)


@pytest.mark.parametrize("at_step", [6, 7])
def test_a_schedule_by_tokens_counts_steps_as_large_as_they_were(
    plain: dict[str, Any], new_folder: Callable[[], Path], at_step: int
) -> None:
    tokens = at_step * 6 * 16 + (12 - at_step) * 12 * 16  # Served before step 12.
    stages = [
        {"start": start, "domains": [{"key": {"source": name}, "weight": 1.0}]}
        for start, name in ((0, "argparse"), (tokens, "ast"))
    ]
    mixture = {"kind": "schedule", "schedule": {"unit": "tokens", "stages": stages}}
    before = config_of(plain, mixture=mixture, dataplane={"global_batch_size": 6, "chunk_steps": 3})
    folder = new_folder()
    after = replace(before, dataplane=replace(before.dataplane, global_batch_size=12))
    _, state = serve(before, folder, 1, at_step)
    record_edit(before, after, folder, at_step)
    batches, state = serve(after, folder, 2, 10, state)
    more, _ = serve(after, folder, 3, 16, state)
    domains = {batch.step: set(batch.domain_ids.tolist()) for batch in [*batches, *more]}
    assert domains == {step: {0} if step < 12 else {1} for step in range(at_step, 16)}


def test_drops_accumulate_and_are_not_lost(plain: dict[str, Any], new_folder: Callable[[], Path]) -> None:
    config = config_of(plain, dataplane={"global_batch_size": 6})
    folder = new_folder()
    record_edit(config, config, folder, 0, drop=["source == 'ast'"])
    record_edit(config, replace(config, dataplane=replace(config.dataplane, seed=1)), folder, 0)
    record_edit(config, config, folder, 0, drop=["source == 'enum'"])
    assert subset_of_run(RunFolder(folder)).drop == ("source == 'ast'", "source == 'enum'")


def test_a_state_with_drops_is_refused_without_the_folder_that_records_them(
    plain: dict[str, Any], new_folder: Callable[[], Path]
) -> None:
    config = config_of(plain, dataplane={"global_batch_size": 6})
    folder = new_folder()
    record_edit(config, config, folder, 0, drop=["source == 'ast'"])
    _, state = serve(config, folder, 1, 3)
    with DataPlane.open(config, Local()) as plane, pytest.raises(ConfigError, match="with the folder of the run"):
        plane.load_state_dict(state)


def test_all_ranks_serve_the_edits_that_rank_0_reads(plain: dict[str, Any], new_folder: Callable[[], Path]) -> None:
    before = config_of(plain, mixture=DYNAMIC, dataplane={"global_batch_size": 6, "chunk_steps": 3})
    after = replace(before, dataplane=replace(before.dataplane, global_batch_size=12))
    digests = []
    for num_ranks in (1, 3):
        folder = new_folder()
        _, state = serve(before, folder, 1, 5)
        record_edit(before, after, folder, 5, (6, 7), drop=["source == 'ast'"])
        attempt = partial(serve, after, folder, 2, 12, state)
        ranks = run_ranks(num_ranks, attempt)
        steps = zip(*(batches for batches, _ in ranks), strict=True)
        digests.append([[digest for batch in step for digest in batch.digests or []] for step in steps])
    assert digests[0] == digests[1]
    assert len(digests[0]) == 7
