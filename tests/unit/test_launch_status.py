"""The state of a run, from its folder and from Slurm."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.launch.attempts import (
    ExitRecord,
    JobRecord,
    create_attempt,
    end_attempt,
    record_start,
)
from mixtera_hpc.launch.prepare import prepare_run
from mixtera_hpc.launch.slurm.slurm_commands import JobState
from mixtera_hpc.launch.status import RunStatus, last_step, run_statuses

MakeConfig = Callable[..., Config]
MakeCommand = Callable[[str, str], Path]
NOW = datetime.now(UTC)


@pytest.fixture
def folder(make_config: MakeConfig) -> RunFolder:
    return prepare_run(make_config(), [], NOW)


def submit(folder: RunFolder, config: Config, job_id: str = "4711", **fields: str) -> None:
    record_start(folder, create_attempt(folder), replace(JobRecord.slurm(config, job_id), **fields))


def status(folder: RunFolder) -> RunStatus:
    return run_statuses([folder], NOW + timedelta(seconds=1))[0]


@pytest.mark.parametrize(
    ("code", "state"), [(0, JobState.COMPLETED), (75, JobState.SAVED), (1, JobState.FAILED), (137, JobState.FAILED)]
)
def test_a_recorded_end_is_reported_without_slurm(
    folder: RunFolder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, code: int, state: JobState
) -> None:
    submit(folder, make_config())
    end_attempt(folder, 1, ExitRecord(exit_code=code, elapsed_s=9))
    monkeypatch.setenv("PATH", "")

    assert (status(folder).state, status(folder).elapsed_s) == (state, 9)


def test_the_first_failing_rank_is_the_reason(folder: RunFolder, make_config: MakeConfig) -> None:
    submit(folder, make_config())
    failure = {"rank": 2, "host": "nid7", "reason": "was killed or crashed after step 17"}
    (folder.attempt(1) / "failure.json").write_text(json.dumps(failure))
    end_attempt(folder, 1, ExitRecord(exit_code=137, elapsed_s=9))

    assert status(folder).reason == "rank 2 on nid7: was killed or crashed after step 17"


def test_the_state_is_that_of_the_newest_attempt(
    folder: RunFolder, make_config: MakeConfig, command: MakeCommand
) -> None:
    submit(folder, make_config(), "1")
    end_attempt(folder, 1, ExitRecord(exit_code=75, elapsed_s=9))
    submit(folder, make_config(), "2")
    command("squeue", "echo '2|PENDING|Dependency|1|0:00|1:00:00'")

    one = status(folder)

    assert (one.state, one.reason, one.attempt, one.job_id) == (JobState.PENDING, "Dependency", 2, "2")


def test_a_job_that_waits_for_the_end_of_an_attempt_is_shown_when_it_has_ended(
    folder: RunFolder, make_config: MakeConfig, command: MakeCommand
) -> None:
    submit(folder, make_config(), "1")
    folder.follow_up(1).write_text("2\n")
    command("squeue", "echo '1|RUNNING|None|1|0:10|1:00:00'; echo '2|PENDING|Dependency|1|0:00|1:00:00'")
    assert (status(folder).state, status(folder).attempt, status(folder).job_id) == (JobState.RUNNING, 1, "1")

    end_attempt(folder, 1, ExitRecord(exit_code=137, elapsed_s=9))

    one = status(folder)
    assert (one.state, one.attempt, one.job_id) == (JobState.PENDING, 2, "2")
    assert one.reason == "Dependency; attempt 1: FAILED, exit code 137"


def test_the_rank_that_srun_reports_is_the_reason_for_a_failed_program(
    folder: RunFolder, make_config: MakeConfig
) -> None:
    submit(folder, make_config())
    logs = folder.logs(1)
    (logs / "batch.out").write_text(
        "srun: error: nid1: task 0: Killed\nsrun: error: nid7: task 2: Exited with exit code 3\n"
    )
    (logs / "rank_00002.err").write_text("Traceback\nValueError: my own error\n")
    end_attempt(folder, 1, ExitRecord(exit_code=137, elapsed_s=9))

    assert status(folder).reason == "rank 2 on nid7: ValueError: my own error"


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "Runtime environment uses unsupported PMI version PMIx. Aborting."),
        (0, "LaunchError: srun started 4 processes, but the data plane sees 1. Processes that …\n  Choose …"),
        (1, "LaunchError: srun started 4 processes, but the data plane sees 1. Processes that …\n  Choose …"),
    ],
)
def test_a_wrong_mpi_option_is_named_with_its_cure(
    folder: RunFolder, make_config: MakeConfig, rank: int, message: str
) -> None:
    """Rank 1 is the one that srun reports."""
    submit(folder, make_config())
    folder.batch_log(1).write_text("srun: error: node1: task 1: Exited with exit code 2\n")
    (folder.logs(1) / f"rank_0000{rank}.err").write_text(f"{message}\n")
    end_attempt(folder, 1, ExitRecord(exit_code=16, elapsed_s=9))

    assert "srun --mpi=list" in (status(folder).reason or "")


def test_a_job_that_slurm_does_not_know_yet_is_pending(
    folder: RunFolder, make_config: MakeConfig, command: MakeCommand
) -> None:
    command("squeue", "echo 'Invalid job id specified' >&2; exit 1")
    command("sacct", "exit 0")
    submit(folder, make_config())
    assert status(folder).state == JobState.PENDING

    submit(folder, make_config(), submitted="2020-01-01T00:00:00Z")
    assert status(folder).state == JobState.UNKNOWN


def test_the_state_is_unknown_if_slurm_does_not_answer(
    folder: RunFolder, make_config: MakeConfig, command: MakeCommand
) -> None:
    command("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    submit(folder, make_config())

    one = status(folder)

    assert one.state == JobState.UNKNOWN
    assert "Unable to contact" in (one.reason or "")


def test_a_local_run_is_running_while_its_process_lives(folder: RunFolder, make_config: MakeConfig) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        start = replace(JobRecord.local(make_config()), pid=process.pid, pid_start_ticks=None)
        record_start(folder, create_attempt(folder), start)
        assert status(folder).state == JobState.RUNNING
        process.kill()

    assert (status(folder).state, status(folder).reason) == (JobState.FAILED, "its processes are gone")
    (folder.attempt(1) / "failure.json").write_text('{"rank": 3, "host": "n1", "reason": "DataError: a row"}')
    assert status(folder).reason == "rank 3 on n1: DataError: a row"


def test_step_and_speed_come_from_the_last_complete_line(folder: RunFolder) -> None:
    lines = "".join(json.dumps({"step": n, "tokens_per_s": 10.0 * n, "filler": "x" * 900}) + "\n" for n in range(200))
    (folder.metrics / "steps.jsonl").write_text(lines + '{"step": 200, "tok')

    assert last_step(folder)["step"] == 199
    assert (status(folder).step, status(folder).tokens_per_s) == (199, 1990.0)


def test_the_log_age_is_the_age_of_the_newest_log_that_is_not_empty(folder: RunFolder, make_config: MakeConfig) -> None:
    submit(folder, make_config())
    for name, age in (("rank_00000.out", 50), ("rank_00001.err", 20), ("rank_00002.err", 5)):
        path = folder.logs(1) / name
        path.write_text("" if age == 5 else "line\n")
        os.utime(path, (NOW.timestamp() - age + 1, NOW.timestamp() - age + 1))
    end_attempt(folder, 1, ExitRecord(exit_code=0, elapsed_s=9))

    assert status(folder).last_log_age_s == 20


FIELDS = (
    "run_id",
    "state",
    "reason",
    "job_id",
    "nodes",
    "elapsed_s",
    "limit_s",
    "step",
    "tokens_per_s",
    "last_log_age_s",
)


def test_json_prints_one_object_per_run(
    folder: RunFolder, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(folder, make_config())
    end_attempt(folder, 1, ExitRecord(exit_code=0, elapsed_s=9))

    assert main(["status", folder.run_id, "--json", "--root", str(folder.path.parents[1])]) == 0

    one = json.loads(capsys.readouterr().out)
    assert set(FIELDS) <= set(one)
    assert (one["run_id"], one["state"], one["job_id"]) == (folder.run_id, "COMPLETED", "4711")


def test_an_unknown_run_is_refused_with_similar_names(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "trail", "--root", str(folder.path.parents[1])]) == 2

    assert "Did you mean 'trial'" in capsys.readouterr().err
