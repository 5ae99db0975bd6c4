"""Log lines of any rank and attempt, from files of ranks and of nodes."""

from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.launch.attempts import ExitRecord, JobRecord, create_attempt, end_attempt, record_start
from mixtera_hpc.launch.follow import follow_run, run_exit_code
from mixtera_hpc.launch.logs import LogTail, all_lines
from mixtera_hpc.launch.prepare import prepare_run


@pytest.fixture
def folder(make_config: Callable[..., Config]) -> RunFolder:
    """Make a run with two attempts that ended: one saved, one completed."""
    config = make_config()
    folder = prepare_run(config, [], datetime.now(UTC))
    for attempt, code in ((1, 75), (2, 0)):
        record_start(folder, create_attempt(folder), JobRecord.slurm(config, f"471{attempt}"))
        logs = folder.logs(attempt)
        (logs / "batch.out").write_text(f"batch {attempt}\n")
        for rank in (0, 1):
            (logs / f"rank_{rank:05d}.out").write_text(f"attempt {attempt}\n")
            (logs / f"rank_{rank:05d}.err").write_text("")
        end_attempt(folder, attempt, ExitRecord(exit_code=code, elapsed_s=1))
    return folder


def test_lines_of_one_rank_come_from_all_attempts(folder: RunFolder) -> None:
    lines = list(all_lines(folder, 1))

    assert [line for line in lines if not line.startswith("---")] == ["[1] attempt 1", "[1] attempt 2"]
    assert [line.rpartition(" ")[2] for line in lines if line.startswith("---")] == ["4711", "4712"]


def test_the_default_shows_rank_0_and_the_batch_script(folder: RunFolder) -> None:
    assert "[batch] batch 1" in list(all_lines(folder, "main"))
    assert "[1] attempt 1" not in list(all_lines(folder, "main"))
    assert "[1] attempt 1" in list(all_lines(folder, "all"))


def test_the_default_shows_the_last_lines_of_the_rank_that_failed_first(folder: RunFolder) -> None:
    logs = folder.logs(2)
    (logs / "rank_00001.err").write_text("".join(f"line {i}\n" for i in range(30)))
    (logs / "batch.out").write_text(
        "srun: error: node1: task 0: Killed\nsrun: error: node2: task 1: Exited with exit code 2\n"
    )

    for lines in (list(all_lines(folder, "main")), list(follow_run(folder))):
        assert "[1] line 29" in lines and "[1] line 3" not in lines
    assert "[1] line 29" not in list(all_lines(folder, 0))


def test_labelled_node_files_read_like_rank_files(folder: RunFolder) -> None:
    (folder.logs(2) / "node_00000.out").write_text("  3: three\n 12: twelve: and more\n")

    assert LogTail(folder.logs(2), 12).lines() == ["[12] twelve: and more"]
    assert "[3] three" in LogTail(folder.logs(2), "all").lines()


def test_a_line_is_returned_when_it_is_complete(folder: RunFolder) -> None:
    path = folder.logs(2) / "rank_00000.out"
    tail = LogTail(folder.logs(2), 0)
    path.write_text("half")
    assert tail.lines() == []

    with path.open("a") as file:
        file.write(" and half\nrest")
    assert tail.lines() == ["[0] half and half"]
    assert tail.lines(last=True) == ["[0] rest"]


def test_following_shows_all_attempts_and_ends_with_the_run(folder: RunFolder) -> None:
    lines = list(follow_run(folder, 0))

    assert [line for line in lines if line.startswith("[0]")] == ["[0] attempt 1", "[0] attempt 2"]
    assert run_exit_code(folder) == 0


@pytest.mark.parametrize(("code", "expected"), [(75, 75), (2, 2), (1, 1), (137, 1)])
def test_waiting_returns_the_exit_code_of_the_run(folder: RunFolder, code: int, expected: int) -> None:
    end_attempt(folder, 2, ExitRecord(exit_code=code, elapsed_s=1))

    assert run_exit_code(folder) == expected


def test_logs_of_a_run_without_logs_name_the_terminal(
    make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepare_run(make_config("run.name=bare"), [], datetime.now(UTC))

    assert main(["logs", str(folder.path)]) == 2
    assert "terminal" in capsys.readouterr().err


def test_a_rank_without_lines_is_explained(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    for attempt in (1, 2):
        (folder.logs(attempt) / "rank_00000.out").write_text("")

    assert main(["logs", str(folder.path), "--rank", "0"]) == 2
    assert "rank_00000.err" in (text := capsys.readouterr().err)
    assert "write only warnings and errors" in text
    for attempt in (1, 2):
        for path in folder.logs(attempt).glob("rank_00000.*"):
            path.unlink()
    assert main(["logs", str(folder.path), "--rank", "0"]) == 2
    assert "ended before its ranks started" in capsys.readouterr().err


def test_a_rank_of_a_waiting_job_is_explained(
    make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("run.name=waits", "cluster=dev", "job.nodes=2")
    folder = prepare_run(config, [], datetime.now(UTC))
    record_start(folder, create_attempt(folder), JobRecord.slurm(config, "4711"))

    assert main(["logs", str(folder.path), "--rank", "3"]) == 2
    assert "waits in the queue" in capsys.readouterr().err


@pytest.mark.parametrize("rank", ["4", "-1"])
def test_a_rank_that_does_not_exist_is_refused(
    make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str], rank: str
) -> None:
    config = make_config("run.name=small", "cluster=dev", "job.nodes=2")
    folder = prepare_run(config, [], datetime.now(UTC))
    record_start(folder, create_attempt(folder), JobRecord.slurm(config, "4711"))

    assert main(["logs", str(folder.path), f"--rank={rank}"]) == 2
    assert f"--rank is {rank}, but {folder.run_id} has 4 ranks" in capsys.readouterr().err
