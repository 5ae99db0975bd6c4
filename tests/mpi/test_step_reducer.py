"""Ranks that serve from different plans are named, without a hang."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("step_reducer_program.py")
MPIEXEC = [Path(sys.executable).with_name("mpiexec"), "-n", "3", sys.executable, "-m", "mpi4py"]
GLOO = [sys.executable, PROGRAM.with_name("forked_ranks.py"), "3"]


@pytest.mark.parametrize("launcher", [MPIEXEC, GLOO], ids=["mpiexec", "gloo"])
def test_a_rank_with_another_plan_is_named_whichever_rank_notices_first(launcher: list[str | Path]) -> None:
    done = subprocess.run([*launcher, PROGRAM], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "Ranks [1] served step 2 from another plan" in done.stderr
