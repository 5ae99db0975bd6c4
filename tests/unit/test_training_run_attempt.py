"""One attempt of a run in this process: its exit code, and the record of how it ended."""

from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import LaunchError
from mixtera_hpc.launch.attempts import ExitRecord, end_attempt, read_end, start_local_attempt
from mixtera_hpc.launch.prepare import prepare_run
from mixtera_hpc.launch.resume import NO_EDITS, ResumeRequest
from mixtera_hpc.training.continue_run import continue_run, submit_next_attempt
from mixtera_hpc.training.run_attempt import Attempt, run_attempt


@pytest.fixture
def attempt(make_config: Callable[..., Config]) -> Attempt:
    """Make the first attempt of a run that the reference trainer refuses, because it does not serve tokens."""
    config = make_config()
    folder = prepare_run(config, [], datetime.now(UTC))
    return Attempt(folder=folder, number=start_local_attempt(folder, config))


def test_a_refused_run_has_exit_code_2_and_a_recorded_end(attempt: Attempt, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_attempt("local", lambda num_ranks: attempt) == 2
    assert "ConfigError" in capsys.readouterr().err
    end = read_end(attempt.folder, 1)
    assert end is not None
    assert end.exit_code == 2


def test_an_attempt_that_cannot_be_prepared_has_no_recorded_end(attempt: Attempt) -> None:
    def prepare(num_ranks: int) -> Attempt:
        raise LaunchError(f"{num_ranks} rank is not enough")

    assert run_attempt("local", prepare) == 2
    assert read_end(attempt.folder, 1) is None


def test_inside_a_batch_script_the_script_records_the_end(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTERA_RUN_FOLDER", str(attempt.folder.path))
    monkeypatch.setenv("MIXTERA_ATTEMPT", "1")
    assert run_attempt("local", lambda num_ranks: attempt) == 2
    assert read_end(attempt.folder, 1) is None


def test_a_running_attempt_is_not_continued(attempt: Attempt, capsys: pytest.CaptureFixture[str]) -> None:
    assert continue_run(attempt.folder) == 2
    assert "a process of this machine" in capsys.readouterr().err
    assert attempt.folder.attempts() == [1]


def test_a_refused_change_leaves_the_run_as_it_was(attempt: Attempt) -> None:
    end_attempt(attempt.folder, 1, ExitRecord(exit_code=75, elapsed_s=1))
    before = contents(attempt.folder)
    with pytest.raises(LaunchError, match="--change-seed is given"):
        continue_run(attempt.folder, ["job.nodes=2"], ResumeRequest(change_seed=True))
    assert contents(attempt.folder) == before


def test_a_change_is_not_recorded_if_nothing_can_be_submitted(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_attempt(attempt.folder, 1, ExitRecord(exit_code=75, elapsed_s=1))
    before = contents(attempt.folder)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LaunchError, match="sbatch was not found"):
        submit_next_attempt(attempt.folder, ["job.nodes=2"], NO_EDITS)
    assert contents(attempt.folder) == before


def contents(folder: RunFolder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
