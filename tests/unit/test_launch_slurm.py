"""Slurm's answers, as recorded from Slurm 22.05, given by stand-ins for its commands."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mixtera_hpc.errors import LaunchError
from mixtera_hpc.launch.slurm_commands import JobState, query_jobs, sbatch, scancel

MakeCommand = Callable[[str, str], Path]
NOT_QUEUED = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


def test_any_number_of_jobs_is_one_question_each(command: MakeCommand) -> None:
    squeue = command("squeue", "echo '1|RUNNING|None|2|1:02:03|2:00:00'")
    sacct = command("sacct", "echo '2|COMPLETED|0:0|1|61|60'")

    infos = query_jobs(["1", "2", "3"])

    assert {job: info.state for job, info in infos.items()} == {"1": JobState.RUNNING, "2": JobState.COMPLETED}
    assert (infos["1"].elapsed_s, infos["1"].limit_s, infos["1"].nodes) == (3723, 7200, 2)
    assert (infos["2"].elapsed_s, infos["2"].limit_s) == (61, 3600)
    assert len(squeue.read_text().splitlines()) == len(sacct.read_text().splitlines()) == 1


def test_running_jobs_alone_need_no_accounting(command: MakeCommand) -> None:
    command("squeue", "echo '1|PENDING|Priority|2|0:00|1-00:00:00'")
    sacct = command("sacct", "exit 1")

    info = query_jobs(["1"])["1"]

    assert (info.state, info.reason, info.limit_s) == (JobState.PENDING, "Priority", 86400)
    assert not sacct.exists()


def test_a_job_requeued_after_a_node_failure_has_not_ended(command: MakeCommand) -> None:
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
def test_ends_are_told_apart(command: MakeCommand, line: str, state: JobState) -> None:
    command("squeue", NOT_QUEUED)
    command("sacct", f"echo '{line}'")

    assert query_jobs(["1"])["1"].state == state


def test_without_accounting_recent_ends_come_from_the_queue(command: MakeCommand) -> None:
    command("squeue", "echo '1|TIMEOUT|TimeLimit|2|1:00:20|1:00:00'")
    command("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")

    assert query_jobs(["1"])["1"].state == JobState.TIMEOUT


def test_a_silent_controller_is_not_the_end_of_a_job(command: MakeCommand) -> None:
    command("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")

    with pytest.raises(LaunchError, match="Unable to contact"):
        query_jobs(["1"])


def test_no_jobs_ask_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")

    assert query_jobs([]) == {}
    scancel([])


def test_the_job_id_of_a_federated_cluster_is_its_number(command: MakeCommand, tmp_path: Path) -> None:
    command("sbatch", "echo '4711;alps'")

    assert sbatch(tmp_path / "submit.sh") == "4711"


def test_a_refusal_names_the_key_to_change(command: MakeCommand, tmp_path: Path) -> None:
    command("sbatch", "echo 'sbatch: error: invalid partition specified: gpuu' >&2; exit 1")

    with pytest.raises(LaunchError, match=r"invalid partition specified: gpuu\n  See job.partition"):
        sbatch(tmp_path / "submit.sh")


def test_a_machine_without_slurm_says_what_else_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(LaunchError, match="--dry-run"):
        sbatch(tmp_path / "submit.sh")
