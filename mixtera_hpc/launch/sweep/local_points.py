"""Run the points of a sweep on this machine, one after the other, each with mpiexec if it has several ranks."""

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mixtera_hpc.config.job_shape import num_ranks
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.errors import ConfigError, LaunchError
from mixtera_hpc.launch.sweep.job_array import prepare_point
from mixtera_hpc.launch.sweep.sweep_plan import SweepPoint

__all__ = ["check_runnable_here", "find_mpiexec", "run_points"]


def find_mpiexec() -> str | None:
    """Return the mpiexec of this Python environment, else the one on PATH; None if there is neither."""
    beside_python = Path(sys.executable).with_name("mpiexec")
    return str(beside_python) if beside_python.exists() else shutil.which("mpiexec")


def check_runnable_here(points: Sequence[SweepPoint]) -> None:
    """Refuse points that this machine cannot run.

    Raises:
        ConfigError: A point has a `job.command`.
        LaunchError: A point has several ranks, and there is no mpiexec.
    """
    if any(point.config.job.command for point in points):
        raise ConfigError(
            "sweep --local runs the reference trainer, but job.command names another program.\n"
            "  Submit the sweep to Slurm, or start the program yourself."
        )
    most = max((num_ranks(point.config) for point in points), default=1)
    if most > 1 and find_mpiexec() is None:
        raise LaunchError(
            f"A point of the sweep has {most} ranks, but there is no mpiexec on this machine.\n"
            "  Install the extra `mpi`, or let every point have one rank."
        )


def run_points(points: Sequence[SweepPoint]) -> Iterator[tuple[RunFolder, int]]:
    """Run points that are due to their end, and yield the folder and exit code of each."""
    for point in points:
        folder = prepare_point(point)
        ranks = num_ranks(point.config)
        launcher = [str(find_mpiexec()), "-n", str(ranks)] if ranks > 1 else []
        command = [*launcher, sys.executable, "-u", "-m", "mixtera_hpc", "run", "--folder", str(folder.path)]
        yield folder, subprocess.run(command, check=False).returncode
