"""Run one attempt of a run: agree on its folder over all ranks, watch the ranks, train, and record how it ended.

`mixtera-hpc run`, `mixtera-hpc resume` and `python -m mixtera_hpc.training` differ in how rank 0 prepares the attempt;
all of them run it here. This module stands above `launch` (the files of attempts) and `comm`, and below `cli`.
Price: one broadcast of the run folder's path.
"""

import contextlib
import faulthandler
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mixtera_hpc.comm.communicator import Communicator, bcast_bytes
from mixtera_hpc.comm.failure_watch import start_failure_watch
from mixtera_hpc.comm.launcher import open_communicator, run_guarded, wait_for_other_reports
from mixtera_hpc.config.compose import load_config
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError, MixteraError, SavedAndStopped, exit_code_of, require_package
from mixtera_hpc.launch.attempts import ExitRecord, batch_script_attempt, end_attempt
from mixtera_hpc.launch.claim import Claim
from mixtera_hpc.track.progress import ProgressPrinter

__all__ = ["Attempt", "PrepareAttempt", "check_trained_here", "run_attempt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt of a run. The run folder holds its configuration."""

    folder: RunFolder
    number: int


PrepareAttempt = Callable[[int], Attempt]
"""Called on rank 0 with the number of ranks: make the run folder or find it, and claim the attempt."""


def check_trained_here(config: Config) -> None:
    """Refuse a run of another program than the reference trainer.

    Raises:
        ConfigError: There is a `job.command`.
    """
    if config.job.command:
        raise ConfigError(
            f"job.command={config.job.command} names the program of this run, but this command trains with the "
            "reference trainer.\n  Use mixtera-hpc submit, or mixtera-hpc sweep --local, which start the program. For "
            "the reference trainer, set job.command=null."
        )


def run_attempt(comm_kind: str, prepare: PrepareAttempt) -> int:
    """Prepare an attempt on rank 0, train it on all ranks, and return the process's exit code. **Collective.**

    Args:
        comm_kind: `dataplane.comm`.
        prepare: What rank 0 does first. If it raises, all ranks end.
    """
    require_package("torch")  # Refused here, before a run folder exists.
    if sys.__stderr__ is not None:
        # A fatal signal then leaves the stack in the log: SIGBUS ends a rank that reads a file which was truncated.
        faulthandler.enable(sys.__stderr__)
    try:
        comm = open_communicator(comm_kind, creates_group=True)
    except MixteraError:
        wait_for_other_reports()
        raise
    code = run_guarded(comm, lambda: _train(comm, prepare))
    if code in (0, SavedAndStopped.exit_code):
        # Every rank is here. torchrun ends the others once one has exited with 75; rank 0 has recorded its end by now.
        comm.Barrier()
        comm.Free()
    return code


def _train(comm: Communicator, prepare: PrepareAttempt) -> None:
    """Agree on the attempt, then train it. **Collective.**"""
    attempt = _broadcast_attempt(comm, prepare(comm.size) if comm.rank == 0 else None)
    with _recorded_end(attempt, comm.rank):
        # Imported here because torch takes seconds, and `--help` and a refused attempt do not need it.
        from mixtera_hpc.training.trainer import run_training

        config = load_config(attempt.folder.config)
        failure_file = attempt.folder.failure(attempt.number)
        with start_failure_watch(comm, failure_file, heartbeat_s=config.job.heartbeat_s) as watch:
            printer = ProgressPrinter(config.training.num_steps, watch.step)
            run_training(config, comm, attempt.folder, attempt.number, printer)


def _broadcast_attempt(comm: Communicator, attempt: Attempt | None) -> Attempt:
    """Return rank 0's attempt on every rank. **Collective.**"""
    message = f"{attempt.number} {attempt.folder.path}".encode() if attempt is not None else None
    number, _, path = bcast_bytes(comm, message).decode().partition(" ")
    return Attempt(folder=RunFolder(Path(path)), number=int(number))


@contextlib.contextmanager
def _recorded_end(attempt: Attempt, rank: int) -> Iterator[None]:
    """Let rank 0 claim the attempt and record how it ended, unless the surrounding batch script does that."""
    if rank or batch_script_attempt(attempt.folder) is not None:
        yield
        return
    started = time.monotonic()
    exit_code = 0
    with contextlib.closing(Claim(attempt.folder, attempt.number)):
        try:
            yield
        except BaseException as error:
            exit_code = exit_code_of(error)
            raise
        finally:
            end = ExitRecord(exit_code=exit_code, elapsed_s=int(time.monotonic() - started))
            end_attempt(attempt.folder, attempt.number, end)
