"""Slurm's output, recorded from Slurm 22.05 and replayed by shell scripts named like its commands."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mixtera_hpc.errors import LaunchError
from mixtera_hpc.launch.slurm.slurm_commands import (
    JobState,
    SubmissionUnknownError,
    query_jobs,
    sbatch,
    scancel,
)

MakeCommand = Callable[[str, str], Path]
NOT_QUEUED = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


def test_any_number_of_jobs_takes_one_squeue_and_one_sacct(command: MakeCommand) -> None:
    squeue = command("squeue", "echo '1|RUNNING|None|2|1:02:03|2:00:00'")
    sacct = command("sacct", "echo '2|COMPLETED|0:0|1|61|60'")

    infos = query_jobs(["1", "2", "3"])

    assert {job: info.state for job, info in infos.items()} == {"1": JobState.RUNNING, "2": JobState.COMPLETED}
    assert (infos["1"].elapsed_s, infos["1"].limit_s, infos["1"].nodes) == (3723, 7200, 2)
    assert (infos["2"].elapsed_s, infos["2"].limit_s) == (61, 3600)
    assert len(squeue.read_text().splitlines()) == len(sacct.read_text().splitlines()) == 1


def test_sacct_is_not_called_if_all_jobs_are_active(command: MakeCommand) -> None:
    command("squeue", "echo '1|PENDING|Priority|2|0:00|1-00:00:00'")
    sacct = command("sacct", "exit 1")

    info = query_jobs(["1"])["1"]

    assert (info.state, info.reason, info.limit_s) == (JobState.PENDING, "Priority", 86400)
    assert not sacct.exists()


def test_a_job_requeued_after_a_node_failure_is_pending(command: MakeCommand) -> None:
    command("squeue", "echo '1|PENDING|BeginTime|2|0:00|1:00:00'")
    command("sacct", "echo '1|NODE_FAIL|0:0|2|100|60'")

    assert query_jobs(["1"])["1"].state == JobState.PENDING


@pytest.mark.parametrize(
    ("line", "state"),
    [
        ("1|FAILED|75:0|2|100|60", JobState.SAVED),
        ("1|FAILED|1:0|2|100|60", JobState.FAILED),
        ("1|CANCELLED by 1000|0:0|2|100|60", JobState.CANCELLED),
        ("1|TIMEOUT|0:15|2|100|60", JobState.TIMEOUT),
        ("1|NODE_FAIL|0:0|2|100|60", JobState.NODE_FAIL),
        ("1|OUT_OF_MEMORY|0:125|2|100|Partition_Limit", JobState.FAILED),
        ("1|A_NEW_WORD|0:0|2|100|60", JobState.UNKNOWN),
    ],
)
def test_every_kind_of_end_has_its_state(command: MakeCommand, line: str, state: JobState) -> None:
    command("squeue", NOT_QUEUED)
    command("sacct", f"echo '{line}'")

    assert query_jobs(["1"])["1"].state == state


def test_without_accounting_recent_ends_come_from_squeue(command: MakeCommand) -> None:
    command("squeue", "echo '1|TIMEOUT|TimeLimit|2|1:00:20|1:00:00'")
    command("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")

    assert query_jobs(["1"])["1"].state == JobState.TIMEOUT


def test_a_controller_that_does_not_answer_is_an_error(command: MakeCommand) -> None:
    command("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")

    with pytest.raises(LaunchError, match="Unable to contact"):
        query_jobs(["1"])


def test_without_jobs_no_command_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")

    assert query_jobs([]) == {}
    scancel([])


def test_the_cluster_name_behind_a_job_id_is_removed(command: MakeCommand, tmp_path: Path) -> None:
    command("sbatch", "echo '4711;alps'")

    assert sbatch(tmp_path / "submit.sh") == "4711"


def test_a_refusal_by_sbatch_names_the_config_key(command: MakeCommand, tmp_path: Path) -> None:
    command("sbatch", "echo 'sbatch: error: invalid partition specified: gpuu' >&2; exit 1")

    with pytest.raises(LaunchError, match=r"invalid partition specified: gpuu\n  See job.partition"):
        sbatch(tmp_path / "submit.sh")


def test_the_error_without_slurm_names_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(LaunchError, match="--dry-run"):
        sbatch(tmp_path / "submit.sh")


TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"


def test_a_job_that_slurm_accepted_in_spite_of_an_error_is_not_submitted_again(
    command: MakeCommand, tmp_path: Path
) -> None:
    calls = command("sbatch", f"echo '{TIMED_OUT}' >&2; exit 1")
    command("squeue", f"echo '17|/other/submit.sh'; echo '18|{tmp_path}/submit.sh'")

    assert sbatch(tmp_path / "submit.sh") == "18"
    assert len(calls.read_text().splitlines()) == 1


def test_a_transient_error_is_tried_again(
    command: MakeCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixtera_hpc.launch.slurm.slurm_commands.RETRY_DELAYS_S", (0.0, 0.0))
    command(
        "sbatch",
        f"[ -e '{tmp_path}/second' ] && echo 17 && exit; touch '{tmp_path}/second'; echo '{TIMED_OUT}' >&2; exit 1",
    )
    command("squeue", "exit 0")

    assert sbatch(tmp_path / "submit.sh") == "17"


def test_a_submission_is_unknown_if_slurm_stops_to_answer(command: MakeCommand, tmp_path: Path) -> None:
    command("sbatch", f"echo '{TIMED_OUT}' >&2; exit 1")
    command("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")

    with pytest.raises(SubmissionUnknownError, match="may or may not wait"):
        sbatch(tmp_path / "runs/attempts/001/submit.sh")
