"""`mixtera-hpc mixture` beside a run: which requests it accepts, and which it refuses at once."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.launch.prepare import prepare_run


def run_of(collection: list[str], root: Path, *, killed: bool) -> RunFolder:
    """A run of eight steps in chunks of two that has ended."""
    words = [*collection, "dataplane.global_batch_size=4", "dataplane.seq_len=16", "dataplane.chunk_steps=2"]
    config = compose([*words, f"run.root={root}"])
    folder = prepare_run(config, words, datetime.now(UTC))
    plane = DataPlane.open(config, comm=Local(), folder=folder)
    while plane.next_step < 8:
        next(iter(plane))
    plane.close(orderly=not killed)
    return folder


@pytest.mark.parametrize(("killed", "code"), [(False, 2), (True, 0)])
def test_a_planned_chunk_is_refused_unless_the_attempt_was_killed(
    collection: list[str], tmp_path: Path, killed: bool, code: int
) -> None:
    """After a killed attempt the next one continues from a checkpoint and plans its chunks again."""
    folder = run_of(collection, tmp_path / "runs", killed=killed)
    (tmp_path / "request.yaml").write_text("temperature: 2.0\n")
    assert main(["mixture", "set", str(folder.path), str(tmp_path / "request.yaml"), "--at-chunk", "2"]) == code
    assert (folder.control / "mixture.json").exists() == killed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "--at-chunk", "2"], "belong to mixture set RUN FILE"),
        (["set"], "mixture set needs a file"),
        (["set", "request.yaml", "--json"], "--json belongs to mixture show"),
        (["set", "request.yaml", "--at-chunk", "soon"], "--at-chunk is 'soon'"),
        (["set", "missing.yaml"], "There is no file missing.yaml"),
    ],
)
def test_arguments_of_the_other_action_are_refused(
    collection: list[str], tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_of(collection, tmp_path / "runs", killed=False)
    action, *rest = words
    assert main(["mixture", action, str(folder.path), *rest]) == 2
    assert message in capsys.readouterr().err


def test_the_weights_of_a_run_and_its_decisions_are_shown(
    collection: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_of(collection, tmp_path / "runs", killed=False)
    assert main(["mixture", "show", str(folder.path), "--json"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert '"kind": "chunk"' in line and '"step": 0' in line
    assert main(["mixture", "show", str(folder.path)]) == 0
    assert "weights changed 0 times" in capsys.readouterr().out
