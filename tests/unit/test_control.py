"""Slurm's warning is never lost and never deadly, whenever it comes."""

import subprocess
import sys

import pytest

BEGIN = """
import os, signal
from mixtera_hpc.dataplane.control import RunControl, block_time_limit_signal
block_time_limit_signal()
warn = lambda: os.kill(os.getpid(), signal.SIGUSR2)
"""


@pytest.mark.parametrize(
    ("life", "said"),
    [
        ("warn(); control = RunControl(None, False); print(control.poll())", "(True, False)"),
        ("control = RunControl(None, False); warn(); print(control.poll())", "(True, False)"),
        (
            "import threading; control = RunControl(None, False); never = threading.Event(); "
            "threading.Thread(target=never.wait, daemon=True).start(); control.close(); warn(); print('left in peace')",
            "left in peace",
        ),
        (
            "control = RunControl(None, False); control.close(); control = RunControl(None, False); print(control.poll())",
            "(False, False)",
        ),
    ],
    ids=["before", "during", "after", "never"],
)
def test_a_warning_is_taken_by_whoever_can_save(life: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", BEGIN + life], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, said)
