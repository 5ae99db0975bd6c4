"""Start an example under a launcher, follow its record, and wait for its end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LAUNCHERS", "Example", "Finished", "Job", "start"]

REPOSITORY = Path(__file__).parents[2]
FAILING = Path(__file__).with_name("failing_rank.py")
LIMIT_S = 900.0
"""Seconds that a job may take; the imports of a busy machine are most of it."""

LAUNCHERS = {"python": 1, "torchrun": 2, "mpiexec": 2}
"""Launcher → the number of ranks it starts here."""

OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A script of `examples/trainers` and the Python that has its library."""

    script: str
    python: str = sys.executable

    @property
    def path(self) -> Path:
        script = Path(self.script)
        return script if script.is_absolute() else REPOSITORY / "examples/trainers" / script

    def command(self, launcher: str, *, fails: bool = False) -> list[str]:
        """Return the start of the command line; `fails` makes an optimizer step of rank 1 raise."""
        program = [str(FAILING), str(self.path)] if fails else [str(self.path)]
        ranks = str(LAUNCHERS[launcher])
        if launcher == "python":
            return [self.python, *program]
        if launcher == "mpiexec":
            return [str(Path(self.python).with_name("mpiexec")), "-n", ranks, self.python, *program]
        torchrun = [self.python, "-m", "torch.distributed.run", "--nproc-per-node", ranks]
        return [*torchrun, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *program]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A job that has ended."""

    code: int
    output: str
    """Standard output and standard error of all ranks."""
    ended_at: float
    """Seconds since the epoch."""

    @property
    def ended_cleanly(self) -> bool:
        """True if every rank exited with 0, or with 75: saved, to be continued.

        torchrun turns 75 into 1, prints the codes, and may end the other ranks with SIGTERM while they exit.
        """
        if self.code in (0, 75):
            return True
        codes = [line.split(":")[1].split()[0] for line in self.output.splitlines() if "exitcode  :" in line]
        return "75" in codes and set(codes) <= {"75", "-15"}


class Job:
    """A running job of one example."""

    def __init__(self, process: "subprocess.Popen[bytes]", script: Path, log: Path) -> None:
        self._process = process
        self._script = script
        self._log = log

    def wait(self, limit_s: float = LIMIT_S) -> Finished:
        try:
            code = self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job did not end within {limit_s:g} s:\n{self.output()[-6000:]}") from None
        return Finished(code=code, output=self.output(), ended_at=time.time())

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for_lines(self, path: Path, count: int) -> None:
        """Wait until a file has at least `count` lines."""
        deadline = time.monotonic() + LIMIT_S
        while not path.exists() or path.read_bytes().count(b"\n") < count:
            assert self._process.poll() is None, f"the job ended early:\n{self.output()[-6000:]}"
            assert time.monotonic() < deadline, f"{path} did not get {count} lines:\n{self.output()[-6000:]}"
            time.sleep(0.05)

    def signal_ranks(self, number: signal.Signals) -> None:
        """Send a signal to every rank, as Slurm does to all tasks of a step."""
        ranks = [pid for pid in self._processes() if str(self._script).encode() in _command_line(pid)]
        launcher = self._process.pid
        # A launcher has the script on its command line as well.
        for pid in [pid for pid in ranks if pid != launcher] or [launcher]:
            os.kill(pid, number)

    def kill(self) -> None:
        """Kill every process of a job that has not ended."""
        if self._process.poll() is None:
            for pid in reversed(self._processes()):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self._process.wait()

    def _processes(self) -> list[int]:
        """Return the launcher and all its descendants."""
        found = [self._process.pid]
        for pid in found:
            found += _children(pid)
        return found


@contextmanager
def start(command: Sequence[str], log: Path, env: dict[str, str] | None = None) -> Iterator[Job]:
    """Start a job; it is killed if it still runs at the end of the block."""
    script = next(Path(word) for word in command if word.endswith(".py") and word != str(FAILING))
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **OFFLINE, **(env or {})}
        )
    job = Job(process, script, log)
    try:
        yield job
    finally:
        job.kill()


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    except OSError:
        pass  # The process has ended meanwhile.
    return found


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
