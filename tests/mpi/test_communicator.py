"""`Mpi` passes the conformance suite of communicators."""

import subprocess
import sys
from pathlib import Path

import pytest

from mixtera_hpc.testing.communicators import CHECKS

PROGRAM = Path(__file__).with_name("communicator_program.py")
MPIEXEC = Path(sys.executable).with_name("mpiexec")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_mpi_conforms_to_the_protocol(ranks: int) -> None:
    command = [MPIEXEC, "-n", str(ranks), sys.executable, "-m", "mpi4py", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == [check.__name__ for check in CHECKS]
