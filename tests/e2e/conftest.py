"""Fixtures that run commands as a user types them."""

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtera_hpc.cli.main import main

MPIEXEC = Path(sys.executable).with_name("mpiexec")
COMMAND = [sys.executable, "-m", "mixtera_hpc"]

Cli = Callable[..., subprocess.CompletedProcess[str]]


def only_run(root: Path) -> Path:
    """Return the folder of the only run of name `small` below `root`."""
    [folder] = (root / "small").iterdir()
    return folder


@pytest.fixture(scope="session")
def cli(verb: Cli) -> Cli:
    """Return a function that runs `mixtera-hpc` and checks its exit code; several `ranks` run under mpiexec.

    Whatever trains runs in processes of its own. The other verbs need none: their code is the same in this process.
    """

    def call(
        *words: object, ranks: int = 1, cwd: Path | None = None, rc: int | None = 0
    ) -> subprocess.CompletedProcess[str]:
        trains = words[0] == "run" or (words[0] == "resume" and rc != 2)
        if ranks == 1 and not trains and rc is not None:
            return verb(*words, cwd=cwd, rc=rc)
        prefix = [str(MPIEXEC), "-n", str(ranks)] if ranks > 1 else []
        command = [*prefix, *COMMAND, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=900)
        if rc is not None:
            assert done.returncode == rc, f"{done.returncode}: {' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done

    return call


@pytest.fixture(scope="session")
def verb() -> Cli:
    """Return a function that does what `cli` does, in this process: for one verb with many inputs."""

    def call(*words: object, cwd: Path | None = None, rc: int = 0) -> subprocess.CompletedProcess[str]:
        command = list(map(str, words))
        folder = contextlib.chdir(cwd) if cwd else contextlib.nullcontext()
        out = io.StringIO()
        err = io.StringIO()
        with folder, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(command)
        assert code == rc, f"{code}: {' '.join(command)}\n{out.getvalue()}\n{err.getvalue()}"
        return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session")
def small(collection: list[str]) -> list[str]:
    """Return the overrides of a run that trains in seconds, with a dynamic mixture."""
    return [
        *(o for o in collection if not o.startswith("mixture.group_by")),
        "mixture=ado",
        "mixture.group_by=[source]",
        "mixture.algorithm.warmup=4",
        "mixture.algorithm.refit_interval=4",
        "dataplane.seq_len=32",
        "dataplane.global_batch_size=12",
        "dataplane.chunk_steps=2",
        "dataplane.audit=true",
        "training.num_layers=1",
        "training.num_heads=2",
        "training.embedding_dim=16",
        "training.num_steps=24",
        "run.name=small",
    ]
