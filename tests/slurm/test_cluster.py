"""Jobs on the real cluster: submitted, followed, continued, cancelled, failed. `stand_in.py` replaces the trainer."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Mixtera = Callable[..., subprocess.CompletedProcess[str]]
STAND_IN = Path(__file__).with_name("stand_in.py")
LIMIT_S = 900
"""A guard against hanging."""

pytestmark = pytest.mark.slurm


def words(num_steps: int, step_s: float, *more: str, fail_at: int = -1, hold_at: int = -1) -> list[str]:
    """Return the overrides of a run on 2 nodes × 2 ranks."""
    command = f"job.command=[{sys.executable},-u,{STAND_IN},'{num_steps}','{step_s}','{fail_at}','{hold_at}']"
    return ["cluster=dev", "job.nodes=2", "data.root=/data", "mixture.unit=samples", "run.name=test", command, *more]


def status(mixtera: Mixtera) -> dict[str, Any]:
    return dict(json.loads(mixtera("status", "test", "--json").stdout))


def let_go(folder: Path) -> None:
    """Let a run that waits at `hold_at` go on."""
    (folder / "control").mkdir(exist_ok=True)
    (folder / "control" / "go").touch()


def wait_until(mixtera: Mixtera, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + LIMIT_S
    while not condition(now := status(mixtera)):
        assert time.monotonic() < deadline, now
        time.sleep(0.3)
    return now


def test_a_run_is_submitted_followed_and_completed(command: Mixtera) -> None:
    done = command("submit", *words(3, 0.1), "--wait")

    assert "rank 0 of 4" in done.stdout
    now = status(command)
    assert (now["state"], now["step"], now["nodes"]) == ("COMPLETED", 2, 2)
    lines = command("logs", "test", "--rank", "all").stdout
    assert all(f"[{rank}] rank {rank} of 4" in lines for rank in range(4))


def test_a_printed_script_runs_unchanged(mixtera: Mixtera, runs: Path) -> None:
    script = mixtera("submit", "--dry-run", *words(3, 0.1)).stdout
    assert not list(runs.iterdir())

    submitted = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, cwd=runs)

    assert submitted.returncode == 0, submitted.stderr
    wait_for_folder(runs)
    now = wait_until(mixtera, lambda now: now["state"] == "COMPLETED")
    assert (now["job_id"], now["step"]) == (submitted.stdout.strip(), 2)


def wait_for_folder(runs: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not list(runs.glob("test/*/config.yaml")):
        assert time.monotonic() < deadline, "the job made no run folder"
        time.sleep(0.3)


def test_a_signalled_run_saves_and_continues_in_the_next_attempt(mixtera: Mixtera) -> None:
    mixtera("submit", *words(12, 0.05, "job.max_attempts=3", hold_at=3))
    first = wait_until(mixtera, lambda now: (now["step"] or 0) >= 2)
    subprocess.run(["scancel", "--signal=USR2", first["job_id"]], check=True)

    now = wait_until(mixtera, lambda now: now["state"] == "COMPLETED")

    assert (now["attempt"], now["step"]) == (2, 11)
    assert now["job_id"] != first["job_id"]
    steps = [
        json.loads(line)["step"] for line in (Path(now["folder"]) / "metrics/steps.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(12))


def test_a_run_saves_before_the_time_limit_and_ends_with_75(mixtera: Mixtera) -> None:
    """Slurm may send its signal up to a minute early, but always before the limit."""
    # With a limit of one minute, the signal could come before Python has started.
    limits = ['job.time="00:02:00"', "job.signal_lead_s=20", "job.max_attempts=1"]

    done = mixtera("submit", *words(10_000, 0.2, *limits), "--wait", check=False)

    assert done.returncode == 75
    assert status(mixtera)["state"] == "SAVED"


def test_a_killed_rank_ends_the_job_and_is_named(mixtera: Mixtera) -> None:
    done = mixtera("submit", *words(100, 0.2, fail_at=2), "--wait", check=False)

    assert done.returncode == 1
    assert "First failure: {" in done.stdout
    now = status(mixtera)
    assert (now["state"], now["reason"].partition(" on ")[0]) == ("FAILED", "rank 1")
    assert "was killed or crashed after step 1" in now["reason"]


def test_a_run_continues_after_its_batch_shell_is_killed(mixtera: Mixtera) -> None:
    mixtera("submit", *words(12, 0.05, hold_at=3))
    first = wait_until(mixtera, lambda now: (now["step"] or 0) >= 1)
    subprocess.run(["pkill", "-KILL", "-f", f"{int(first['job_id']):05d}/slurm_script"], check=True)

    now = wait_until(mixtera, lambda now: now["state"] == "COMPLETED")

    assert (now["attempt"], now["step"]) == (2, 11)


def test_a_second_job_in_the_folder_of_a_run_is_refused(mixtera: Mixtera) -> None:
    mixtera("submit", *words(12, 0.05, hold_at=3))
    first = wait_until(mixtera, lambda now: (now["step"] or 0) >= 1)
    script = Path(first["folder"]) / "attempts/001/submit.sh"

    for done_by in ("the running job", "the complete run"):
        subprocess.run(["sbatch", "--wait", script], check=False, capture_output=True)
        log = (Path(first["folder"]) / "attempts/001/logs/batch.out").read_text()
        expected = "is running as job" if done_by == "the running job" else "The run is complete"
        assert expected in log, log
        let_go(Path(first["folder"]))
        wait_until(mixtera, lambda now: now["state"] == "COMPLETED")

    assert status(mixtera)["attempt"] == 1
    steps = (Path(first["folder"]) / "metrics/steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == list(range(12))


def test_nothing_is_started_while_slurm_does_not_answer(
    mixtera: Mixtera, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixtera("submit", *words(1000, 0.2))
    wait_until(mixtera, lambda now: now["state"] == "RUNNING")
    for name in ("squeue", "sacct"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    done = mixtera("resume", "test", check=False)

    assert done.returncode == 2
    assert "It is not known whether attempt 1" in done.stderr


def test_a_failing_program_of_the_user_is_named_with_its_error(mixtera: Mixtera) -> None:
    words_of_run = [word for word in words(1, 0) if not word.startswith("job.command")]
    program = "import os,sys; os.environ['SLURM_PROCID']=='1' and sys.exit('my own error'); __import__('time').sleep(9)"
    command = f"job.command=[{sys.executable},-c,{json.dumps(program)}]"
    mixtera("submit", *words_of_run, command, "job.max_attempts=1", "--wait", check=False)

    assert status(mixtera)["reason"].endswith("my own error")
    assert status(mixtera)["reason"].startswith("rank 1 on node")


def test_cancel_ends_a_run_and_its_chain(mixtera: Mixtera) -> None:
    mixtera("submit", *words(1000, 0.2, "job.max_attempts=5"))
    wait_until(mixtera, lambda now: (now["step"] or 0) >= 1)

    mixtera("cancel", "test")

    now = wait_until(mixtera, lambda now: now["state"] not in ("PENDING", "RUNNING"))
    assert (now["state"], now["attempt"]) == ("CANCELLED", 1)


def test_a_run_cancelled_after_saving_can_be_resumed_on_fewer_nodes(mixtera: Mixtera) -> None:
    mixtera("submit", *words(15, 0.05, "job.max_attempts=5", hold_at=3))
    wait_until(mixtera, lambda now: (now["step"] or 0) >= 1)
    mixtera("cancel", "test", "--after-save")
    saved = wait_until(mixtera, lambda now: now["state"] == "SAVED")
    assert saved["attempt"] == 1

    done = mixtera("resume", "test", "job.nodes=1", "--wait")

    assert "rank 0 of 2 on" in done.stdout
    now = status(mixtera)
    assert (now["state"], now["attempt"], now["nodes"], now["step"]) == ("COMPLETED", 2, 1, 14)


def test_a_running_run_is_not_resumed(mixtera: Mixtera) -> None:
    mixtera("submit", *words(1000, 0.2))
    wait_until(mixtera, lambda now: now["state"] == "RUNNING")

    done = mixtera("resume", "test", check=False)

    assert done.returncode == 2
    assert "RUNNING as job" in done.stderr


def test_a_sweep_over_nodes_gives_every_point_its_own_job(mixtera: Mixtera, runs: Path) -> None:
    points = [word for word in words(2, 0.1) if word != "job.nodes=2"]
    sweep = ["sweep", *points, "job.nodes=1,2", "dataplane.seed=0,1", "--max-parallel", "2"]

    mixtera(*sweep)

    lines = wait_for_sweep(mixtera, 4)
    assert sorted(line["nodes"] for line in lines) == [1, 1, 2, 2]
    again = mixtera(*sweep)
    assert "0 of 4 runs to submit" in again.stdout


def test_a_task_of_an_array_continues_by_itself_and_is_cancelled_alone(mixtera: Mixtera, runs: Path) -> None:
    """Three runs of one shape are one array. One is killed, one is cancelled while it waits, and one just ends."""
    sweep = ["sweep", *words(20, 0.05, hold_at=3), "dataplane.seed=0,1,2"]

    submitted = [line.split() for line in mixtera(*sweep).stdout.splitlines() if "_" in line.partition("  ")[0]]

    assert [job.partition("_")[2] for job, _ in submitted] == ["0", "1", "2"]
    (_, ended), (_, killed), (_, cancelled) = submitted
    wait_for(lambda: (status_of(mixtera, killed)["step"] or 0) >= 1)
    mixtera("cancel", cancelled)
    subprocess.run(["pkill", "-KILL", "-f", f"{runs}/test/arrays/.*/1.sh"], check=True)
    let_go(Path(status_of(mixtera, ended)["folder"]))

    states = wait_for(lambda: [status_of(mixtera, folder) for folder in (ended, killed, cancelled)], is_over)
    assert [(state["state"], state["attempt"]) for state in states] == [
        ("COMPLETED", 1),
        ("COMPLETED", 2),
        ("CANCELLED", 1),
    ]


def status_of(mixtera: Mixtera, folder: str) -> dict[str, Any]:
    return dict(json.loads(mixtera("status", folder, "--json").stdout))


def is_over(states: list[dict[str, Any]]) -> bool:
    return all(state["state"] not in ("PENDING", "RUNNING", "UNKNOWN") for state in states)


def wait_for(ask: Callable[[], Any], condition: Callable[[Any], bool] = bool) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while not condition(answer := ask()):
        assert time.monotonic() < deadline, answer
        time.sleep(0.5)
    return answer


def wait_for_sweep(mixtera: Mixtera, num_points: int) -> list[dict[str, Any]]:
    deadline = time.monotonic() + LIMIT_S
    while True:
        lines = [json.loads(line) for line in mixtera("status", "--json").stdout.splitlines()]
        if len(lines) == num_points and all(line["state"] == "COMPLETED" for line in lines):
            return lines
        assert time.monotonic() < deadline, lines
        time.sleep(0.5)


def test_what_slurm_refuses_leaves_no_folder(mixtera: Mixtera, runs: Path) -> None:
    done = mixtera("submit", *words(2, 0.1), "job.constraint=nonsense", check=False)

    assert done.returncode == 2
    assert "Slurm refused the job" in done.stderr
    assert not list(runs.glob("*/*/config.yaml"))
