"""Run the systems of a section in interleaved rounds, each in its own process. A system that fails leaves the table."""

import contextlib
import json
import os
import select
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bench._peers.environments import Missing, interpreter
from bench._peers.systems import Section, System
from bench._peers.workload import Workload
from bench._results import OUT

__all__ = ["Measured", "Rounds", "measure"]

ROOT = Path(__file__).resolve().parents[2]
LOGS = OUT / "peers" / "logs"
TEMPORARY = OUT / "peers" / "tmp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """The number and the length of the rounds."""

    count: int
    """Rounds that count; one more before them warms up."""
    cpu_s: float
    """CPU time of a round."""
    open_limit_s: float
    """Longest time until the first batch, in which peers may convert the corpus."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The result of one system; either `rates` or `reason` is empty."""

    name: str
    order: str
    rates: list[float]
    """Items per CPU second in every round."""
    cpu_s: float = 0.0
    """CPU seconds of all these rounds."""
    first_batch_s: float = 0.0
    reason: str = ""
    """Why it was not run."""


class _Failed(Exception):
    """The process of a system ended, or did not answer in time."""


class _Process:
    """A running system; see `process.py`."""

    def __init__(self, system: System, section: Section, work: Workload) -> None:
        self.system = system
        self.results: list[dict[str, Any]] = []
        self.first_batch_s = 0.0
        python = interpreter(system.environment)
        self._log = LOGS / f"{section.key}-{system.name.replace(' ', '-').replace(',', '')}.log"
        arguments = [system.call, json.dumps(dict(system.options)), work.to_json()]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, "-m", "bench._peers.process", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env=os.environ | _variables(),
                start_new_session=True,  # Its children end with it.
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def answer(self, limit_s: float) -> dict[str, Any]:
        """Return the next result of the process.

        Raises:
            _Failed: there is none.
        """
        output = self._process.stdout
        assert output is not None
        readable, _, _ = select.select([output], [], [], limit_s)
        line = output.readline() if readable else b""
        if line:
            result: dict[str, Any] = json.loads(line)
            return result
        if not readable:
            raise _Failed(f"no answer in {limit_s:.0f} s")
        # The last line that is not indented has the type of the exception.
        lines = self._log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if line.strip() and not line.startswith(" ")]
        raise _Failed(errors[-1][:200] if errors else "the process ended")

    def ask(self, cpu_s: float) -> None:
        """Start a round."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # Then there is no answer, which says more.
            self._process.stdin.write(f"{cpu_s}\n".encode())
            self._process.stdin.flush()


def _variables() -> dict[str, str]:
    """Return environment variables: nothing is downloaded, and libraries start no threads for computing."""
    folder = str(TEMPORARY)
    return {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": folder,
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        # LitData empties folders below TMPDIR.
        "TMPDIR": folder,
        "DATA_OPTIMIZER_CACHE_FOLDER": f"{folder}/litdata-chunks",
        "DATA_OPTIMIZER_DATA_CACHE_FOLDER": f"{folder}/litdata-data",
    }


def measure(section: Section, work: Workload, rounds: Rounds) -> list[Measured]:
    """Measure all systems of a section."""
    LOGS.mkdir(parents=True, exist_ok=True)
    TEMPORARY.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        measured: dict[str, Measured] = {}
        processes: list[_Process] = []
        for system in section.systems:
            try:
                process = stack.enter_context(_Process(system, section, work))
                processes.append(process)
                process.first_batch_s = process.answer(rounds.open_limit_s)["first_batch_s"]
            except (Missing, _Failed) as error:
                measured[system.name] = Measured(name=system.name, order=system.order, rates=[], reason=str(error))
                print(f"  {system.name}: not run: {error}", flush=True)
        for _ in range(rounds.count + 1):
            for process in processes:
                if process.system.name not in measured:
                    _run_round(process, rounds, measured)
        for process in processes:
            if process.system.name not in measured:
                measured[process.system.name] = _summary(process)
    return [measured[system.name] for system in section.systems]


def _run_round(process: _Process, rounds: Rounds, measured: dict[str, Measured]) -> None:
    process.ask(rounds.cpu_s)
    try:
        process.results.append(process.answer(60 + 20 * rounds.cpu_s))
    except _Failed as error:
        system = process.system
        measured[system.name] = Measured(name=system.name, order=system.order, rates=[], reason=str(error))
        print(f"  {system.name}: not run: {error}", flush=True)


def _summary(process: _Process) -> Measured:
    counted = process.results[1:]
    return Measured(
        name=process.system.name,
        order=process.system.order,
        rates=[result["count"] / result["cpu_s"] for result in counted],
        cpu_s=sum(result["cpu_s"] for result in counted),
        first_batch_s=process.first_batch_s,
    )
