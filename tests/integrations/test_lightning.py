"""Lightning: the example under every launcher, and processes that Lightning starts itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from .conformance import SMALL, TrainerConformance, assert_verified
from .launching import LIMIT_S, Example

PROGRAM = Path(__file__).with_name("lightning_devices_program.py")


class TestLightningExample(TrainerConformance):
    example = Example(script="lightning.py")


@pytest.mark.integrations
@pytest.mark.full
def test_processes_that_lightning_starts_share_the_batches(collection: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), str(tmp_path), *collection, *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)

    assert done.returncode == 0, done.stdout + done.stderr
    served = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    expected = [(rank, step, list(range(4 * rank, 4 * rank + 4))) for rank in range(2) for step in range(4)]
    assert served == [f"rank {rank} step {step} positions {positions}" for rank, step, positions in expected]
    assert_verified(tmp_path)
