"""Fixtures for tests that need the real cluster of `make slurm-up`."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.launch.slurm.slurm_commands import query_jobs, scancel

MIXTERA = Path(sys.executable).with_name("mixtera-hpc")
Mixtera = Callable[..., subprocess.CompletedProcess[str]]


def _missing() -> str | None:
    """Return why there is no usable cluster; None if at least two of its nodes are up."""
    if shutil.which("sinfo") is None:
        return "no Slurm on this machine; start one with make slurm-up"
    done = subprocess.run(
        ["sinfo", "-h", "-N", "-p", "normal", "-o", "%t"], capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        return "the Slurm controller does not answer; start it with make slurm-up"
    usable = [word for word in done.stdout.split() if word in ("idle", "mix", "alloc", "comp")]
    if len(usable) < 2:
        return "fewer than two nodes are up; start them with make slurm-up"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("slurm")]
    if marked and (reason := _missing()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a new folder of runs, and cancel all of its jobs afterwards."""
    root = tmp_path_factory.mktemp("runs")
    yield root
    starts = [json.loads(path.read_text()) for path in root.glob("*/*/attempts/*/job.json")]
    jobs = [start["job_id"] for start in starts if start["job_id"]]
    scancel([job for job, info in query_jobs(jobs).items() if info.state.active])


@pytest.fixture
def command(runs: Path) -> Mixtera:
    """Return a function that calls `mixtera-hpc` with its runs below `runs`."""

    def call(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "MIXTERA_RUNS": str(runs)}
        done = subprocess.run([MIXTERA, *words], capture_output=True, text=True, timeout=900, env=environment)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return call


@pytest.fixture
def mixtera(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Mixtera:
    """Return a function that does what `command` does, in this process: a test asks for the state many times."""
    monkeypatch.setenv("MIXTERA_RUNS", str(runs))

    def call(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        out = io.StringIO()
        err = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(words))
        assert not check or code == 0, out.getvalue() + err.getvalue()
        return subprocess.CompletedProcess(list(words), code, out.getvalue(), err.getvalue())

    return call
