"""Changes of a run while it trains and between attempts; the trace of the run verifies afterwards."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.recording.journal import read_lines

from .conftest import COMMAND, MPIEXEC, Cli, only_run

STATIC = "kind: static\ndomains:\n  - {key: {source: ast}, weight: 0.75}\n  - {key: {source: enum}, weight: 0.25}\n"


def test_the_mixture_of_a_running_job_can_be_changed(cli: Cli, small: list[str], tmp_path: Path) -> None:
    (tmp_path / "static.yaml").write_text(STATIC)
    words = ["run", *small, f"run.root={tmp_path / 'runs'}", "training.num_steps=20000"]
    with (tmp_path / "out").open("w+") as out:
        process = subprocess.Popen([MPIEXEC, "-n", "2", *COMMAND, *words], stdout=out, stderr=subprocess.STDOUT)
        try:
            wait_for(tmp_path, "runs/small/*/metrics/steps.jsonl", 4, process)
            folder = only_run(tmp_path / "runs")
            assert "not active" not in cli("mixture", "set", folder, tmp_path / "static.yaml").stdout
            wait_for(tmp_path, "runs/small/*/decisions.jsonl", 1, process)
            wait_for_chunk(RunFolder(folder), process)
            (folder / "control" / "stop").touch()
            assert process.wait(timeout=600) == 75, (tmp_path / "out").read_text()
        finally:
            process.kill()
    lines = [json.loads(line) for line in cli("mixture", "show", folder, "--json").stdout.splitlines()]
    [decision] = [line for line in lines if line["kind"] == "mixture"]
    newest = [line for line in lines if line["kind"] == "chunk"][-1]
    assert newest["chunk"] == decision["chunk"]
    assert sorted(newest["weights"])[-2:] == pytest.approx([0.25, 0.75])
    cli("trace", folder, "--verify")
    done = cli("mixture", "set", folder, tmp_path / "static.yaml", "--at-chunk", 1, rc=2)
    assert "planned already" in done.stderr
    asked = cli("mixture", "set", folder, tmp_path / "static.yaml").stdout
    assert "reads the request with: mixtera-hpc resume small/" in asked
    assert "needs a file" in cli("mixture", "set", folder, "--at-chunk", 99, rc=2).stderr


def wait_for_chunk(folder: RunFolder, process: subprocess.Popen[str]) -> None:
    """Wait until a step of the chunk from which a decided mixture is used has ended: the journal is ahead of them."""
    [decision] = read_lines(folder.decisions)
    deadline = time.monotonic() + 900
    while not any(step >= first for first in first_steps(folder, decision["chunk"]) for step in ended_steps(folder)):
        assert process.poll() is None and time.monotonic() < deadline, "no step of the chunk has ended"
        time.sleep(0.2)


def first_steps(folder: RunFolder, chunk: int) -> list[int]:
    plans = (line for line in read_lines(folder.journal) if line["kind"] == "chunk")
    return [plan["first_step"] for plan in plans if plan["chunk"] == chunk]


def ended_steps(folder: RunFolder) -> list[int]:
    return [line["step"] for line in read_lines(folder.metrics / "steps.jsonl")]


def wait_for(root: Path, glob: str, lines: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline and process.poll() is None:
        if any(len(path.read_text().splitlines()) >= lines for path in root.glob(glob)):
            return
        time.sleep(0.2)
    raise AssertionError(f"{glob} did not have {lines} lines in time:\n{(root / 'out').read_text()}")


@pytest.fixture(scope="module")
def trained(cli: Cli, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    cli("run", *small, f"run.root={root}", "training.num_steps=14", "checkpoint.every_steps=5")
    return only_run(root)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataplane.seed=3"], "add --change-seed"),
        (["dataplane.global_batch_size=6"], "add --change-batch-size"),
        (["--change-seed"], "dataplane.seed is still 0"),
        (["--skip-steps", "9..4"], "--skip-steps is '9..4'"),
        (["--skip-steps", "2..3"], "the oldest checkpoint is of step"),
        (["--drop", "sourc == 'ast'"], "--drop names 'sourc'"),
        (["--drop", "size > 1e12"], "matches none of the samples"),
        (["--drop", "source == 'ast' or source != 'ast'"], "All domains of the mixture have been dropped"),
    ],
)
def test_a_run_edit_that_is_unconfirmed_or_impossible_is_refused(
    trained: Path, cli: Cli, words: list[str], message: str
) -> None:
    done = cli("resume", trained, *words, rc=2)
    assert message in done.stderr
    assert not (trained / "decisions.jsonl").exists()


def test_a_batch_size_that_the_ranks_cannot_share_is_refused_and_not_recorded(trained: Path, cli: Cli) -> None:
    words = ["training.num_steps=20", "--change-batch-size", "dataplane.global_batch_size=7"]
    assert "cannot be shared evenly by 2 ranks" in cli("resume", trained, *words, ranks=2, rc=2).stderr
    assert not (trained / "decisions.jsonl").exists()
    assert "global_batch_size: 12" in (trained / "config.yaml").read_text()


def test_a_run_with_edits_verifies_and_its_samples_can_be_located(trained: Path, cli: Cli, tmp_path: Path) -> None:
    # A copy: other tests see that a refused edit leaves no trace.
    trained = shutil.copytree(trained, tmp_path / "small" / trained.name)
    cli("resume", trained, "training.num_steps=24", "--skip-steps", "12..19")
    changed = ["--change-seed", "dataplane.seed=5", "--change-batch-size", "dataplane.global_batch_size=8"]
    cli("resume", trained, "training.num_steps=34", "--drop", "source == 'argparse'", *changed, ranks=2)
    verdict = json.loads(cli("trace", trained, "--verify", "--json").stdout)
    assert (verdict["num_steps"], verdict["num_sequences"]) == (34, 24 * 12 + 10 * 8)
    rows = [json.loads(line) for line in cli("trace", trained, "--step", "30", "--json").stdout.splitlines()]
    shard, row, _, _ = rows[0]["segments"][0]
    places = [
        json.loads(x) for x in cli("trace", trained, "--shard", shard, "--row", row, "--json").stdout.splitlines()
    ]
    assert (30, 0) in [(f["step"], f["position"]) for f in places]
    kinds = [json.loads(line)["kind"] for line in (trained / "decisions.jsonl").read_text().splitlines()]
    assert kinds == ["run_edit", "run_edit"]


def test_validation_reports_the_held_out_loss_of_every_domain(cli: Cli, small: list[str], tmp_path: Path) -> None:
    words = [f"run.root={tmp_path}", "training.num_steps=6", "training.validate_every=4", "query.holdout.fraction=0.2"]
    cli("run", *small, *words, ranks=2)
    events = [json.loads(x) for x in (only_run(tmp_path) / "metrics" / "validation.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [4, 6]
    assert events[0]["domain_tokens"] == events[1]["domain_tokens"]
    assert sum(loss is not None for loss in events[0]["domain_loss"]) >= 3


def test_a_run_continues_after_its_index_was_refreshed(cli: Cli, own_collection: list[str], tmp_path: Path) -> None:
    words = [*own_collection, "dataplane.seq_len=32", "dataplane.global_batch_size=8", "dataplane.audit=true"]
    words += ["training.num_layers=1", "training.embedding_dim=16", "training.num_heads=2", "run.name=small"]
    cli("run", *words, f"run.root={tmp_path}", "training.num_steps=10", "training.stop_after=5", rc=75)
    folder = only_run(tmp_path)
    before = cli("trace", folder, "--step", 2, "--json").stdout

    data = next(Path(word.partition("=")[2]) for word in own_collection if word.startswith("data.root="))
    rows = [{"text": f"more {i} " * 30, "meta": {"source": "ast", "tags": [], "size": 7}} for i in range(60)]
    (data / "0-new.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cli("index", "refresh", *words)

    assert cli("trace", folder, "--step", 2, "--json").stdout == before
    cli("resume", folder, "training.stop_after=null")
    assert json.loads(cli("trace", folder, "--verify", "--json").stdout)["num_steps"] == 10


def test_a_ramp_and_a_longer_context_in_one_run_verify_on_other_ranks(
    cli: Cli, small: list[str], tmp_path: Path
) -> None:
    ramp = "dataplane.batch_schedule=[{start: 3, size: 16}, {start: 9, size: 20}]"
    words = [*small, f"run.root={tmp_path}", "dataplane.global_batch_size=8", "dataplane.seq_len=32", ramp]
    assert "8 (16 from step 3, 20 from step 9) sequences" in cli("plan", *words, "plan.steps=12").stdout
    cli("run", *words, "training.num_steps=14", "training.stop_after=6", "training.micro_batch_size=2", ranks=2, rc=75)
    folder = only_run(tmp_path)
    refused = cli("resume", folder, "dataplane.seq_len=64", rc=2).stderr
    assert "add --change-seq-len for dataplane.seq_len" in refused
    cli("resume", folder, "--change-seq-len", 64, "training.stop_after=null")
    verdict = json.loads(cli("trace", folder, "--verify", "--json").stdout)
    assert (verdict["num_steps"], verdict["num_sequences"]) == (14, 3 * 8 + 6 * 16 + 5 * 20)
    longer = [json.loads(line) for line in cli("trace", folder, "--step", 12, "--json").stdout.splitlines()]
    assert [record["position"] for record in longer] == list(range(20))
    assert {sum(stop - start for _, _, start, stop in record["segments"]) for record in longer} == {65}
    [edit] = [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]
    assert edit["changes"] == {"seq_len": [32, 64]}
    cli("report", folder)


def test_a_run_continues_on_ranks_that_its_past_batches_do_not_fit(cli: Cli, small: list[str], tmp_path: Path) -> None:
    # Three ranks can share batches of 12, but not those of 8 before.
    ramp = ["dataplane.global_batch_size=8", "dataplane.batch_schedule=[{start: 4, size: 12}]"]
    words = [f"run.root={tmp_path}", "training.num_steps=6", *ramp]
    assert "global_batch_size=8 cannot be shared evenly by 3 ranks" in cli("run", *small, *words, ranks=3, rc=2).stderr
    assert not (tmp_path / "small").exists()
    assert "domains, 16 lanes\n" in cli("run", *small, *words).stderr
    folder = only_run(tmp_path)
    cli("resume", folder, "training.num_steps=9", ranks=3)
    verdict = json.loads(cli("trace", folder, "--verify", "--json").stdout)
    assert (verdict["num_steps"], verdict["num_sequences"]) == (9, 4 * 8 + 5 * 12)
