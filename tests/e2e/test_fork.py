"""Fork a checkpoint onto two mixtures: both runs train to the end, verify, and are compared on one page."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.config.compose import load_config
from mixtera_hpc.config.run_folder import RunFolder, find_runs
from mixtera_hpc.track.event_reader import read_events

MIXTURES = {"first": (0.8, 0.2), "second": (0.2, 0.8)}


@pytest.mark.slow
def test_a_checkpoint_continues_on_two_mixtures(
    collection: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = [word for word in collection if not word.startswith("mixture.")]
    domains = "[{key: {source: 'a*'}, weight: 0.5}, {key: {source: ['d*', enum]}, weight: 0.5}]"
    shape = ["dataplane.seq_len=16", "dataplane.global_batch_size=8", "dataplane.chunk_steps=2", "dataplane.audit=true"]
    model = ["training.num_layers=1", "training.num_heads=2", "training.embedding_dim=8", "training.warmup_steps=1"]
    steps = ["training.num_steps=12", "checkpoint.every_steps=4", "checkpoint.keep=9"]
    words = [*plain, *shape, *model, *steps, "mixture.kind=static", f"mixture.domains={domains}", "run.name=parent"]
    root = tmp_path / "runs"
    assert main(["run", *words, f"run.root={root}", "run.id=p"]) == 0

    for name, weights in MIXTURES.items():
        keys = ({"source": "a*"}, {"source": ["d*", "enum"]})
        content = [{"key": key, "weight": weight} for key, weight in zip(keys, weights, strict=True)]
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"kind": "static", "domains": content}))
    sets = [word for name in MIXTURES for word in ("--set", str(tmp_path / f"{name}.yaml"))]
    parent = root / "parent" / "p"
    before = {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}
    (tmp_path / "wrong.yaml").write_text("kind: static\n")
    assert main(["fork", str(parent), "--step", "8", *sets, "--set", str(tmp_path / "wrong.yaml")]) == 2
    assert "wrong.yaml: mixture.kind=static needs" in capsys.readouterr().err
    assert [run.run_id for run in find_runs(root)] == ["p"], "no run is made if one of the files is wrong"

    assert main(["fork", str(parent), "--step", "8", *sets[:2], "--steps", "8"]) == 0
    [untrained] = [run for run in find_runs(root) if run.run_id != "p"]
    capsys.readouterr()
    assert main(["trace", str(untrained.path), "--verify"]) == 0
    assert "of 8 steps" in capsys.readouterr().out, "the parent's later steps do not belong to the new run"
    assert [line["step"] for line in read_events(untrained.metric("steps"))] == list(range(8))
    assert main(["runs", "--root", str(root), "--json"]) == 0
    states = {run["run_id"]: run for run in map(json.loads, capsys.readouterr().out.splitlines())}
    new = states[str(untrained.run_id)]
    assert (new["state"], new["steps_done"], new["num_steps"]) == ("SAVED", 8, 16)
    shorter = ["--change-seq-len", "8", "--here"]
    assert main(["resume", str(untrained.path), *shorter]) == 0
    assert main(["trace", str(untrained.path), "--verify"]) == 0
    shutil.rmtree(untrained.path)

    assert main(["fork", str(parent), "--step", "8", *sets, "--steps", "8", "--run"]) == 0

    folders = [run for run in find_runs(root) if run.run_id != "p"]
    assert sorted(run.run_id for run in folders) == ["p-s8-first", "p-s8-second"]
    for run in folders:
        assert main(["trace", str(run.path), "--verify"]) == 0
        lines = read_events(run.metric("steps"))
        assert [line["step"] for line in lines] == list(range(16)), "the parent's steps, then 8 of its own"
        rates = [line["learning_rate"] for line in lines[8:]]
        assert np.diff(rates) == pytest.approx(np.full(7, -rates[0] / 8)), "linear, to 0 at the end"
        mixture = read_events(run.metric("mixture"))
        assert mixture[-1]["weights"] == pytest.approx(MIXTURES[run.run_id.removeprefix("p-s8-")])
        assert mixture[3]["weights"] == pytest.approx([0.5, 0.5])
        assert any(json.loads(line)["kind"] == "fork" for line in run.journal.read_text().splitlines())
    assert {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()} == before, (
        "the parent is untouched"
    )

    capsys.readouterr()
    names = [str(run.path) for run in folders]
    assert main(["report", *names, "--compare", "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "comparison.html").read_text()
    assert page.count("forked from") == 2
    assert "p-s8-first" in page


@pytest.mark.slow
def test_a_checkpoint_before_an_edit_continues_with_the_sizes_of_its_time(
    collection: list[str], tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    words = ["training.num_steps=2", "checkpoint.every_steps=2", "checkpoint.keep=9", "training.warmup_steps=1"]
    model = ["training.num_layers=1", "training.num_heads=2", "training.embedding_dim=8", "run.name=parent"]
    shape = ["dataplane.seq_len=16", "dataplane.global_batch_size=8", "dataplane.chunk_steps=2", "dataplane.audit=true"]
    assert main(["run", *collection, *words, *model, *shape, f"run.root={root}", "run.id=p"]) == 0
    parent = root / "parent" / "p"
    batch = ["--change-batch-size", "dataplane.global_batch_size=4"]
    assert main(["resume", str(parent), *batch, "training.num_steps=4", "--here"]) == 0
    assert main(["resume", str(parent), "--change-seq-len", "8", "training.num_steps=6", "--here"]) == 0

    mixture = tmp_path / "same.yaml"
    mixture.write_text(json.dumps({"kind": "natural", "group_by": ["source"]}))
    for step, sizes in ((2, (16, 8)), (4, (16, 4)), (6, (8, 4))):
        assert main(["fork", str(parent), "--step", str(step), "--set", str(mixture), "--steps", "4", "--run"]) == 0
        folder = parent.with_name(f"p-s{step}-same")
        plane = load_config(RunFolder(folder).config).dataplane
        assert (plane.seq_len, plane.global_batch_size) == sizes
        assert main(["trace", str(folder), "--verify"]) == 0
        assert main(["resume", str(folder), f"training.num_steps={step + 6}", "--here"]) == 0


@pytest.mark.slow
def test_a_fork_need_not_share_the_stages_of_a_ramp_that_are_past(collection: list[str], tmp_path: Path) -> None:
    words = ["training.num_steps=2", "checkpoint.every_steps=2", "checkpoint.keep=9", "training.warmup_steps=1"]
    model = ["training.num_layers=1", "training.num_heads=2", "training.embedding_dim=8", "run.name=parent"]
    ramp = ["dataplane.global_batch_size=8", "dataplane.batch_schedule=[{start: 2, size: 12}]", "dataplane.seq_len=16"]
    assert main(["run", *collection, *words, *model, *ramp, f"run.root={tmp_path}", "run.id=p"]) == 0
    parent = tmp_path / "parent" / "p"
    # A job of three ranks can share the batches of 12, but not those of 8 before.
    job = ["job.nodes=3", "job.ranks_per_node=1", "training.num_steps=4"]
    assert main(["resume", str(parent), *job, "--here"]) == 0
    mixture = tmp_path / "same.yaml"
    mixture.write_text(json.dumps({"kind": "natural", "group_by": ["source"]}))
    assert main(["fork", str(parent), "--step", "4", "--set", str(mixture), "--steps", "2"]) == 0


def test_a_step_without_a_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / "x" / "y"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("run: {}\n")
    (tmp_path / "a.yaml").write_text("kind: natural\n")
    assert main(["fork", str(folder), "--step", "3", "--set", str(tmp_path / "a.yaml")]) == 2
    assert "has no checkpoint of step 3. It has: none" in capsys.readouterr().err
