"""Whatever keeps a run from getting on is named within `dataplane.watchdog_s` + 10 s, and a stop request ends it.

During a hung read all ranks are at one step, so that a stop saves; otherwise all end on the last checkpoint.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.plane_state import PlaneState
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.launch.status import run_statuses

MPIEXEC = Path(sys.executable).with_name("mpiexec")
PROGRAM = Path(__file__).with_name("watchdog_program.py")
LIMIT_S = 4
"""`dataplane.watchdog_s`: longer than a busy machine delays a step."""
NAMED_S = LIMIT_S + 10
END_S = 10 + 5
"""Seconds that the documentation promises, and those that a busy machine adds."""
HANG_S = 600
"""A guard against hanging, for what has no promised time."""
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

    def __init__(
        self, mode: str, folder: Path, overrides: list[str], ranks: int, hanging: dict[str, Path], launcher: str
    ) -> None:
        folder.mkdir(parents=True)
        self.run = RunFolder(folder)
        command = [*launch_words(launcher, ranks), str(PROGRAM), mode, str(folder), *overrides]
        self.errors = (folder / "stderr").open("w+")
        environment = os.environ | {"STUCK_RANK": str(ranks - 1)}
        environment |= {name: str(path) for name, path in hanging.items()}
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

    def wait_until_named(self, limit_s: float = NAMED_S) -> dict[str, Any]:
        self.wait_for(self.run.stall_report(1).exists, limit_s, "naming the ranks at fault")
        return dict(json.loads(self.run.stall_report(1).read_text()))

    def wait_for_end(self, limit_s: float = END_S) -> str:
        """Return the log of a job that must end with an error soon."""
        self.wait_for(lambda: self.process.poll() is not None, limit_s, "the end")
        assert self.process.returncode not in (0, 75)
        return self.log()

    def log(self) -> str:
        return Path(self.errors.name).read_text()


def launch_words(launcher: str, ranks: int) -> list[str]:
    """Return the words before the program."""
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    if launcher == "srun":
        # As the batch script does: the end of one task is not the end of the others.
        step = ["srun", "--nodes=2", f"--ntasks={ranks}", "--mpi=pmi2", "--kill-on-bad-exit=0", "--time=20"]
        return [*step, sys.executable]
    return [str(MPIEXEC), "-n", str(ranks), sys.executable] if ranks > 1 else [sys.executable]


@contextmanager
def running(
    mode: str,
    path: Path,
    overrides: list[str],
    ranks: int,
    shard: Path | None = None,
    folder: Path | None = None,
    launcher: str = "mpiexec",
) -> Iterator[Job]:
    """Run a job, until its ranks have their data plane open; kill what remains."""
    hanging = {"HANGING_SHARD": shard, "HANGING_FOLDER": folder}
    known = {name: value for name, value in hanging.items() if value is not None}
    job = Job(mode, path / "own" / "run", [*WORDS, *overrides], ranks, known, launcher)
    try:
        ready = [job.run.path / f"pid_{rank}" for rank in range(ranks)]
        job.wait_for(lambda: all(p.exists() for p in ready) or job.process.poll() is not None, HANG_S, "the start")
        yield job
    finally:
        for path in job.run.path.glob("pid_*"):
            if job.process.poll() is None:
                with suppress(ProcessLookupError):
                    os.kill(int(path.read_text()), signal.SIGKILL)
        job.process.kill()
        job.process.wait()
        job.errors.close()


def data_root(overrides: list[str]) -> Path:
    return Path(next(word.partition("=")[2] for word in overrides if word.startswith("data.root=")))


def largest_shard(overrides: list[str]) -> Path:
    return max(data_root(overrides).rglob("*.jsonl"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    ("request_stop", "ranks"),
    [
        ("file", 2),
        ("SIGTERM", 1),
        pytest.param("file", 1, marks=pytest.mark.full),
        pytest.param("SIGTERM", 2, marks=pytest.mark.full),
        pytest.param("SIGUSR2", 1, marks=pytest.mark.full),
        pytest.param("SIGUSR2", 2, marks=pytest.mark.full),
    ],
)
def test_a_hung_read_is_named_and_a_stop_saves(
    ranks: int, request_stop: str, own_collection: list[str], tmp_path: Path
) -> None:
    shard = largest_shard(own_collection)
    with running("train", tmp_path, own_collection, ranks, shard) as job:
        verdict = job.wait_until_named()
        named = verdict["ranks"][0]
        assert (named["stage"], Path(named["shard"]).name) == ("read", shard.name), verdict
        assert 0 <= named["rows"][0] <= named["rows"][1] and "silent" not in named
        stacks = job.run.stacks(1, named["rank"])
        job.wait_for(stacks.exists, HANG_S, "the stacks")
        job.wait_for(lambda: "document_reader.py" in stacks.read_text(), HANG_S, "the stacks of the reading thread")
        (status,) = run_statuses([job.run], datetime.now(UTC))
        assert status.stalled is not None and shard.name in (status.reason or "")

        request(job, request_stop)
        job.wait_for(lambda: job.process.poll() is not None, END_S, "the agreed end")
        assert job.process.returncode == 0, job.log()
        assert [state_of(job).next_step, *steps_of(job, ranks)] == [0] * (1 + ranks)
        assert "all ranks stop with the state after step -1" in job.log()
    record = json.loads(job.run.exit_record(1).read_text())
    assert record["exit_code"] == 75, "the run must continue by itself"


def request(job: Job, how: str) -> None:
    """Ask for a stop or a save: with a control file, or with a signal to every rank."""
    if how.startswith("SIG"):
        for path in sorted(job.run.path.glob("pid_*")):
            os.kill(int(path.read_text()), signal.Signals[how])
    else:
        file = job.run.save_request if how == "save" else job.run.stop_request
        file.parent.mkdir(exist_ok=True)
        file.touch()


def state_of(job: Job) -> PlaneState:
    return PlaneState.from_state_dict({"plane": np.fromfile(job.run.path / "state", np.uint8)})


def steps_of(job: Job, ranks: int) -> list[int]:
    return [int((job.run.path / f"steps_{rank}").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize(
    "words",
    [[], pytest.param(["dataplane.prefetch_batches=1"], marks=pytest.mark.full), ["dataplane.workers=1"]],
    ids=" ".join,
)
def test_a_read_that_hangs_later_leaves_all_ranks_at_one_step(
    words: list[str], own_collection: list[str], tmp_path: Path
) -> None:
    overrides = with_many_shards(own_collection, tmp_path)
    root = data_root(overrides)
    # A limit that is not reached: the wait ends because of the request alone.
    patient = [*overrides, *words, "dataplane.watchdog_s=600"]
    with running("save", tmp_path, patient, 2, folder=root) as job:
        job.wait_for((job.run.path / "step_3_1").exists, HANG_S, "three steps")
        wait_until_hung(job)
        request(job, "save")
        job.wait_for((job.run.path / "state").exists, END_S, "the state")
        saved = state_of(job).next_step
        request(job, "file")
        job.wait_for(lambda: job.process.poll() is not None, END_S, "the agreed end")
        assert job.process.returncode == 0, job.log()
    assert saved >= 3 and [state_of(job).next_step, *steps_of(job, 2)] == [saved] * 3


def with_many_shards(overrides: list[str], tmp_path: Path) -> list[str]:
    """Copy rows to shards of their own, so that few of them are open after three steps."""
    root = tmp_path / "many"
    root.mkdir()
    for number, line in enumerate(largest_shard(overrides).read_bytes().splitlines(keepends=True)):
        (root / f"{number:03}.jsonl").write_bytes(line)
    changed = {"data.root": root, "index.path": tmp_path / "many.h5"}
    words = [word for word in overrides if word.partition("=")[0] not in changed]
    words += [f"{key}={value}" for key, value in changed.items()]
    build_index(compose(words))
    return words


def wait_until_hung(job: Job) -> None:
    """Wait until no step has been finished for a second."""
    file = job.run.path / "steps_0"
    job.wait_for(lambda: time.time() - file.stat().st_mtime > 1, HANG_S, "the hung read")


def test_a_stopped_rank_is_named_and_abort_ends_the_run(own_collection: list[str], tmp_path: Path) -> None:
    with running("train", tmp_path, [*own_collection, "dataplane.watchdog=abort"], 2) as job:
        job.wait_for((job.run.path / "step_3_1").exists, HANG_S, "three steps")
        os.kill(job.pid(1), signal.SIGSTOP)
        verdict = job.wait_until_named()
        assert [(named["rank"], named["silent"]) for named in verdict["ranks"]] == [(1, True)]
        log = job.wait_for_end(LIMIT_S + END_S)  # After the limit again.
    assert "rank 1 on " in log and "is silent" in log and "dataplane.watchdog=abort" in log
    assert json.loads(job.run.failure(1).read_text())["rank"] == 1


def test_a_stopped_rank_that_goes_on_is_forgotten(own_collection: list[str], tmp_path: Path) -> None:
    with running("train", tmp_path, own_collection, 2) as job:
        job.wait_for((job.run.path / "step_3_1").exists, HANG_S, "three steps")
        os.kill(job.pid(0), signal.SIGSTOP)
        verdict = job.wait_until_named()
        assert [named["rank"] for named in verdict["ranks"]] == [0]
        os.kill(job.pid(0), signal.SIGCONT)
        job.wait_for(lambda: not job.run.stall_report(1).exists(), HANG_S, "the end of the stall")
        job.run.stop_request.parent.mkdir(exist_ok=True)
        job.run.stop_request.touch()
        job.wait_for(lambda: job.process.poll() is not None, END_S, "the agreed end")
        assert job.process.returncode == 0 and "ended in order" in job.log()


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.full), 2])
def test_a_trainer_that_is_stuck_is_named(ranks: int, own_collection: list[str], tmp_path: Path) -> None:
    with running("trainer", tmp_path, own_collection, ranks) as job:
        job.wait_for((job.run.path / f"step_3_{ranks - 1}").exists, HANG_S, "three steps")
        verdict = job.wait_until_named()
        assert [(named["rank"], named["stage"]) for named in verdict["ranks"]] == [(ranks - 1, "trainer")]
        stacks = job.run.stacks(1, ranks - 1)
        job.wait_for(stacks.exists, HANG_S, "the stacks")
        job.wait_for(lambda: "watchdog_program.py" in stacks.read_text(), HANG_S, "the stacks of the trainer")
        for rank in range(ranks):
            os.kill(job.pid(rank), signal.SIGTERM)
        assert "Nothing more is saved" in job.wait_for_end()


def test_a_hung_reading_process_is_named_and_ended(own_collection: list[str], tmp_path: Path) -> None:
    shard = largest_shard(own_collection)
    # Longer than the processes take to start, also on a busy machine.
    words = [*own_collection, "dataplane.workers=2", "dataplane.watchdog=abort", "dataplane.watchdog_s=20"]
    with running("train", tmp_path, words, 1, shard) as job:
        named = job.wait_until_named(30)["ranks"][0]
        assert (named["stage"], Path(named["shard"]).name) == ("read", shard.name)
        job.wait_for_end(30)  # After the limit again.


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.full), 2])
def test_a_slow_run_is_not_reported(ranks: int, own_collection: list[str], tmp_path: Path) -> None:
    # Ten steps of a second: more than the limit together, and far less each.
    words = ["dataplane.watchdog=abort", "dataplane.watchdog_s=8", "dataplane.watchdog_trainer_s=8"]
    with running("slow", tmp_path, [*own_collection, *words], ranks) as job:
        job.wait_for(lambda: job.process.poll() is not None, HANG_S, "ten steps")
        assert job.process.returncode == 0, job.log()
        assert "No progress" not in job.log()
        assert not job.run.stall_report(1).exists()


@pytest.fixture(params=["torchrun", "srun"])
def launcher(request: pytest.FixtureRequest) -> str:
    """Return a launcher of several ranks; srun starts them on two nodes."""
    if request.param == "srun" and (shutil.which("sinfo") is None or subprocess.run(["sinfo", "-h"]).returncode):
        pytest.skip("no Slurm cluster on this machine; start one with make slurm-up")
    return str(request.param)


@pytest.mark.full
def test_a_hung_read_is_named_and_saved_under_other_launchers(
    launcher: str, own_collection: list[str], tmp_path: Path
) -> None:
    shard = largest_shard(own_collection)
    with running("train", tmp_path, own_collection, 4, shard, launcher=launcher) as job:
        named = job.wait_until_named()["ranks"][0]
        assert (named["stage"], Path(named["shard"]).name) == ("read", shard.name)
        request(job, "file")
        job.wait_for((job.run.path / "state").exists, END_S, "the state")
        job.wait_for(lambda: job.process.poll() is not None, 3 * END_S, "the end of the launcher")
        assert job.process.returncode == 0, job.log()
        assert [state_of(job).next_step, *steps_of(job, 4)] == [0] * 5


def test_a_stopped_rank_is_named_under_other_launchers(
    launcher: str, own_collection: list[str], tmp_path: Path
) -> None:
    """The others end on the last checkpoint after a request. The launcher may wait longer for the stopped rank."""
    with running("train", tmp_path, own_collection, 4, launcher=launcher) as job:
        job.wait_for((job.run.path / "step_3_3").exists, HANG_S, "three steps")
        os.kill(job.pid(2), signal.SIGSTOP)
        verdict = job.wait_until_named()
        assert [(named["rank"], named["silent"]) for named in verdict["ranks"]] == [(2, True)]
        request(job, "file")
        others = [job.pid(rank) for rank in (0, 1, 3)]
        job.wait_for(lambda: not any(is_running(pid) for pid in others), END_S, "the end of the others")
        assert "Nothing more is saved" in job.log()


@pytest.mark.full
def test_a_trainer_that_is_stuck_is_named_under_other_launchers(
    launcher: str, own_collection: list[str], tmp_path: Path
) -> None:
    """After a request all ranks end on the last checkpoint, also the one that is stuck in its own code."""
    with running("trainer", tmp_path, own_collection, 4, launcher=launcher) as job:
        job.wait_for((job.run.path / "step_3_3").exists, HANG_S, "three steps")
        verdict = job.wait_until_named()
        assert [(named["rank"], named["stage"]) for named in verdict["ranks"]] == [(3, "trainer")]
        request(job, "file")
        ranks = [job.pid(rank) for rank in range(4)]
        job.wait_for(lambda: not any(is_running(pid) for pid in ranks), END_S, "the end of all ranks")
        log = job.log()
    assert "rank 3 on " in log and "a stop was requested" in log and "Nothing more is saved" in log


def is_running(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
