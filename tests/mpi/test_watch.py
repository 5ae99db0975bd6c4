"""Under plain mpiexec and torchrun the rank that dies is reported, the job ends, and no process remains."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

MPIEXEC = Path(sys.executable).with_name("mpiexec")
PROGRAM = Path(__file__).with_name("watch_program.py")
LIMIT_S = 600
"""A guard against hanging."""

pytestmark = pytest.mark.skipif(not MPIEXEC.exists(), reason="no mpiexec beside this python: pip install mpich")


def launch(mode: str, folder: Path, launcher: str = "mpiexec") -> subprocess.CompletedProcess[str]:
    launchers = {
        "mpiexec": [str(MPIEXEC), "-n", "4", sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"],
    }
    command = [*launchers[launcher], str(PROGRAM), mode, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)


def sentinels_of(folder: Path) -> list[str]:
    """Return the command lines of the sentinels that watch `folder`."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if "sentinel.py" in line and str(folder) in line:
            lines.append(line)
    return lines


def ends_soon(folder: Path) -> bool:
    """Return True if the sentinel ends by itself. It may outlive mpiexec by milliseconds."""
    deadline = time.monotonic() + LIMIT_S
    while sentinels_of(folder) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not sentinels_of(folder)


@pytest.mark.parametrize("mode", ["SIGKILL", "exit", "peers fail first"])
def test_a_killed_rank_is_reported(mode: str, tmp_path: Path) -> None:
    done = launch(mode, tmp_path)

    assert done.returncode != 0
    assert done.stderr.count("was killed or crashed") == 1
    assert "[rank 2 on " in done.stderr
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert (failure["rank"], failure["step"]) == (2, 4)
    assert ends_soon(tmp_path)


def test_a_killed_rank_is_reported_under_torchrun(tmp_path: Path) -> None:
    done = launch("SIGKILL", tmp_path, "torchrun")

    assert done.returncode != 0
    assert "[rank 2 on " in done.stderr
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert (failure["rank"], failure["step"]) == (2, 4)
    assert ends_soon(tmp_path)


def test_a_killed_launcher_is_named_instead_of_a_rank(tmp_path: Path) -> None:
    command = [str(MPIEXEC), "-n", "4", sys.executable, str(PROGRAM), "killed launcher", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "ready\n"
        launcher.kill()

    assert ends_soon(tmp_path)
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert failure["reason"].endswith(f"because the launcher of the ranks (process {launcher.pid}) was killed")


def test_an_exception_is_reported_instead_of_a_crash(tmp_path: Path) -> None:
    done = launch("raise", tmp_path)

    assert done.returncode == 1
    assert "was killed or crashed" not in done.stderr
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert (failure["rank"], failure["reason"]) == (2, "ValueError: a shard is truncated")
    assert ends_soon(tmp_path)


@pytest.mark.parametrize(("mode", "code"), [("clean", 0), ("saved", 75)])
def test_a_clean_exit_is_not_reported(mode: str, code: int, tmp_path: Path) -> None:
    done = launch(mode, tmp_path)

    assert done.returncode == code
    assert "was killed or crashed" not in done.stderr
    assert not (tmp_path / "failure.json").exists()
    assert ends_soon(tmp_path)
