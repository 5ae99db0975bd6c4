"""Whatever keeps a run from getting on is named within `dataplane.watchdog_s` + 10 s, and a stop request ends it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.launch.status import run_statuses

MPIEXEC = Path(sys.executable).with_name("mpiexec")
PROGRAM = Path(__file__).with_name("watchdog_program.py")
LIMIT_S = 2
NAMED_S = LIMIT_S + 10
END_S = 10
WORDS = [
    "dataplane.seq_len=16",
    "dataplane.global_batch_size=8",
    "dataplane.chunk_steps=2",
    "mixture.max_epochs=null",
    f"dataplane.watchdog_s={LIMIT_S}",
    f"dataplane.watchdog_trainer_s={LIMIT_S}",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MPIEXEC.exists(), reason="no mpiexec beside this python: pip install mpich"),
]


class Job:
    """A running program of some ranks."""

    def __init__(self, mode: str, folder: Path, overrides: list[str], ranks: int, shard: Path | None) -> None:
        folder.mkdir(parents=True)
        self.run = RunFolder(folder)
        launcher = [str(MPIEXEC), "-n", str(ranks)] if ranks > 1 else []
        command = [*launcher, sys.executable, str(PROGRAM), mode, str(folder), *overrides]
        self.errors = (folder / "stderr").open("w+")
        environment = os.environ | {"STUCK_RANK": str(ranks - 1)}
        if shard is not None:
            environment["HANGING_SHARD"] = str(shard)
        self.process = subprocess.Popen(command, stdout=self.errors, stderr=self.errors, env=environment)

    def pid(self, rank: int) -> int:
        return int((self.run.path / f"pid_{rank}").read_text())

    def wait_for(self, condition: Callable[[], Any], timeout_s: float, what: str) -> float:
        """Return the seconds until `condition` holds."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < timeout_s, f"{what} took over {timeout_s} s:\n{self.log()}"
            time.sleep(0.05)
        return time.monotonic() - began

    def wait_until_named(self) -> dict[str, Any]:
        self.wait_for(self.run.stall_report(1).exists, NAMED_S, "naming the ranks at fault")
        return dict(json.loads(self.run.stall_report(1).read_text()))

    def wait_for_end(self) -> str:
        """Return the log of a job that must end with an error soon."""
        self.wait_for(lambda: self.process.poll() is not None, END_S, "the end")
        assert self.process.returncode not in (0, 75)
        return self.log()

    def log(self) -> str:
        return Path(self.errors.name).read_text()


@contextmanager
def running(mode: str, folder: Path, overrides: list[str], ranks: int, shard: Path | None = None) -> Iterator[Job]:
    """Run a job, until its ranks have their data plane open; kill what remains."""
    job = Job(mode, folder / "own" / "run", [*overrides, *WORDS], ranks, shard)
    try:
        ready = [job.run.path / f"pid_{rank}" for rank in range(ranks)]
        job.wait_for(lambda: all(p.exists() for p in ready) or job.process.poll() is not None, 60, "the start")
        yield job
    finally:
        for path in job.run.path.glob("pid_*"):
            if job.process.poll() is None:
                os.kill(int(path.read_text()), signal.SIGKILL)
        job.process.kill()
        job.process.wait()
        job.errors.close()


def largest_shard(overrides: list[str]) -> Path:
    root = Path(next(word.partition("=")[2] for word in overrides if word.startswith("data.root=")))
    return max(root.rglob("*.jsonl"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("request_stop", ["file", "SIGTERM", "SIGUSR2"])
def test_a_hung_read_is_named_and_a_stop_ends_it(
    ranks: int, request_stop: str, own_collection: list[str], tmp_path: Path
) -> None:
    shard = largest_shard(own_collection)
    with running("train", tmp_path, own_collection, ranks, shard) as job:
        verdict = job.wait_until_named()
        named = verdict["ranks"][0]
        assert (named["stage"], Path(named["shard"]).name) == ("read", shard.name), verdict
        assert 0 <= named["rows"][0] <= named["rows"][1] and "silent" not in named
        stacks = job.run.stacks(1, named["rank"])
        job.wait_for(stacks.exists, 5, "the stacks")
        job.wait_for(lambda: "document_reader.py" in stacks.read_text(), 2, "the stacks of the reading thread")
        (status,) = run_statuses([job.run], datetime.now(UTC))
        assert status.stalled is not None and shard.name in (status.reason or "")

        if request_stop == "file":
            job.run.stop_request.parent.mkdir(exist_ok=True)
            job.run.stop_request.touch()
        else:
            number = signal.Signals[request_stop]
            for rank in range(ranks):
                os.kill(job.pid(rank), number)
        log = job.wait_for_end()
    assert f"shard {named['shard']}" in log and "a stop was requested" in log and "Nothing more is saved" in log
    failure = json.loads(job.run.failure(1).read_text())
    assert failure["rank"] == named["rank"] and "stage read" in failure["reason"]


def test_a_stopped_rank_is_named_and_abort_ends_the_run(own_collection: list[str], tmp_path: Path) -> None:
    with running("train", tmp_path, [*own_collection, "dataplane.watchdog=abort"], 2) as job:
        job.wait_for((job.run.path / "step_3_1").exists, 60, "three steps")
        os.kill(job.pid(1), signal.SIGSTOP)
        verdict = job.wait_until_named()
        assert [(named["rank"], named["silent"]) for named in verdict["ranks"]] == [(1, True)]
        log = job.wait_for_end()
    assert "rank 1 on " in log and "is silent" in log and "dataplane.watchdog=abort" in log
    assert json.loads(job.run.failure(1).read_text())["rank"] == 1


def test_a_stopped_rank_that_goes_on_is_forgotten(own_collection: list[str], tmp_path: Path) -> None:
    with running("train", tmp_path, own_collection, 2) as job:
        job.wait_for((job.run.path / "step_3_1").exists, 60, "three steps")
        os.kill(job.pid(0), signal.SIGSTOP)
        verdict = job.wait_until_named()
        assert [named["rank"] for named in verdict["ranks"]] == [0]
        os.kill(job.pid(0), signal.SIGCONT)
        job.wait_for(lambda: not job.run.stall_report(1).exists(), 10, "the end of the stall")
        job.run.stop_request.parent.mkdir(exist_ok=True)
        job.run.stop_request.touch()
        job.wait_for(lambda: job.process.poll() is not None, END_S, "the agreed end")
        assert job.process.returncode == 0 and "ended in order" in job.log()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_trainer_that_is_stuck_is_named(ranks: int, own_collection: list[str], tmp_path: Path) -> None:
    with running("trainer", tmp_path, own_collection, ranks) as job:
        job.wait_for((job.run.path / f"step_3_{ranks - 1}").exists, 60, "three steps")
        verdict = job.wait_until_named()
        assert [(named["rank"], named["stage"]) for named in verdict["ranks"]] == [(ranks - 1, "trainer")]
        stacks = job.run.stacks(1, ranks - 1)
        job.wait_for(stacks.exists, 5, "the stacks")
        job.wait_for(lambda: "watchdog_program.py" in stacks.read_text(), 2, "the stacks of the trainer")
        for rank in range(ranks):
            os.kill(job.pid(rank), signal.SIGTERM)
        assert "Nothing more is saved" in job.wait_for_end()


def test_a_hung_reading_process_is_named_and_ended(own_collection: list[str], tmp_path: Path) -> None:
    shard = largest_shard(own_collection)
    words = [*own_collection, "dataplane.workers=2", "dataplane.watchdog=abort"]
    with running("train", tmp_path, words, 1, shard) as job:
        named = job.wait_until_named()["ranks"][0]
        assert (named["stage"], Path(named["shard"]).name) == ("read", shard.name)
        job.wait_for_end()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_slow_run_is_not_reported(ranks: int, own_collection: list[str], tmp_path: Path) -> None:
    with running("slow", tmp_path, [*own_collection, "dataplane.watchdog=abort"], ranks) as job:
        job.wait_for(lambda: job.process.poll() is not None, 60, "five steps")
        assert job.process.returncode == 0, job.log()
        assert "No progress" not in job.log()
        assert not job.run.stall_report(1).exists()
