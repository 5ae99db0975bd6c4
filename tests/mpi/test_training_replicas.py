"""Replicas on several ranks: gradients for unequal token counts, and detection of weights that differ."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("replicas_program.py")
MPIEXEC = Path(sys.executable).with_name("mpiexec")


@pytest.fixture(scope="module", params=[2, 3])
def outcome(request: pytest.FixtureRequest) -> dict[str, object]:
    command = [MPIEXEC, "-n", str(request.param), sys.executable, "-m", "mpi4py", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_gradients_are_the_mean_over_the_counted_tokens_of_all_ranks(outcome: dict[str, float]) -> None:
    assert outcome["error"] < 1e-6 < outcome["largest"]


def test_a_rank_with_different_weights_is_named(outcome: dict[str, str]) -> None:
    assert outcome["message"] == "The model's weights on ranks [1] differ from rank 0's."
