"""A run to be damaged: its data, and the processes of one attempt."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.testing.small_collection import make_collection

__all__ = ["COMMAND", "REQUEST_S", "Failed", "Job", "Site", "check", "first_started", "num_steps", "send_signal"]

MPIEXEC = Path(sys.executable).with_name("mpiexec")
COMMAND = [sys.executable, "-m", "mixtera_hpc"]
WATCHDOG_S = 5
NAMED_S = WATCHDOG_S + 10
REQUEST_S = 10
"""Longest time that a request to save or to stop may take."""
END_S = 30
"""Longest time that a job may take to end after a kill."""
START_S = 120
ROWS_PER_SHARD = 2
START_TIME_FIELD = 19
"""Index of `starttime` in `/proc/PID/stat`, counted behind the process name (proc(5), field 22)."""
VARIABLE = "MIXTERA_CHAOS"
"""In the environment of all processes of a round."""
SETTINGS = [
    "mixture.max_epochs=null",
    "dataplane.seq_len=32",
    "dataplane.global_batch_size=8",
    "dataplane.chunk_steps=4",
    "dataplane.audit=true",
    f"dataplane.watchdog_s={WATCHDOG_S}",
    "training.num_layers=1",
    "training.num_heads=2",
    "training.embedding_dim=64",
    "training.num_steps=1000000",
    "training.log_every=1",
    "checkpoint.every_steps=5",
    "checkpoint.keep=3",
    "run.name=chaos",
    "run.id=local",
]


class Failed(AssertionError):
    """A promise that was not kept."""


class Site:
    """The data and the run, in one folder."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.ranks = ranks
        self.runs = folder / "runs"
        self.runs.mkdir(parents=True)
        self.can_fill_disk = _mount(self.runs)
        self.run = RunFolder(self.runs / "chaos" / "local")
        self.words = [*_with_small_shards(make_collection(folder / "data", num_rows=4800), folder), *SETTINGS]
        self.shards = sorted((folder / "shards").glob("*.jsonl"))

    def close(self) -> None:
        if self.can_fill_disk:
            subprocess.run(["umount", str(self.runs)], check=False)


class Job:
    """One attempt of the run: mpiexec, its ranks and all that they start."""

    def __init__(self, site: Site, number: int) -> None:
        self.site = site
        self.number = number
        self.mark = f"{os.getpid()}.{number}"
        self._last_attempt = max(site.run.attempts(), default=0)
        self.log_path = site.runs.parent / f"log_{number:03}"
        first = ["run", *site.words, f"run.root={site.runs}"]
        words = ["resume", str(site.run.path)] if site.run.config.exists() else first
        command = [str(MPIEXEC), "-n", str(site.ranks), *COMMAND, *words]
        environment = os.environ | {VARIABLE: self.mark}
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=site.runs.parent
            )

    @property
    def attempt(self) -> int:
        return max(self.site.run.attempts(), default=0)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait(self, condition: Callable[[], Any], limit_s: float, what: str) -> float:
        """Return the seconds until `condition` holds."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > limit_s:
                raise Failed(f"{what}: not within {limit_s:g} s\n{self.log()[-3000:]}")
            time.sleep(0.05)
        return round(time.monotonic() - began, 2)

    def processes(self) -> dict[int, dict[str, str]]:
        """Return the environment of every process of this job that runs."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                raw = (folder / "environ").read_bytes()
                if f"{VARIABLE}={self.mark}".encode() in raw and _is_alive(folder):
                    entries = (entry.partition("=") for entry in raw.decode(errors="replace").split("\0"))
                    found[int(folder.name)] = {name: value for name, _, value in entries}
        return found

    def rank_pid(self, rank: int) -> int:
        return first_started(pid for pid, facts in self.processes().items() if facts.get("PMI_RANK") == str(rank))

    def wait_until_it_trains(self, num_steps: int) -> None:
        """Wait until this attempt has finished `num_steps` steps."""

        def has_trained() -> bool:
            if self.process.poll() is not None:
                raise Failed(f"the attempt ended with {self.process.returncode}\n{self.log()[-3000:]}")
            is_started = self.attempt > self._last_attempt
            return is_started and _num_lines(self.site.run, self.attempt) >= num_steps

        self.wait(has_trained, START_S, "training")

    def wait_for_end(self, limit_s: float = END_S) -> float:
        """Return the seconds until no process of the job runs any more."""
        return self.wait(lambda: self.process.poll() is not None and not self.processes(), limit_s, "the end")

    def wait_until_named(self) -> tuple[dict[str, Any], float]:
        """Return what the watchdog has written, and the seconds until then."""
        path = self.site.run.stall_report(self.attempt)
        seconds = self.wait(path.exists, NAMED_S, "naming the rank at fault")
        return json.loads(path.read_text()), seconds

    def kill(self) -> None:
        send_signal(self.processes(), signal.SIGKILL)
        self.process.wait()


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Failed(otherwise)


def first_started(pids: Iterable[int]) -> int:
    """Return the process that began first. A parent may have a larger id than its children: ids begin again."""
    return min(pids, key=_start_ticks)


def _start_ticks(pid: int) -> tuple[float, int]:
    """Return when a process began, in clock ticks since boot; a process that has ended comes last."""
    try:
        behind_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("inf"), pid
    return float(behind_name[START_TIME_FIELD]), pid


def send_signal(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to processes, some of which may have ended."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, number)


def num_steps(run: RunFolder) -> int:
    """Return one past the last step in the metrics."""
    lines = run.metric("steps").read_bytes().rpartition(b"\n")[0].splitlines()
    return int(json.loads(lines[-1])["step"]) + 1


def _mount(folder: Path) -> bool:
    """Give the runs a file system of their own, which can be filled; return whether this user may."""
    command = ["mount", "-t", "tmpfs", "-o", "size=256m", "none", str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


def _with_small_shards(words: list[str], folder: Path) -> list[str]:
    """Copy rows to many shards, so that at any time most of them are not open; return the changed overrides."""
    root = folder / "shards"
    root.mkdir()
    data = Path(next(word.partition("=")[2] for word in words if word.startswith("data.root=")))
    lines = (data / "a.jsonl").read_bytes().splitlines(keepends=True)
    for first in range(0, len(lines), ROWS_PER_SHARD):
        (root / f"{first:04}.jsonl").write_bytes(b"".join(lines[first : first + ROWS_PER_SHARD]))
    changed = {"data.root": root, "index.path": folder / "shards.h5"}
    words = [word for word in words if word.partition("=")[0] not in changed]
    words += [f"{key}={value}" for key, value in changed.items()]
    build_index(compose(words))
    return words


def _num_lines(run: RunFolder, attempt: int) -> int:
    """Return for how many steps an attempt has written metrics."""
    path = run.metric("steps")
    return path.read_bytes().count(f'"attempt":{attempt},'.encode()) if path.exists() else 0


def _is_alive(folder: Path) -> bool:
    return (folder / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
