"""Exact duplicates within data sets and across them, on any number of ranks."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.read.configured import open_configured
from mixtera_hpc.index.read.duplicates import DuplicateReport, find_duplicates
from mixtera_hpc.testing.thread_ranks import run_ranks

WEB = ["a", "b", "a", "c", "", "a"]
CODE = ["c", "x", "x", "", "ü"]
EVAL = ["b", "b", "z", "ü"]


def write(folder: Path, rows: list[dict[str, Any]], suffix: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet", row_group_size=2)
    else:
        (folder / f"a.{suffix}").write_bytes(gzip.compress(lines) if suffix.endswith("gz") else lines)


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, Any]:
    write(tmp_path / "web", [{"text": text} for text in WEB], "jsonl")
    write(tmp_path / "code", [{"content": text} for text in CODE], "parquet")
    write(tmp_path / "eval", [{"q": text[:1], "rest": text[1:]} for text in EVAL], "jsonl.gz")
    return {
        "web": f"{tmp_path}/web",
        "code": {"root": f"{tmp_path}/code", "text": "content"},
        "eval": {"root": f"{tmp_path}/eval", "text": "{q}{rest}"},
    }


def check(report: DuplicateReport) -> None:
    assert report.datasets == ["code", "eval", "web"]
    assert report.samples == [5, 4, 6]
    assert report.within == [1, 1, 2]
    # Row: the data set that has the document too; column: the data set whose samples are counted.
    assert report.shared == [[0, 1, 2], [1, 0, 1], [2, 2, 0]]
    assert (report.duplicates, report.groups) == (15 - 7, 6)


@pytest.mark.parametrize("ranks", [1, 3])
def test_duplicates_are_counted_on_any_number_of_ranks(ranks: int, sets: dict[str, Any], tmp_path: Path) -> None:
    config = from_plain(Config, {"data": {"sets": sets}, "index": {"path": f"{tmp_path}/i.h5", "block_rows": 2}})
    build_index(config)
    before = sorted(path.name for path in tmp_path.iterdir())

    def find(comm: Any) -> DuplicateReport:
        with open_configured(config) as index:
            return find_duplicates(index, comm, tmp_path / "equal.jsonl")

    reports = run_ranks(ranks, find)
    for report in reports:
        check(report)
    groups = [json.loads(line) for line in (tmp_path / "equal.jsonl").read_text().splitlines()]
    assert len(groups) == 6 and len(reports[0].examples) == 5
    assert [[f"{tmp_path}/web/a.jsonl", 0], [f"{tmp_path}/web/a.jsonl", 2], [f"{tmp_path}/web/a.jsonl", 5]] in groups
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "equal.jsonl"]), "no files are left"


def test_joined_indexes_are_compared_by_the_verb(
    sets: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for name, data in sets.items():
        own = data if isinstance(data, dict) else {"root": data}
        paths.append(f"{tmp_path}/{name}.h5")
        build_index(from_plain(Config, {"data": own, "index": {"path": paths[-1]}}))
    words = [f"index.paths=[{','.join(paths)}]", f"index.path={paths[0]}"]
    assert main(["index", "duplicates", *words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["shared"] == [[0, 1, 2], [1, 0, 1], [2, 2, 0]] and report["duplicates"] == 8
    assert main(["index", "duplicates", *words]) == 0
    out = capsys.readouterr().out
    assert "8 samples of 15 repeat an earlier one: 6 documents occur more than once" in out
    assert "2 samples of eval have a document that is in web too" in out
    assert main(["index", "duplicates", *words, "--write", f"{tmp_path}/no/x"]) == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_query_selects_the_samples_that_are_compared(ranks: int, sets: dict[str, Any], tmp_path: Path) -> None:
    config = from_plain(Config, {"data": {"sets": sets}, "index": {"path": f"{tmp_path}/i.h5", "block_rows": 2}})
    build_index(config)

    def find(where: str) -> DuplicateReport:
        def on_rank(comm: Any) -> DuplicateReport:
            with open_configured(config) as index:
                return find_duplicates(index, comm, where=where)

        return run_ranks(ranks, on_rank)[0]

    report = find("dataset in ['web', 'eval']")
    assert (report.samples, report.within) == ([0, 4, 6], [0, 1, 2])
    assert report.shared == [[0, 0, 0], [0, 0, 1], [0, 2, 0]]
    assert find("dataset == 'web' and bytes > 13").duplicates == 2, "the empty text is left out"
    named = find(f"documents({{'{tmp_path}/web/a.jsonl': [0, 5]}})")
    assert (named.samples[2], named.duplicates) == (2, 1)


def test_the_verb_honours_the_query(sets: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"data.root={sets['web']}", f"index.path={tmp_path}/w.h5"]
    assert main(["index", "build", *words]) == 0
    capsys.readouterr()
    assert main(["index", "duplicates", *words, "query.where=bytes > 1000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == [0]
    assert main(["index", "duplicates", *words, "query.where=lang == 'en'", "--json"]) == 2


def test_samples_without_text_are_compared_as_rows(tmp_path: Path) -> None:
    write(tmp_path / "data", [{"n": 1, "m": 2}, {"m": 2, "n": 1}, {"n": 1}], "jsonl")
    config = compose([f"data.root={tmp_path}/data", "data.text=null", "mixture.unit=samples"])
    build_index(config)
    with open_configured(config) as index:
        assert find_duplicates(index, Local()).duplicates == 1
