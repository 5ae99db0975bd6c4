"""A sample is found wherever it was served, through epochs, restarts and surgery; two runs are told apart where they part."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.journal import History
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.resume.run_edits import read_run_edits, record_run_edit, run_edit_between
from mixtera_hpc.errors import DataError
from mixtera_hpc.trace.attempt_sources import AttemptSources
from mixtera_hpc.trace.diff import first_difference
from mixtera_hpc.trace.list import served_sequences
from mixtera_hpc.trace.locate import locate_row

Run = tuple[AttemptSources, History]
SHARDS = [("a.jsonl", 120), ("b.jsonl.gz", 120), ("c.jsonl.zst", 120), ("d.parquet", 120)]


@pytest.fixture(scope="module")
def config(collection: list[str]) -> Config:
    return compose([*collection, "dataplane.seq_len=64", "dataplane.global_batch_size=8", "dataplane.chunk_steps=3"])


def serve(config: Config, folder: Path, attempt: int, until: int, state: Any = None) -> Any:
    with DataPlane.open(config, Local(), RunFolder(folder), attempt) as plane:
        if state is not None:
            plane.load_state_dict(state)
        while plane.next_step < until:
            next(iter(plane))
        return plane.state_dict()


def opened(config: Config, folder: Path) -> Run:
    return AttemptSources(config), History(RunFolder(folder).journal)


@pytest.fixture(scope="module")
def operated(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[Any, list[Any]]]:
    """A run of several epochs with a skip, a drop, another seed and batch size; and where each row was served, looked up naively."""
    folder = tmp_path_factory.mktemp("operated")
    after = replace(
        config,
        query=replace(config.query, drop=["source == 'ast'"]),
        dataplane=replace(config.dataplane, seed=4, global_batch_size=6),
    )
    state = serve(config, folder, 1, 61)
    path = RunFolder(folder).decisions
    surgery = run_edit_between(config, after, (70, 75), 61, read_run_edits(path))
    assert surgery is not None
    record_run_edit(path, surgery)
    serve(after, folder, 2, 160, state)
    run = opened(after, folder)
    naive: dict[Any, list[Any]] = {}
    for attempt, steps in run[1].extents():
        for record in served_sequences(run[0].of(attempt), attempt, range(steps.start, min(steps.stop, 160))):
            for shard, row, start, end in record["segments"]:
                naive.setdefault((shard, row), []).append((record["step"], record["position"], [start, end]))
    return run, naive


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(SHARDS), st.integers(0, 119))
def test_every_time_a_row_was_served_is_found_and_no_other(
    operated: tuple[Run, dict[Any, list[Any]]], shard: tuple[str, int], row: int
) -> None:
    run, naive = operated
    found = [(r["step"], r["position"], r["items"]) for r in locate_row(*run, shard[0], row)]
    expected = naive.get((shard[0], row), [])
    assert sorted(found) == sorted(expected)


def test_rows_were_seen_in_more_than_one_epoch_and_across_the_surgery(
    operated: tuple[Run, dict[Any, list[Any]]],
) -> None:
    """The test above looks at something that happens."""
    run, naive = operated
    epochs = {r["epoch"] for (shard, row) in list(naive)[:40] for r in locate_row(*run, shard, row)}
    attempts = {r["attempt"] for (shard, row) in list(naive)[:40] for r in locate_row(*run, shard, row)}
    assert len(epochs) > 1 and attempts == {1, 2}


@pytest.mark.parametrize(
    ("shard", "row", "said"), [("a.json", 0, "Did you mean 'a.jsonl'"), ("a.jsonl", 120, "rows 0 to 119")]
)
def test_a_row_that_does_not_exist_is_refused(
    operated: tuple[Run, dict[Any, list[Any]]], shard: str, row: int, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        list(locate_row(*operated[0], shard, row))


def test_the_same_run_twice_has_no_difference(config: Config, tmp_path: Path) -> None:
    for name, until in (("one", 14), ("two", 20)):
        serve(config, tmp_path / name, 1, until)
    found = first_difference(opened(config, tmp_path / "one"), opened(config, tmp_path / "two"))
    assert (found.step, found.causes) == (None, [])
    assert found.num_same_steps == 14


def test_what_was_planned_and_never_served_is_no_part_of_a_run(config: Config, tmp_path: Path) -> None:
    """A run that ended in order had planned a chunk more; another went on with other data from there."""
    for name, until in (("one", 12), ("two", 12)):
        state = serve(config, tmp_path / name, 1, until)
    surgery = run_edit_between(config, config, (12, 13), 12, [])
    assert surgery is not None
    record_run_edit(RunFolder(tmp_path / "two").decisions, surgery)
    serve(config, tmp_path / "two", 2, 20, state)
    found = first_difference(opened(config, tmp_path / "one"), opened(config, tmp_path / "two"))
    assert (found.step, found.num_same_steps) == (None, 12)
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
    found = first_difference(opened(config, tmp_path / "one"), opened(change(config), tmp_path / "two"))
    assert found.step == 0
    assert any(c.startswith(cause) for c in found.causes)


def test_a_skip_is_the_first_difference_at_its_step(config: Config, tmp_path: Path) -> None:
    serve(config, tmp_path / "one", 1, 20)
    state = serve(config, tmp_path / "two", 1, 5)
    surgery = run_edit_between(config, config, (8, 9), 5, [])
    assert surgery is not None
    record_run_edit(RunFolder(tmp_path / "two").decisions, surgery)
    serve(config, tmp_path / "two", 2, 20, state)
    found = first_difference(opened(config, tmp_path / "one"), opened(config, tmp_path / "two"))
    assert found.step == 8
    assert found.causes == ["skipped data steps: [] and [(8, 9)]"]
