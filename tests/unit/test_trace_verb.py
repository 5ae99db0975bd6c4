"""`mixtera-hpc trace` lists what a run was served, or refuses if it cannot know."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.launch.prepare import prepare_run

pytestmark = pytest.mark.slow
"""Runs whole verbs over recorded runs."""

SMALL = ["dataplane.seq_len=16", "dataplane.global_batch_size=4", "dataplane.chunk_steps=2"]


def served(overrides: list[str], root: Path) -> RunFolder:
    config = compose([*overrides, *SMALL, f"run.root={root}"])
    folder = prepare_run(config, overrides, datetime.now(UTC))
    with DataPlane.open(config, comm=Local(), folder=folder) as plane:
        next(iter(plane))
    return folder


def test_a_run_is_not_traced_with_another_index(
    own_collection: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = served(own_collection, tmp_path / "runs")
    assert main(["trace", str(folder.path), "--step", "0", "--json"]) == 0
    listed = capsys.readouterr().out
    config = compose(own_collection)
    (Path(config.data.root) / "b.jsonl.gz").unlink()
    Path(config.index.path).unlink()
    build_index(config)
    assert main(["trace", str(folder.path), "--step", "0", "--json"]) == 2
    captured = capsys.readouterr()
    assert listed
    assert not captured.out
    assert "has no generation" in captured.err and "restore the old index file" in captured.err


def test_an_index_that_was_built_again_traces_a_run(
    own_collection: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = served(own_collection, tmp_path / "runs")
    assert main(["trace", str(folder.path), "--step", "0", "--json"]) == 0
    listed = capsys.readouterr().out
    config = compose(own_collection)
    Path(config.index.path).unlink()
    build_index(config)
    assert main(["trace", str(folder.path), "--step", "0", "--json"]) == 0
    assert capsys.readouterr().out == listed


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (
            ["--step", "0", "--rank", "99"],
            "--rank is 99, but these steps were served to 1 ranks.\n  Give one of 0 to 0.",
        ),
        (["--steps", "0..0", "--rank", "-1"], "--rank is -1"),
        (["--steps", "0..1"], "Step 1 has not been served: the run has 1 steps so far"),
        (["--shard", "b.jsonl.gz", "--row", "0", "--rank", "1"], "--rank is 1, but"),
        (["--step", "0", "--shard", "b.jsonl"], "The index has no shard 'b.jsonl'. Did you mean 'a.jsonl' or"),
    ],
)
def test_ranks_steps_and_shards_that_do_not_exist_are_refused(
    words: list[str], answer: str, own_collection: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = served(own_collection, tmp_path / "runs")
    assert main(["trace", str(folder.path), *words]) == 2
    captured = capsys.readouterr()
    assert not captured.out and answer in captured.err


@pytest.mark.parametrize("words", [["--rank", "0"], ["--domain", "0"]])
def test_a_filter_without_steps_covers_the_whole_run(
    words: list[str], own_collection: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = served(own_collection, tmp_path / "runs")
    assert main(["trace", str(folder.path), *words, "--steps", "0..0"]) == 0
    listed = capsys.readouterr().out
    assert main(["trace", str(folder.path), *words]) == 0
    assert capsys.readouterr().out == listed != ""


def test_a_rank_gets_the_batch_of_its_model_parallel_group(
    own_collection: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = served(own_collection, tmp_path / "runs")
    opened, *rest = folder.journal.read_text().splitlines(keepends=True)
    as_if = opened.replace('"num_ranks":1,"model_parallel_size":1', '"num_ranks":4,"model_parallel_size":2')
    assert as_if != opened
    folder.journal.write_text("".join([as_if, *rest]))
    outputs = []
    for rank in "0123":
        assert main(["trace", str(folder.path), "--step", "0", "--rank", rank]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2] == outputs[3] != ""
