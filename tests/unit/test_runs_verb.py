"""The list of runs and its filters."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.config.run_folder import find_runs
from mixtera_hpc.config.schema import Config
from mixtera_hpc.launch.attempts import ExitRecord, JobRecord, create_attempt, end_attempt, record_start
from mixtera_hpc.launch.prepare import prepare_run


@pytest.fixture
def root(make_config: Callable[..., Config]) -> str:
    """Make two runs: `first` completed on 1 node, `second` saved on 2 nodes. Return their root."""
    for name, nodes, code in (("first", 1, 0), ("second", 2, 75)):
        words = [f"run.name={name}", f"job.nodes={nodes}", "cluster=dev"]
        config = make_config(*words)
        folder = prepare_run(config, words, datetime.now(UTC))
        record_start(folder, create_attempt(folder), JobRecord.slurm(config, "4711"))
        folder.metrics.mkdir(exist_ok=True)
        folder.metric("steps").write_text('{"step": 9, "loss": 2.5}\n')
        folder.metric("attempts").write_text('{"step": 0, "num_steps": 40}\n')
        end_attempt(folder, 1, ExitRecord(exit_code=code, elapsed_s=1))
    return str(folder.path.parents[1])


def names(root: str, capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["runs", *words, "--json", "--root", root]) == 0
    return [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()]


def test_runs_are_filtered_by_name_value_choice_and_state(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(names(root, capsys)) == ["first", "second"]
    assert names(root, capsys, "f*") == ["first"]
    assert names(root, capsys, "job.nodes=2") == ["second"]
    assert names(root, capsys, "cluster=dev", "job.nodes=1") == ["first"]
    assert names(root, capsys, "cluster=lumi") == []
    assert names(root, capsys, "--state", "SAVED") == ["second"]
    assert len(names(root, capsys, "--last", "1")) == 1


@pytest.mark.parametrize("text", ["007", "1e5", "308870072333", "12345e678901", "true", "x"])
def test_texts_that_look_like_numbers_are_found(
    text: str, make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"run.name={text}", f"job.command=[train.py,{text}]"]
    root = prepare_run(make_config(*words), words, datetime.now(UTC)).path.parents[1]

    for word in words:
        assert names(str(root), capsys, word) == [text]
    assert names(str(root), capsys, "run.name=1e50", "job.command=null") == []


def test_a_line_has_the_steps_of_the_log_and_the_overrides(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "first", "--root", root]) == 0

    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "state", "attempts", "steps", "loss", "overrides"]
    assert "10 of 40  2.5000  run.name=first job.nodes=1 cluster=dev" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [(["job.node=2"], "Did you mean 'job.nodes'"), (["--last", "0"], "at least 1"), (["--state", "DONE"], "DONE")],
)
def test_wrong_filters_are_refused(
    root: str, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    try:
        code = main(["runs", *words, "--root", root])
    except SystemExit as error:
        code = int(error.code or 0)

    assert code == 2
    assert message in capsys.readouterr().err


def test_control_characters_of_names_are_shown(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder,) = [run for run in find_runs(Path(root)) if run.name == "first"]
    folder.overrides.write_text("job.comment=\x1b[2J\n")

    assert main(["runs", "first", "--root", root]) == 0
    assert "\x1b" not in capsys.readouterr().out
