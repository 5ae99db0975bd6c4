"""The run folder of a training loop of the user's: the command line knows it as it knows a run that we started."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose, load_config
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import BatchStageConfig, Config
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.recording.run_history import History
from mixtera_hpc.dataplane.resume.edit_checks import check_and_record_edit
from mixtera_hpc.dataplane.resume.run_edits import read_run_edits
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.testing.thread_ranks import run_ranks
from mixtera_hpc.trace.served_run import ServedRun
from mixtera_hpc.trace.verify import verify_run
from mixtera_hpc.track.event_reader import read_events

pytestmark = pytest.mark.slow
"""Serves some steps and writes reports."""

WORDS = [
    "dataplane.seq_len=16",
    "dataplane.global_batch_size=8",
    "dataplane.chunk_steps=2",
    "dataplane.audit=true",
    "training.log_every=1",
    "query.holdout.fraction=0.2",
    "training.validate_steps=2",
    "mixture.kind=dynamic",
    "mixture.algorithm={name:ado,warmup:2,refit_interval:1}",
]


@pytest.fixture(scope="module")
def config(collection: list[str]) -> Config:
    words = [word for word in collection if not word.startswith("mixture.group_by")]
    return compose([*words, "mixture.group_by=[source]", *WORDS])


def train(config: Config, folder: RunFolder, steps: int, state: Any = None, *, records: bool = True) -> Any:
    """Train in `folder` for some steps; return the state."""
    with DataPlane.open(config, Local(), folder=folder) as plane:
        if state is not None:
            plane.load_state_dict(state)
        for batch, _ in zip(plane, range(steps), strict=False):
            loss = 1.0 + (batch.tokens[:, 1:] % 7) / (1 + batch.step)
            if records:
                plane.record(batch, loss)
            if plane.stop_requested():
                break
        held_out = plane.held_out()
        for validated in held_out.batches():
            held_out.record(validated, 1.0 + validated.tokens[:, 1:] % 7)
        held_out.reduce(plane.next_step)
        return plane.state_dict()


def answer(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Any:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[0])


def test_the_verbs_know_the_run_of_an_own_loop(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "mine" / "run")
    state = train(config, folder, 6)
    train(config, folder, 4, state)

    recorded = load_config(folder.config)
    assert (recorded.mixture, recorded.dataplane, recorded.query) == (config.mixture, config.dataplane, config.query)
    assert folder.attempts() == [1, 2]
    status = answer(capsys, "status", folder.path, "--json")
    assert (status["state"], status["step"], status["attempt"], status["reason"]) == ("COMPLETED", 9, 2, None)
    summary = answer(capsys, "report", folder.path, "--json")
    assert (summary["steps"], summary["num_attempts"]) == (10, 2)
    assert summary["held_out_loss"] > 1
    assert summary["loss_last"] < summary["loss_first"]
    assert summary["hears_losses"] is True
    assert all(domain["loss_last"] is None or domain["loss_last"] > 1 for domain in summary["domains"])
    assert main(["trace", str(folder.path), "--verify"]) == 0
    assert "verified: 80 sequences of 10 steps" in capsys.readouterr().out
    assert main(["report", str(folder.path)]) == 0
    assert main(["resume", str(folder.path)]) == 2
    assert "belongs to a training program of yours" in capsys.readouterr().err


def resized(config: Config, **sizes: Any) -> Config:
    return replace(config, dataplane=replace(config.dataplane, **sizes))


def test_an_own_loop_continues_with_the_changes_of_resume(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "mine" / "edited")
    state = train(config, folder, 5)
    longer = resized(config, seq_len=40)
    with pytest.raises(ConfigError, match="resume --help lists what can be changed in a run that has a folder"):
        train(longer, folder, 1, state)

    assert main(["resume", str(folder.path), "--change-seq-len", "16"]) == 2
    assert "dataplane.seq_len is still 16.\n  Give it another number" in capsys.readouterr().err
    for option in ("--here", "--submit", "--wait"):
        assert main(["resume", str(folder.path), option, "--change-seq-len", "40"]) == 2
        assert "and without mpiexec, --here, --submit and --wait." in capsys.readouterr().err
    assert read_run_edits(folder.decisions) == []
    assert main(["resume", str(folder.path), "--change-seq-len", "40"]) == 0
    assert "Start your program again with dataplane.seq_len=40" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="seq_len was changed to 40, is 16"):
        train(config, folder, 1, state)
    state = train(longer, folder, 4, state)

    ramp = "dataplane.batch_schedule=[{start: 11, size: 24}]"
    words = ["--drop", "source == 'ast'", "--skip-steps", "7..8", "--change-batch-size", ramp]
    assert main(["resume", str(folder.path), *words]) == 0
    last = resized(longer, batch_schedule=[BatchStageConfig(start=11, size=24)])
    with pytest.raises(
        ConfigError, match="The saved state is of step 9, but an edit made the run continue from step 7"
    ):
        train(last, folder, 1, state)
    words = ["--skip-steps", "12..13"]  # Behind all states: any of them can be loaded.
    assert main(["resume", str(folder.path), *words]) == 0
    assert [edit.at_step for edit in read_run_edits(folder.decisions)] == [5, 7, 9]


def test_a_submitted_program_continues_from_its_own_checkpoints_after_an_edit(config: Config, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "mine" / "submitted")
    state = train(config, folder, 5)
    # `training.num_steps` is of no meaning to such a program.
    training = replace(config.training, num_steps=2)
    program = replace(config, job=replace(config.job, command=["mine"]), training=training)
    longer = resized(program, seq_len=40)
    assert check_and_record_edit(folder, program, longer) is not None
    train(longer, folder, 4, state)
    assert verify_run(ServedRun(folder, longer)).num_steps == 9


def test_a_mixture_that_hears_no_losses_shows_in_status_and_report(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "mine" / "silent")
    train(config, folder, 14, records=False)
    status = answer(capsys, "status", folder.path, "--json")
    assert status["reason"] == "the mixture is dynamic, but no losses are recorded"
    assert answer(capsys, "report", folder.path, "--json")["hears_losses"] is False
    assert main(["report", str(folder.path)]) == 0
    assert "no losses were recorded in the last chunks" in " ".join(capsys.readouterr().out.split())
    assert "no losses were recorded in the last chunks" in (folder.report / "report.html").read_text()


def test_the_end_of_an_own_loop_is_recorded(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path / "mine" / "ends")

    def state_after(leave: Any) -> str:
        with pytest.raises((SystemExit, RuntimeError)), DataPlane.open(config, folder=folder) as plane:
            next(iter(plane))
            assert answer(capsys, "status", folder.path, "--json")["state"] == "RUNNING"
            leave()
        return str(answer(capsys, "status", folder.path, "--json")["state"])

    def fail() -> None:
        raise RuntimeError("the loop fails")

    assert state_after(fail) == "FAILED"
    assert state_after(lambda: sys.exit(75)) == "SAVED"
    assert state_after(lambda: sys.exit(0)) == "COMPLETED"


def test_a_stop_request_ends_one_attempt_only(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "mine" / "stopped")
    with DataPlane.open(config, Local(), folder=folder) as plane:
        folder.stop_request.touch()
        for batch in plane:
            plane.finish(batch)
            if plane.stop_requested():
                break
        state = plane.state_dict()
        folder.stop_request.touch()
    assert answer(capsys, "status", folder.path, "--json")["state"] == "SAVED"
    train(config, folder, 5, state)
    assert History(folder.journal).end == batch.step + 1 + 5


@pytest.mark.parametrize("stops", [True, False])
def test_the_batch_script_learns_that_a_program_saved_and_stopped(
    stops: bool, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script turns exit code 0 into 75 if this file exists, so that the run continues."""
    monkeypatch.setenv("MIXTERA_SAVED_FILE", str(tmp_path / "saved"))
    folder = RunFolder(tmp_path / "mine" / "job")
    with DataPlane.open(config, folder=folder) as plane:
        for batch in plane:
            plane.finish(batch)
            if stops:
                folder.stop_request.touch()
            if plane.stop_requested() or batch.step == 4:
                break
        assert not (tmp_path / "saved").exists()

    assert (tmp_path / "saved").exists() == stops


def test_a_program_on_several_ranks_claims_one_attempt(config: Config, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "mine" / "ranks")

    def serve(comm: Any) -> None:
        with DataPlane.open(config, comm, folder=folder) as plane:
            for batch, _ in zip(plane, range(3), strict=False):
                plane.record(batch, 1.0 + batch.tokens[:, 1:])

    run_ranks(2, serve)
    assert folder.attempts() == [1]
    assert json.loads(folder.job_record(1).read_text())["ranks"] == 2
    assert [record.num_ranks for record in History(folder.journal).attempts] == [2]
    assert [event["step"] for event in read_events(folder.metric("comm")) if "reduce_s" in event] == [0, 1, 2]


def test_the_only_rank_logs_no_wait_for_reductions(config: Config, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    train(config, folder, 3)
    fields = {name for event in read_events(folder.metric("comm")) for name in event}
    assert "plan_s" in fields and "reduce_s" not in fields
