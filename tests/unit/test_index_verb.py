"""`mixtera-hpc index build|inspect|verify` on the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mixtera_hpc.cli.main import main
from mixtera_hpc.tokens.bpe_training import train_bpe

pytestmark = pytest.mark.slow
"""Runs whole verbs."""

PROPERTIES = "+data.properties={source:source,score:{path:score,kind:number}}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [json.dumps({"text": "some words", "source": "ab"[i % 2], "score": i}) for i in range(50)]
    (folder / "x.jsonl").write_text("\n".join(rows))
    return folder


def test_build_then_inspect_then_verify(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = train_bpe(["some words"] * 9, 262, tmp_path / "tokenizer.json")
    path = f"index.path={tmp_path / 'i.h5'}"
    argv = [f"data.root={root}", path, PROPERTIES]
    assert main(["index", "build", *argv, f"dataplane.tokenizer={tokenizer}"]) == 0
    out, err = capsys.readouterr()
    assert "50 samples of 1 shard in 1 block" in out and "tokens" in out and err == ""
    assert main(["index", "inspect", path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    size = (tmp_path / "i.h5").stat().st_size
    assert (facts["shards"], facts["samples"], facts["blocks"]) == (1, 50, 1)
    assert facts["tokens"] > 50 and facts["bytes"] == size and facts["bytes_per_sample"] == size / 50
    assert facts["properties"] == {
        "score": {"kind": "number", "values": []},
        "source": {"kind": "category", "values": ["a", "b"]},
    }
    assert main(["index", "inspect", path]) == 0
    out = capsys.readouterr().out
    assert "a (25), b (25)" in out and "0 to 49" in out
    assert main(["index", "verify", path]) == 0
    assert "1 shard below" in capsys.readouterr().out


def test_verify_exits_with_2_when_a_shard_changed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "build", f"data.root={root}"]) == 0
    os.utime(root / "x.jsonl", ns=(0, 0))
    capsys.readouterr()
    assert main(["index", "verify", f"data.root={root}"]) == 2
    assert "x.jsonl (changed since, same size)" in capsys.readouterr().err
    assert main(["index", "verify", f"data.root={root}", "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"fresh": False, "changed": [{"path": "x.jsonl", "problem": "changed since, same size"}]}


def test_build_reports_as_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "build", "--json", f"data.root={root}"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["samples"] == 50 and report["tokens"] is None and report["path"] == str(root / "index.h5")


def test_a_property_that_no_sample_has_is_reported(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "build", f"data.root={root}", "+data.properties={language:lang}"]) == 0
    assert "no sample has a value of language: is data.properties.language the right path?" in capsys.readouterr().out


def test_bad_rows_are_named_and_exit_with_2(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "bad.jsonl").write_text('{"text": "ok"}\nnot json\n')
    assert main(["index", "build", f"data.root={root}"]) == 2
    err = capsys.readouterr().err
    assert "DataError: " in err and "bad.jsonl' row=1: " in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["build"], "data.root is missing"),
        (["build", "data.root=/none"], "data.root is '/none', which is not a folder"),
        (["build", "data=slim_pyjama"], "data=slim_pyjama does not exist. Did you mean 'slim_pajama'?"),
        (["inspect", "index.path=/none.h5"], "There is no property index at /none.h5"),
    ],
)
def test_mistakes_are_named_and_exit_with_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "path", "row", "properties"),
    [
        (
            "slim_pajama",
            "slimpajama/train/chunk1/example_train_0.jsonl.zst",
            {"text": "x", "meta": {"redpajama_set_name": "RedPajamaC4"}},
            {"source": ["RedPajamaC4"]},
        ),
        (
            "the_pile",
            "pile/train/00.jsonl.zst",
            {"text": "x", "meta": {"pile_set_name": "ArXiv"}},
            {"source": ["ArXiv"]},
        ),
        (
            "fineweb",
            "fineweb/data/CC-MAIN-2020-05/000.parquet",
            {"text": "x", "dump": "CC-MAIN-2020-05", "language": "en", "language_score": 0.9},
            {"dump": ["CC-MAIN-2020-05"], "language": ["en"], "language_score": [], "score": []},
        ),
    ],
)
def test_presets_find_their_files_and_properties(
    preset: str,
    path: str,
    row: dict[str, Any],
    properties: dict[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shard = tmp_path / path
    shard.parent.mkdir(parents=True)
    if path.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist([row]), shard)
    else:
        shard.write_bytes(zstandard.compress(json.dumps(row).encode()))
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    assert main(["index", "build", f"data={preset}"]) == 0
    capsys.readouterr()
    assert main(["index", "inspect", "--json", f"data={preset}"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {name: p["values"] for name, p in facts["properties"].items()} == properties


@pytest.mark.parametrize("verb", [["index", "build"], ["index", "inspect"], ["query"]])
def test_a_closed_pipe_is_not_an_error(verb: list[str], root: Path) -> None:
    words = [f"data.root={root}", "mixture.unit=samples"]
    assert main(["index", "build", *words]) == 0
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "mixtera_hpc", *verb, *words]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=600)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")
