"""Two rounds of `make chaos-local`: a run survives faults, and lost and doubled nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import MPIEXEC

SCRIPT = Path(__file__).parents[1] / "chaos" / "chaos_local.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.full,
    pytest.mark.skipif(not MPIEXEC.exists(), reason="no mpiexec beside this python: pip install mpich"),
]


@pytest.mark.parametrize("kind", ["hung_read", "damaged_checkpoint"])
def test_a_run_survives_two_rounds(kind: str, tmp_path: Path) -> None:
    words = ["--rounds", "2", "--seed", "5", "--only", kind, "--folder", str(tmp_path / "chaos")]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    *rounds, summary = done.stdout.splitlines()
    assert [json.loads(line)["round"] for line in rounds] == [1, 2]
    assert summary.startswith("2 rounds, 0 failed. verified:") and "exactly once" in summary
