"""A sample is found wherever it was served, through epochs, restarts and run edits; two runs are compared."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.recording.run_history import History
from mixtera_hpc.dataplane.resume.run_edits import read_run_edits, record_run_edit, run_edit_between
from mixtera_hpc.errors import DataError
from mixtera_hpc.trace.diff import first_difference
from mixtera_hpc.trace.list import served_sequences
from mixtera_hpc.trace.locate import locate_row
from mixtera_hpc.trace.served_run import ServedRun

from .examples import FIXTURES_TOO

SHARDS = [("a.jsonl", 120), ("b.jsonl.gz", 120), ("c.jsonl.zst", 120), ("d.parquet", 120)]


PACKED = ["dataplane.pack=best_fit", "dataplane.pack_group=5", "dataplane.balance=attention"]
ORDERS = {"default": [], "packed": PACKED, "sequences": ["dataplane.shuffle=sequence"]}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(words, id=name, marks=() if number == 0 else pytest.mark.full)
        for number, (name, words) in enumerate(ORDERS.items())
    ],
)
def config(request: pytest.FixtureRequest, collection: list[str]) -> Config:
    sizes = ["dataplane.seq_len=64", "dataplane.global_batch_size=8", "dataplane.chunk_steps=3"]
    return compose([*collection, *sizes, *request.param])


def serve(config: Config, folder: Path, attempt: int, until: int, state: Any = None) -> Any:
    with DataPlane.open(config, Local(), RunFolder(folder), attempt) as plane:
        if state is not None:
            plane.load_state_dict(state)
        while plane.next_step < until:
            next(iter(plane))
        return plane.state_dict()


def opened(config: Config, folder: Path) -> ServedRun:
    return ServedRun(RunFolder(folder), config)


@pytest.fixture(scope="module")
def edited_run(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[ServedRun, dict[Any, list[Any]]]:
    """Serve several epochs with a skip, a drop, another seed and batch size; also return where each row was served."""
    folder = tmp_path_factory.mktemp("edited")
    after = replace(config, dataplane=replace(config.dataplane, seed=4, global_batch_size=6))
    state = serve(config, folder, 1, 61)
    path = RunFolder(folder).decisions
    edit = run_edit_between(
        config, after, read_run_edits(path), at_step=61, skip_steps=(70, 75), drop=["source == 'ast'"]
    )
    assert edit is not None
    record_run_edit(path, edit)
    serve(after, folder, 2, 160, state)
    run = opened(after, folder)
    naive: dict[Any, list[Any]] = {}
    for attempt, steps in run.history.extents():
        for record in served_sequences(run.source_of(attempt), attempt, range(steps.start, min(steps.stop, 160))):
            for shard, row, start, end in record["segments"]:
                naive.setdefault((shard, row), []).append((record["step"], record["position"], [start, end]))
    return run, naive


@settings(max_examples=60, deadline=None, suppress_health_check=FIXTURES_TOO)
@given(st.sampled_from(SHARDS), st.integers(0, 119))
def test_every_service_of_a_row_is_located_and_no_other(
    edited_run: tuple[ServedRun, dict[Any, list[Any]]], shard: tuple[str, int], row: int
) -> None:
    run, naive = edited_run
    located = [(r["step"], r["position"], r["items"]) for r in locate_row(run, shard[0], row)]
    expected = naive.get((shard[0], row), [])
    assert sorted(located) == sorted(expected)


def test_rows_were_served_in_several_epochs_and_on_both_sides_of_the_edit(
    edited_run: tuple[ServedRun, dict[Any, list[Any]]],
) -> None:
    """Without this, the test above would compare nothing."""
    run, naive = edited_run
    epochs = {r["epoch"] for (shard, row) in list(naive)[:40] for r in locate_row(run, shard, row)}
    attempts = {r["attempt"] for (shard, row) in list(naive)[:40] for r in locate_row(run, shard, row)}
    assert len(epochs) > 1 and attempts == {1, 2}


@pytest.mark.parametrize(
    ("shard", "row", "message"), [("a.json", 0, "Did you mean 'a.jsonl'"), ("a.jsonl", 120, "rows 0 to 119")]
)
def test_a_row_that_does_not_exist_is_refused(
    edited_run: tuple[ServedRun, dict[Any, list[Any]]], shard: str, row: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        list(locate_row(edited_run[0], shard, row))


def test_the_same_run_twice_has_no_difference(config: Config, tmp_path: Path) -> None:
    for name, until in (("one", 14), ("two", 20)):
        serve(config, tmp_path / name, 1, until)
    difference = first_difference(opened(config, tmp_path / "one"), opened(config, tmp_path / "two"))
    assert (difference.step, difference.causes) == (None, [])
    assert difference.num_same_steps == 14


def test_steps_that_were_planned_and_not_served_do_not_count(config: Config, tmp_path: Path) -> None:
    """A run that ended normally had planned one more chunk; the other run continued with other data from there."""
    for name, until in (("one", 12), ("two", 12)):
        state = serve(config, tmp_path / name, 1, until)
    edit = run_edit_between(config, config, [], at_step=12, skip_steps=(12, 13))
    assert edit is not None
    record_run_edit(RunFolder(tmp_path / "two").decisions, edit)
    serve(config, tmp_path / "two", 2, 20, state)
    difference = first_difference(opened(config, tmp_path / "one"), opened(config, tmp_path / "two"))
    assert (difference.step, difference.num_same_steps) == (None, 12)
    assert History(RunFolder(tmp_path / "one").journal).end == 12


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda c: replace(c, dataplane=replace(c.dataplane, seed=1)), "seed: 0 and 1"),
        (lambda c: replace(c, dataplane=replace(c.dataplane, seq_len=32)), "seq_len: 64 and 32"),
        (lambda c: replace(c, query=replace(c.query, where="source != 'ast'")), "where: "),
    ],
)
def test_other_settings_are_named_as_the_cause(config: Config, tmp_path: Path, change: Any, cause: str) -> None:
    serve(config, tmp_path / "one", 1, 4)
    serve(change(config), tmp_path / "two", 1, 4)
    difference = first_difference(opened(config, tmp_path / "one"), opened(change(config), tmp_path / "two"))
    assert difference.step == 0
    assert any(c.startswith(cause) for c in difference.causes)


def test_a_skip_is_the_first_difference_at_its_step(config: Config, tmp_path: Path) -> None:
    serve(config, tmp_path / "one", 1, 20)
    state = serve(config, tmp_path / "two", 1, 5)
    edit = run_edit_between(config, config, [], at_step=5, skip_steps=(8, 9))
    assert edit is not None
    record_run_edit(RunFolder(tmp_path / "two").decisions, edit)
    serve(config, tmp_path / "two", 2, 20, state)
    difference = first_difference(opened(config, tmp_path / "one"), opened(config, tmp_path / "two"))
    assert difference.step == 8
    assert difference.causes == ["skipped data steps: [] and [(8, 9)]"]
