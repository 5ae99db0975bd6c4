"""`mixtera-hpc run`: train here, in one process or as every rank of an mpiexec or srun.

Without a folder rank 0 makes one; with `--folder` this is an attempt of a prepared run, as batch scripts start it.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from mixtera_hpc.comm.communicator import Communicator
    from mixtera_hpc.config.run_folder import RunFolder
    from mixtera_hpc.config.schema import Config
    from mixtera_hpc.launch.resume import ResumeRequest

    Prepare = Callable[[int], tuple[RunFolder, int]]
    """Number of ranks → the run's folder and the number of this attempt; rank 0 calls it."""

__all__ = ["arguments", "run", "run_folder", "take_over"]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. experiment=demo dataplane.seed=3")
    parser.add_argument("--folder", type=Path, help="a prepared run folder, instead of overrides")
    parser.add_argument("--attempt", type=int, help="number of the attempt that was made for this job")


def run(args: argparse.Namespace) -> int:
    from mixtera_hpc.config.run_folder import RunFolder
    from mixtera_hpc.dataplane.control import block_time_limit_signal
    from mixtera_hpc.errors import ConfigError, MixteraError

    block_time_limit_signal()
    try:
        if args.folder is None and args.attempt is not None:
            raise ConfigError("--attempt is the number of an attempt of a prepared run; give its --folder as well.")
        if args.folder is None:
            return _run_new(args.overrides)
        if args.overrides:
            raise ConfigError(
                "run takes a folder or overrides. To change a run, use mixtera-hpc resume RUN [overrides]."
            )
        return run_folder(RunFolder(args.folder.absolute()), attempt=args.attempt)
    except MixteraError as error:
        if _speaks():
            raise
        return error.exit_code


def run_folder(
    folder: "RunFolder",
    overrides: Sequence[str] = (),
    attempt: int | None = None,
    change: "ResumeRequest | None" = None,
) -> int:
    """Continue the run in `folder`; every rank calls this. Returns the exit code. **Collective.**"""
    from mixtera_hpc.dataplane.reading.batches import BatchSlice
    from mixtera_hpc.launch.attempts import new_attempt
    from mixtera_hpc.launch.resume import NO_EDITS, amended_config, check_ended

    change = change or NO_EDITS
    config = amended_config(folder, overrides, change)

    def prepare(ranks: int) -> "tuple[RunFolder, int]":
        if attempt is not None:
            return folder, attempt
        newest = check_ended(folder)
        BatchSlice.of(config.dataplane, 0, ranks)  # What these ranks cannot share is refused before it is recorded.
        take_over(folder, config, overrides, change)
        return folder, new_attempt(folder, config, ranks=ranks, after=newest)

    return _guarded(config, prepare)


def take_over(folder: "RunFolder", config: "Config", overrides: Sequence[str], change: "ResumeRequest") -> None:
    """Record what the attempts to come run with, and the surgery that leads there; one process does it."""
    from mixtera_hpc.cli.surgery import operate
    from mixtera_hpc.config.compose import load_config
    from mixtera_hpc.launch.resume import record_config as record

    operate(folder, load_config(folder.config), config, change)
    record(folder, config, overrides)


def _run_new(overrides: Sequence[str]) -> int:
    from datetime import UTC, datetime

    from mixtera_hpc.config.compose import compose
    from mixtera_hpc.launch.attempts import new_attempt
    from mixtera_hpc.launch.prepare import prepare_run

    config = compose(overrides)

    def prepare(ranks: int) -> "tuple[RunFolder, int]":
        folder = prepare_run(config, overrides, datetime.now(UTC))
        return folder, new_attempt(folder, config, ranks=ranks)

    return _guarded(config, prepare)


def _guarded(config: "Config", prepare: "Prepare") -> int:
    from mixtera_hpc.comm.launcher import open_communicator, run_guarded

    comm = open_communicator(config.dataplane.comm)
    began = time.monotonic()
    places: list[tuple[RunFolder, int]] = []
    code = run_guarded(comm, lambda: _train(comm, prepare, places))
    if comm.rank == 0 and places:
        _tell_end(*places[0], code, time.monotonic() - began)
    return code


def _train(comm: "Communicator", prepare: "Prepare", places: "list[tuple[RunFolder, int]]") -> None:
    from mixtera_hpc.comm.communicator import bcast_bytes
    from mixtera_hpc.comm.failure_watch import start_failure_watch
    from mixtera_hpc.config.compose import load_config
    from mixtera_hpc.config.run_folder import RunFolder
    from mixtera_hpc.track.progress import ProgressPrinter
    from mixtera_hpc.training.trainer import run_training

    prepared = prepare(comm.size) if comm.rank == 0 else None
    said = f"{prepared[1]} {prepared[0].path}".encode() if prepared else None
    number, _, path = bcast_bytes(comm, said).decode().partition(" ")
    folder, attempt = RunFolder(Path(path)), int(number)
    places.append((folder, attempt))
    config = load_config(folder.config)
    with start_failure_watch(comm, folder.attempt(attempt)) as watch:
        run_training(config, comm, folder, attempt, ProgressPrinter(config.training.num_steps, watch.step))


def _tell_end(folder: "RunFolder", attempt: int, code: int, elapsed_s: float) -> None:
    """Record how a local attempt ended; a batch script does that for its own."""
    from mixtera_hpc.launch.attempts import AttemptEnd, end_attempt

    if "MIXTERA_RUN_FOLDER" not in os.environ:
        end_attempt(folder, attempt, AttemptEnd(exit_code=code, elapsed_s=int(elapsed_s)))


def _speaks() -> bool:
    """One of the ranks that fail alike is enough."""
    return all(os.environ.get(name, "0") == "0" for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"))
