"""`mixtera-hpc query RUN` and `plan RUN` count what a run still serves; `--split` counts one side of the holdout."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.resume.run_edits import RunEdit, record_run_edit
from mixtera_hpc.launch.prepare import prepare_run

pytestmark = pytest.mark.slow
"""Runs whole verbs over recorded runs."""

SMALL = ["dataplane.global_batch_size=4", "dataplane.seq_len=16", "mixture.group_by=[source]"]


@pytest.fixture
def folder(collection: list[str], tmp_path: Path) -> RunFolder:
    """A run that has dropped one source."""
    words = [*collection, *SMALL, f"run.root={tmp_path}"]
    folder = prepare_run(compose(words), words, datetime.now(UTC))
    record_run_edit(folder.decisions, RunEdit(at_step=0, changes={"drop": ([], ["source == 'ast'"])}))
    return folder


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(list(words)) == 0
    return json.loads(capsys.readouterr().out)


def samples(counts: Any) -> dict[str, int]:
    return {domain["key"]["source"]: domain["samples"] for domain in counts["domains"]}


def test_dropped_samples_are_not_counted(
    folder: RunFolder, collection: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    everything = samples(answer(capsys, "query", *collection, *SMALL, "--json"))
    remaining = samples(answer(capsys, "query", str(folder.path), "--json"))
    assert everything["ast"] > 0
    assert remaining == everything | {"ast": 0}


def test_the_share_of_a_dropped_domain_goes_to_the_others(
    folder: RunFolder, collection: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = answer(capsys, "query", *collection, *SMALL, "--json")["domains"]
    after = answer(capsys, "query", str(folder.path), "--json")["domains"]
    dropped = next(domain["weight"] for domain in before if domain["key"]["source"] == "ast")
    expected = [0.0 if d["key"]["source"] == "ast" else d["weight"] / (1 - dropped) for d in before]
    assert [domain["weight"] for domain in after] == pytest.approx(expected)


def test_a_run_is_found_by_its_name(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(folder.path.parent.parent)
    by_name = answer(capsys, "query", folder.name, "--root", root, "--json")
    assert by_name == answer(capsys, "query", str(folder.path), "--json")


def test_the_forecast_of_a_run_serves_no_dropped_sample(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder.path), "--json"]) == 0
    served = {json.loads(line)["domain_id"] for line in capsys.readouterr().out.splitlines()}
    assert main(["plan", str(folder.path)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "=ast" in line)
    assert len(served) > 1
    assert " 0 " in line


@pytest.mark.parametrize("verb", ["query", "plan"])
def test_overrides_beside_a_run_are_refused(verb: str, folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, str(folder.path), "dataplane.seed=1"]) == 2
    assert "Give a run or overrides" in capsys.readouterr().err


def test_both_sides_of_the_holdout_add_up(collection: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [*collection, *SMALL, "query.holdout.fraction=0.3", "--json"]
    everything = answer(capsys, "query", *collection, *SMALL, "--json")["selected"]["samples"]
    sides = [
        answer(capsys, "query", *words, "--split", split)["selected"]["samples"] for split in ("train", "validation")
    ]
    assert min(sides) > 0
    assert sum(sides) == everything


def test_the_held_out_side_can_be_planned(collection: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [*collection, *SMALL, "query.holdout.fraction=0.3", "--json"]
    served = {}
    for split in ("train", "validation"):
        assert main(["plan", *words, "--split", split]) == 0
        records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        served[split] = {(shard, row) for record in records for shard, row, _, _ in record["segments"]}
    assert served["train"] and served["validation"]
    assert not served["train"] & served["validation"]
