"""Slurm's warning signal is neither lost nor fatal, whenever it arrives."""

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
    ("program", "output"),
    [
        ("warn(); control = RunControl(None, False); print(control.poll())", "(True, False)"),
        ("control = RunControl(None, False); warn(); print(control.poll())", "(True, False)"),
        (
            "import threading; control = RunControl(None, False); never = threading.Event(); "
            "threading.Thread(target=never.wait, daemon=True).start(); control.close(); warn(); print('still running')",
            "still running",
        ),
        (
            "control = RunControl(None, False); control.close(); "
            "control = RunControl(None, False); print(control.poll())",
            "(False, False)",
        ),
    ],
    ids=["before", "during", "after", "never"],
)
def test_the_warning_signal_is_kept_until_it_can_be_handled(program: str, output: str) -> None:
    done = subprocess.run([sys.executable, "-c", BEGIN + program], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout.strip()) == (0, output)


FORK = """
import time
control = RunControl(None, False)
ready, write_end = os.pipe()
child = os.fork()
if child == 0:
    os.write(write_end, b"!")
    time.sleep(60)
    os._exit(0)
os.read(ready, 1)
os.kill(child, signal.SIGUSR2)  # Of two pending signals, the kernel delivers this one first.
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), control.stop_was_requested(False), control.poll())
os.kill(os.getpid(), signal.SIGTERM)
print(control.stop_was_requested(False), control.poll())
"""


def test_sigterm_to_a_fork_ends_the_fork_and_stops_no_run() -> None:
    done = subprocess.run([sys.executable, "-c", BEGIN + FORK], capture_output=True, text=True, timeout=600)
    assert done.stdout.splitlines() == ["-15 False (False, False)", "True (True, False)"], done.stderr
