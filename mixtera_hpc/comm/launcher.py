"""Choose the communicator of this process, and turn the failure of one rank into the end of the job."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.errors import MixteraError, SavedAndStopped, exit_code_of, missing_package

__all__ = ["open_communicator", "run_guarded", "started_by_mpi"]


def started_by_mpi() -> bool:
    """Return True if mpiexec, or srun with several tasks, started this process. Does not import MPI."""
    env = os.environ
    if "PMI_RANK" in env or "OMPI_COMM_WORLD_RANK" in env or "PMIX_RANK" in env:
        return True
    num_tasks = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
    return "SLURM_PROCID" in env and num_tasks > 1


def open_communicator(kind: str = "auto") -> Communicator:
    """Open the communicator of all ranks of the job. **Collective.**

    Args:
        kind: `local`, `mpi`, or `auto`, which takes MPI if an MPI launcher started this process.

    Raises:
        CommError: MPI sees another number of ranks than the launcher started.
    """
    if kind == "local" or (kind == "auto" and not started_by_mpi()):
        return Local()

    # Importing mpi4py starts MPI, which a single process does not need and may not have.
    from mixtera_hpc.comm.mpi import Mpi

    try:
        return Mpi.world()
    except ModuleNotFoundError as error:
        raise missing_package(error) or error from None


def run_guarded(comm: Communicator, body: Callable[[], None]) -> int:
    """Run `body` and return the exit code of the process. If one rank fails, name it and end all ranks.

    An agreed stop (`SavedAndStopped`) is not a failure: every rank exits by itself. After any other exception the other
    ranks may be blocked in a collective, so the job is aborted at once.
    """
    try:
        body()
    except SavedAndStopped as stop:
        if comm.rank == 0:
            _write_last_words(f"{stop}")
        return _exit_code_when_saved(comm, stop.exit_code)
    except BaseException as error:
        code = _report_failure(comm, error)
        if comm.size > 1:
            comm.Abort(code)
        return code
    return 0


def _exit_code_when_saved(comm: Communicator, code: int) -> int:
    """Return `code`; in a batch script that sets `MIXTERA_SAVED_FILE`, create that file and return 0.

    With `srun --kill-on-bad-exit` the first rank that exits with 75 would get the ranks killed that are still exiting,
    and the job would end with their exit code. The script turns the file back into 75.
    """
    saved_file = os.environ.get("MIXTERA_SAVED_FILE")
    if saved_file is None:
        return code
    if comm.rank == 0:
        Path(saved_file).touch()
    return 0


def _report_failure(comm: Communicator, error: BaseException) -> int:
    """Write why this rank failed, and return its exit code."""
    where = f"[rank {comm.rank} on {comm.hostname}] " if comm.size > 1 else ""
    if isinstance(error, MixteraError):
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        _write_last_words(f"{where}{type(error).__name__}: {error}{notes}")
    elif isinstance(error, KeyboardInterrupt):
        _write_last_words(f"{where}interrupted")
    elif not isinstance(error, SystemExit):
        _write_last_words(f"{where}failed:\n{traceback.format_exc()}")
    return exit_code_of(error)


def _write_last_words(text: str) -> None:
    """Write to stderr and not to a logger: the process ends now, whether or not a handler is configured."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
