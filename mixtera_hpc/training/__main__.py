"""`python -m mixtera_hpc.training`: the reference trainer as a plain Hydra application, for sweeps with any launcher.

    python -m mixtera_hpc.training data.root=/data …
    python -m mixtera_hpc.training -m hydra/launcher=submitit_slurm dataplane.seed=1,2,3 …

`mixtera-hpc run` and `submit` do the same without Hydra's output folders. Here Hydra's folder of a job remembers the run, so
a job that Slurm requeues continues where it stopped. What Hydra's launcher cannot do: sweep the number of nodes.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hydra

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.config.compose import prepare_application
from mixtera_hpc.config.composition.conf_folders import conf_dir
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError, MixteraError

__all__ = ["main"]

POINTER = "run_folder"
"""File in Hydra's output folder that holds the path of the run's folder."""


@hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")
def main(composed: Any) -> None:
    """One job, on every rank; leaves the process when it fails, so that no launcher takes it for done."""
    from hydra.core.hydra_config import HydraConfig

    from mixtera_hpc.comm.launcher import open_communicator, run_guarded
    from mixtera_hpc.dataplane.control import block_time_limit_signal

    block_time_limit_signal()
    settings = HydraConfig.get()
    output, overrides = Path(settings.runtime.output_dir), list(settings.overrides.task)
    comm = open_communicator(str(composed.dataplane.comm))
    code = run_guarded(comm, lambda: _train(composed, comm, output, overrides))
    if code:
        sys.stdout.flush()
        sys.exit(code)  # Hydra catches exceptions and lets its launchers report success; not this one.


def _train(composed: Any, comm: Communicator, output: Path, overrides: Sequence[str]) -> None:
    from mixtera_hpc.comm.failure_watch import start_failure_watch
    from mixtera_hpc.config.check import check
    from mixtera_hpc.config.compose import from_omegaconf
    from mixtera_hpc.config.convert import from_plain
    from mixtera_hpc.track.progress import ProgressPrinter
    from mixtera_hpc.training.trainer import run_training

    config = from_plain(Config, from_omegaconf(composed))
    check(config)
    folder, attempt = _agreed_attempt(config, comm, output, overrides)
    with start_failure_watch(comm, folder.attempt(attempt)) as watch, _recorded_end(folder, attempt, comm.rank):
        run_training(config, comm, folder, attempt, ProgressPrinter(config.training.num_steps, watch.step))


@contextlib.contextmanager
def _recorded_end(folder: RunFolder, attempt: int, rank: int) -> Iterator[None]:
    """Let rank 0 write down how the attempt ended."""
    from mixtera_hpc.launch.attempts import AttemptEnd, end_attempt

    began, code = time.monotonic(), 1
    try:
        yield
        code = 0
    except MixteraError as error:
        code = error.exit_code
        raise
    finally:
        if rank == 0:
            end_attempt(folder, attempt, AttemptEnd(exit_code=code, elapsed_s=int(time.monotonic() - began)))


def _agreed_attempt(
    config: Config, comm: Communicator, output: Path, overrides: Sequence[str]
) -> tuple[RunFolder, int]:
    """The run's folder and the number of this attempt, made by rank 0. **Collective.**"""
    from mixtera_hpc.comm.communicator import bcast_bytes

    made = _make_attempt(config, comm.size, output, overrides) if comm.rank == 0 else None
    number, _, path = bcast_bytes(comm, made.encode() if made is not None else None).decode().partition(" ")
    return RunFolder(Path(path)), int(number)


def _make_attempt(config: Config, num_ranks: int, output: Path, overrides: Sequence[str]) -> str:
    """`<attempt> <folder>` of a new run, or of the one this job began before it was requeued."""
    from mixtera_hpc.launch.attempts import new_attempt, record_start
    from mixtera_hpc.launch.prepare import prepare_run

    pointer = output / POINTER
    if pointer.is_file():
        folder = RunFolder(Path(pointer.read_text()))
    else:
        folder = prepare_run(config, overrides, datetime.now(UTC))
        pointer.write_text(str(folder.path))
    job_id = os.environ.get("SLURM_JOB_ID")
    attempt = new_attempt(folder, config, kind="slurm" if job_id else "local", ranks=num_ranks)
    if job_id:
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        record_start(folder, attempt, config, job_id=job_id, nodes=nodes, ranks=num_ranks)
    return f"{attempt} {folder.path}"


def _prepare() -> None:
    """Let Hydra find our schema and the user's configs, and report mistakes of the command line as every verb does."""
    try:
        sys.argv[1:] = prepare_application(sys.argv[1:])
    except ConfigError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    _prepare()
    main()
