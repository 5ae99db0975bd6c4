"""Training on the real cluster: jobs, chains of jobs and Hydra's launcher serve the same samples as one process."""

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
LIMIT_S = 900
"""A guard against hanging."""

pytestmark = pytest.mark.slurm


@pytest.fixture
def small(collection: list[str]) -> list[str]:
    """Return the overrides of a run on 2 nodes × 2 ranks that trains in seconds, with a learned mixture."""
    dataplane = {"seq_len": 32, "global_batch_size": 12, "chunk_steps": 2, "audit": "true"}
    training = {"num_layers": 1, "num_heads": 2, "embedding_dim": 16, "num_steps": 12}
    return [
        *(word for word in collection if not word.startswith("mixture.group_by")),
        *(
            "mixture=ado",
            "mixture.group_by=[source]",
            "mixture.algorithm.warmup=4",
            "mixture.algorithm.refit_interval=4",
        ),
        *(f"dataplane.{key}={value}" for key, value in dataplane.items()),
        *(f"training.{key}={value}" for key, value in training.items()),
        *("cluster=dev", "job.nodes=2", 'job.time="00:10:00"', "run.name=small"),
    ]


def status(mixtera: Mixtera) -> dict[str, Any]:
    return dict(json.loads(mixtera("status", "small", "--json").stdout))


def wait_until(mixtera: Mixtera, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + LIMIT_S
    while not condition(now := status(mixtera)):
        assert time.monotonic() < deadline, f"{now}\n{mixtera('logs', 'small', '--rank', 'all').stdout}"
        time.sleep(0.5)
    return now


def served_at(mixtera: Mixtera, run: str, step: int) -> list[dict[str, Any]]:
    """Return the samples of every sequence of a step, without the rank that was served."""
    lines = mixtera("trace", run, "--step", str(step), "--json").stdout.splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "rank"} for line in lines]


def test_a_submitted_run_serves_what_one_process_serves(mixtera: Mixtera, command: Mixtera, small: list[str]) -> None:
    submitted = mixtera("submit", *small, "--wait", check=False)
    assert submitted.returncode == 0, submitted.stdout
    assert status(mixtera)["step"] == 11
    verdict = json.loads(mixtera("trace", "small", "--verify", "--json").stdout)
    assert verdict["num_steps"] == 12

    command("run", *small, "run.name=alone")

    for step in (0, 11):
        assert served_at(mixtera, "alone", step) == served_at(mixtera, "small", step)


def test_a_run_that_is_signalled_continues_in_the_next_job_without_a_gap(mixtera: Mixtera, small: list[str]) -> None:
    mixtera("submit", *small, "job.max_attempts=3", "training.num_steps=100000")
    first = wait_until(mixtera, lambda now: (now["step"] or 0) >= 3)
    subprocess.run(["scancel", "--signal=USR2", first["job_id"]], check=True)
    second = wait_until(mixtera, lambda now: now["attempt"] == 2 and now["state"] == "RUNNING")
    wait_until(mixtera, lambda now: now["step"] > second["step"] + 3)
    mixtera("cancel", "small", "--after-save")
    saved = wait_until(mixtera, lambda now: now["state"] == "SAVED")
    assert saved["attempt"] == 2

    done = mixtera("resume", "small", "job.nodes=1", f"training.num_steps={saved['step'] + 5}", "--wait", check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads(mixtera("trace", "small", "--verify", "--json").stdout)
    assert (verdict["num_steps"], verdict["num_attempts"]) == (saved["step"] + 5, 3)


def test_the_launcher_of_hydra_starts_mpi_ranks(small: list[str], runs: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "mixtera_hpc.training", "-m", "hydra/launcher=submitit_slurm"]
    done = subprocess.run(
        [*program, *small, "dataplane.seed=1,2", "training.num_steps=4"],
        env={**os.environ, "MIXTERA_RUNS": str(runs)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    starts = [json.loads(path.read_text()) for path in runs.glob("small/*/attempts/001/job.json")]
    assert [start["ranks"] for start in starts] == [4, 4]
    ends = [json.loads(path.read_text()) for path in runs.glob("small/*/attempts/001/exit.json")]
    assert [end["exit_code"] for end in ends] == [0, 0]


def test_a_requeued_job_is_another_attempt_of_its_run(mixtera: Mixtera, small: list[str]) -> None:
    requeued = ["cluster.sbatch={no_requeue:null,requeue:true}", "training.num_steps=100000"]
    mixtera("submit", *small, *requeued)
    first = wait_until(mixtera, lambda now: (now["step"] or 0) >= 3)
    folder = Path(first["folder"])
    (folder / "control" / "save").touch()
    wait_until(mixtera, lambda now: (folder / "checkpoints" / "LATEST").exists())

    subprocess.run(["scontrol", "requeue", first["job_id"]], check=True)
    second = wait_until(mixtera, lambda now: now["attempt"] == 2 and now["state"] == "RUNNING")
    assert second["job_id"] == first["job_id"]
    wait_until(mixtera, lambda now: now["step"] > second["step"] + 3)
    mixtera("cancel", "small", "--after-save")
    wait_until(mixtera, lambda now: now["state"] == "SAVED")

    verdict = json.loads(mixtera("trace", "small", "--verify", "--json").stdout)
    assert verdict["num_attempts"] == 2


@pytest.mark.full
def test_one_command_sweeps_nodes_and_writes_the_curve(mixtera: Mixtera, small: list[str], runs: Path) -> None:
    points = [word for word in small if word != "job.nodes=2"]
    sweep = ["sweep", *points, "sweep=strong", "job.nodes=1,2,4", "job.ranks_per_node=1", "--wait"]

    first = mixtera(*sweep)

    assert "efficiency" in first.stdout
    files = runs / "small" / "scaling"
    assert len((files / "scaling.csv").read_text().splitlines()) == 4
    assert (files / "scaling.png").read_bytes().startswith(b"\x89PNG")
    again = mixtera(*sweep)
    assert "3 of 3 done, nothing to submit." in again.stdout
    assert len(list(runs.glob("small/*/config.yaml"))) == 3
