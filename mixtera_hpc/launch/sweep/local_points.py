"""Run the points of a sweep on this machine, one after the other, each with mpiexec if it has several ranks.

As in a batch script, a `job.command` finds the run folder and the attempt in its environment.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from mixtera_hpc.config.job_shape import num_ranks
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import LaunchError, SavedAndStopped
from mixtera_hpc.launch.attempts import ExitRecord, JobRecord, create_attempt, end_attempt, record_start
from mixtera_hpc.launch.claim import Claim
from mixtera_hpc.launch.sweep.prepared_point import prepared_point
from mixtera_hpc.launch.sweep.sweep_plan import SweepPoint

__all__ = ["check_runnable_here", "find_mpiexec", "run_points"]

SIGNALLED = 128
"""The exit code of a program that signal N killed is 128 + N, as in a shell."""


def find_mpiexec() -> str | None:
    """Return the mpiexec of this Python environment, else the one on PATH; None if there is neither."""
    beside_python = Path(sys.executable).with_name("mpiexec")
    return str(beside_python) if beside_python.exists() else shutil.which("mpiexec")


def check_runnable_here(points: Sequence[SweepPoint]) -> None:
    """Refuse points that this machine cannot run.

    Raises:
        LaunchError: A point has several ranks, and there is no mpiexec.
    """
    most = max((num_ranks(point.config) for point in points), default=1)
    if most > 1 and find_mpiexec() is None:
        raise LaunchError(
            f"A point of the sweep has {most} ranks, but there is no mpiexec on this machine.\n"
            "  Install the extra `mpi`, or let every point have one rank."
        )


def run_points(points: Sequence[SweepPoint]) -> Iterator[tuple[RunFolder, int]]:
    """Run points that are due to their end, and yield the folder and exit code of each."""
    for point in points:
        with prepared_point(point) as folder:
            config = point.config
            command = config.job.command
        yield folder, _run_program(folder, config, command) if command else _run_trainer(folder, config)


def _run_trainer(folder: RunFolder, config: Config) -> int:
    trainer = [sys.executable, "-u", "-m", "mixtera_hpc", "run", "--folder", str(folder.path)]
    return subprocess.run([*_launcher(config), *trainer], check=False).returncode


def _run_program(folder: RunFolder, config: Config, command: Sequence[str]) -> int:
    """Run `job.command` as an attempt of the run, with the environment and the exit codes of a batch script.

    Raises:
        LaunchError: The program cannot be started.
    """
    attempt = create_attempt(folder)
    record_start(folder, attempt, JobRecord.local(config))
    saved = folder.saved(attempt)
    environment = {
        "MIXTERA_RUN_FOLDER": str(folder.path),
        "MIXTERA_ATTEMPT": str(attempt),
        "MIXTERA_SAVED_FILE": str(saved),
    }
    began = time.monotonic()
    with contextlib.closing(Claim(folder, attempt)):
        try:
            done = subprocess.run([*_launcher(config), *command], env=os.environ | environment, check=False)
        except OSError as error:
            raise LaunchError(
                f"job.command cannot be started: {command[0]}: {error.strerror}.\n  Correct its first word."
            ) from None
    code = done.returncode if done.returncode >= 0 else SIGNALLED - done.returncode
    if code == 0 and saved.exists():
        code = SavedAndStopped.exit_code
    end_attempt(folder, attempt, ExitRecord(exit_code=code, elapsed_s=int(time.monotonic() - began)))
    return code


def _launcher(config: Config) -> list[str]:
    ranks = num_ranks(config)
    return [str(find_mpiexec()), "-n", str(ranks)] if ranks > 1 else []
