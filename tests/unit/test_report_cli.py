"""`mixtera-hpc report`: output, files and exit codes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.config.run_folder import RunFolder

RunMaker = Callable[..., RunFolder]


@pytest.mark.slow
def test_a_report_is_written_into_the_run_folder_and_its_path_is_printed(
    make_run: RunMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(["source=C4", "source=Book"], [(0, 10), (8, 20)], num_steps=30)
    assert main(["report", str(run.path)]) == 0
    printed = capsys.readouterr().out
    assert str(run.report / "report.html") in printed
    assert (run.report / "report.html").is_file()
    assert "20 of 30 steps · 2 attempts · 2 ranks on 1 node" in printed
    assert f"mixtera-hpc resume {run.run_id}" in printed
    assert any(line.split()[:2] == ["C4", "50.0"] for line in printed.splitlines())


def test_a_run_is_found_by_name_below_the_root(make_run: RunMaker, tmp_path: Path) -> None:
    make_run(["en"], [(0, 4)], name="pilot", root=tmp_path / "runs")
    assert main(["report", "pilot", "--root", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.slow
def test_several_reports_are_written_to_separate_folders(make_run: RunMaker, tmp_path: Path) -> None:
    runs = [make_run(["en"], [(0, 2)], run_id=name) for name in ("one", "two")]
    assert main(["report", *(str(run.path) for run in runs), "--out", str(tmp_path / "out")]) == 0
    assert sorted(p.parent.name for p in (tmp_path / "out").glob("*/report.html")) == ["one", "two"]


def test_json_prints_one_object_per_run_and_writes_no_file(
    make_run: RunMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(["en", "de"], [(0, 4)], run_id=name) for name in ("one", "two")]
    assert main(["report", "--json", *(str(run.path) for run in runs)]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["run_id"], second["run_id"]) == ("one", "two")
    assert (first["tokens"], first["performance"]["num_ranks"], len(first["domains"])) == (800, 2, 2)
    assert not runs[0].report.exists()


def test_scaling_prints_one_row_per_run(make_run: RunMaker, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(["en"], [(0, 8)], run_id=f"r{n}", num_ranks=n, tokens_per_s=90.0 * n) for n in (1, 2)]
    paths = [str(run.path) for run in runs]
    assert main(["report", "--scaling", *paths]) == 0
    table = capsys.readouterr().out
    assert "trial/r2" in table
    assert "2.00 ×" in table
    assert main(["report", "--scaling", "--json", *paths]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["ranks"], row["speedup"]) for row in rows] == [(1, 1.0), (2, 2.0)]


def test_an_unknown_run_exits_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "nothing", "--root", str(tmp_path)]) == 2
    assert "No run 'nothing'" in capsys.readouterr().err


def test_a_run_without_metrics_exits_with_a_message(make_run: RunMaker, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(["en"], [])
    assert main(["report", str(run.path)]) == 2
    assert "has not recorded any step yet" in capsys.readouterr().err
