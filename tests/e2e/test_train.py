"""Training, kill and resume with another number of ranks; the trace proves that every sample was served once."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from .conftest import COMMAND, MPIEXEC, Cli, only_run

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_training_loop.py"


def steps(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "metrics" / "steps.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_one_process_trains_without_mpi_and_can_be_traced(cli: Cli, small: list[str], tmp_path: Path) -> None:
    cli("run", *small, f"run.root={tmp_path}", "training.num_steps=6")
    folder = only_run(tmp_path)
    losses = [event["loss"] for event in steps(folder)]
    assert len(losses) == 6
    assert all(isinstance(loss, float) and loss > 0 for loss in losses)
    assert "72 sequences of 6 steps" in cli("trace", folder, "--verify").stdout
    lines = [json.loads(line) for line in cli("trace", folder, "--step", "3", "--json").stdout.splitlines()]
    assert [line["position"] for line in lines] == list(range(12))
    assert {"step", "position", "domain_id", "epoch", "segments", "rank", "digest"} == set(lines[0])
    done = cli("resume", folder, rc=2)
    assert "has done all its steps" in done.stderr and "training.num_steps=12" in done.stderr
    assert [attempt.name for attempt in (folder / "attempts").iterdir()] == ["001"]


@pytest.fixture(scope="module")
def killed(
    small: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str], float]:
    """Kill rank 2 of 4 after step 8; return the run, the result of the job, and the seconds until the job ended."""
    root = tmp_path_factory.mktemp("killed")
    words = ["run", *small, f"run.root={root}", "checkpoint.every_steps=3", "training.num_steps=20000"]
    with (root / "out").open("w+") as out:
        process = subprocess.Popen([MPIEXEC, "-n", "4", *COMMAND, *words], stdout=out, stderr=subprocess.STDOUT)
        wait_for_step(root, 8, process)
        os.kill(pid_of_rank(process.pid, 2), signal.SIGKILL)
        killed_at = time.monotonic()
        code = process.wait(timeout=600)
        seconds = time.monotonic() - killed_at
    return only_run(root), subprocess.CompletedProcess(words, code, (root / "out").read_text(), ""), seconds


def wait_for_step(root: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline and process.poll() is None:
        done = [line for path in root.glob("small/*/metrics/steps.jsonl") for line in path.read_text().splitlines()]
        if len(done) > step:
            return
        time.sleep(0.2)
    raise AssertionError(f"step {step} was not reached:\n{(root / 'out').read_text()}")


def pid_of_rank(launcher: int, rank: int) -> int:
    """Return the rank: the descendant of mpiexec with this PMI_RANK that is found before its own children."""
    waiting = [launcher]
    while waiting:
        pid = waiting.pop()
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
        waiting += [int(p) for p in children.stdout.split()]
        with suppress(OSError):  # It may have ended meanwhile.
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"PMI_RANK={rank}".encode() in environment:
                return pid
    raise AssertionError(f"mpiexec has no rank {rank}")


def test_a_killed_rank_ends_the_job_and_is_named(killed: tuple[Path, subprocess.CompletedProcess[str], float]) -> None:
    folder, done, seconds = killed
    assert done.returncode != 0
    assert seconds < 15
    assert "rank 2" in done.stdout
    assert json.loads((folder / "attempts" / "001" / "failure.json").read_text())["rank"] == 2


def test_a_killed_run_resumes_with_another_number_of_ranks_and_verifies(
    killed: tuple[Path, subprocess.CompletedProcess[str], float], cli: Cli
) -> None:
    folder, _, _ = killed
    num_steps = max(int(event["step"]) for event in steps(folder))
    cli("resume", folder, f"training.num_steps={num_steps + 12}", ranks=2)
    verdict = json.loads(cli("trace", folder, "--verify", "--json").stdout)
    assert verdict["num_steps"] == num_steps + 12
    assert verdict["num_attempts"] == 2


def test_a_stop_file_saves_and_exits_with_code_75(cli: Cli, small: list[str], tmp_path: Path) -> None:
    words = ["run", *small, f"run.root={tmp_path}", "training.num_steps=20000"]
    with (tmp_path / "out").open("w+") as out:
        process = subprocess.Popen([MPIEXEC, "-n", "2", *COMMAND, *words], stdout=out, stderr=subprocess.STDOUT)
        wait_for_step(tmp_path, 3, process)
        (only_run(tmp_path) / "control" / "stop").touch()
        assert process.wait(timeout=600) == 75, (tmp_path / "out").read_text()
    cli("resume", only_run(tmp_path), "training.num_steps=40", "training.stop_after=20", rc=None)
    cli("trace", only_run(tmp_path), "--verify")


def test_resuming_with_changed_identity_keys_is_refused_and_names_them(
    killed: tuple[Path, subprocess.CompletedProcess[str], float], cli: Cli
) -> None:
    done = cli("resume", killed[0], "dataplane.seed=9", rc=2)
    assert "dataplane.seed: 0 before, 9 now" in done.stderr


def test_the_example_training_loop_runs_under_mpiexec(small: list[str], tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mpi4py", EXAMPLE, *small, "training.num_steps=8"]
    done = subprocess.run([MPIEXEC, "-n", "2", *words], capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert len(losses) == 8
    assert losses[0] > losses[-1]
