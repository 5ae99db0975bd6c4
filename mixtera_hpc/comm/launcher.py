"""Which communicator this process should use, and what happens when a rank fails."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.errors import MixteraError, SavedAndStopped, exit_code_of

__all__ = ["open_communicator", "run_guarded", "started_by_mpi"]


def started_by_mpi() -> bool:
    """Whether an MPI launcher (mpiexec, srun with several tasks) started this process. Imports nothing."""
    env = os.environ
    if "PMI_RANK" in env or "OMPI_COMM_WORLD_RANK" in env or "PMIX_RANK" in env:
        return True
    return "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))) > 1


def open_communicator(kind: str = "auto") -> Communicator:
    """`local`, `mpi`, or with `auto` whichever fits how this process was started. **Collective.**"""
    if kind == "local" or (kind == "auto" and not started_by_mpi()):
        return Local()
    from mixtera_hpc.comm.mpi import Mpi

    return Mpi.world()


def run_guarded(comm: Communicator, body: Callable[[], None]) -> int:
    """Run `body` and return the process's exit code; a failure of one rank ends all of them, and says which it was.

    An agreed stop (`SavedAndStopped`) is no failure: every rank leaves with 75 by itself. Any other exception while others
    may sit in a collective would hang them, so the job is aborted at once.
    """
    try:
        body()
    except SavedAndStopped as stop:
        if comm.rank == 0:
            _say(f"{stop}")
        return _leave_saved(comm, stop.exit_code)
    except BaseException as error:
        code = _report(comm, error)
        if comm.size > 1:
            comm.Abort(code)
        return code
    return 0


def _leave_saved(comm: Communicator, code: int) -> int:
    """Exit code of a saved rank: `code`, or in a batch script that named a file for it, that file and 0.

    Under `srun --kill-on-bad-exit` the first rank to leave with 75 gets those still on their way out killed, and the job
    their code instead. The script turns the file back into 75.
    """
    saved = os.environ.get("MIXTERA_SAVED_FILE")
    if saved is None:
        return code
    if comm.rank == 0:
        Path(saved).touch()
    return 0


def _report(comm: Communicator, error: BaseException) -> int:
    where = f"[rank {comm.rank} on {comm.hostname}] " if comm.size > 1 else ""
    notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
    if isinstance(error, MixteraError):
        _say(f"{where}{type(error).__name__}: {error}{notes}")
    elif isinstance(error, KeyboardInterrupt):
        _say(f"{where}interrupted")
    elif not isinstance(error, SystemExit):
        _say(f"{where}failed:\n{traceback.format_exc()}")
    return exit_code_of(error)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
