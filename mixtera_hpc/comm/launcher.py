"""Choose the communicator of this process, and turn the failure of one rank into the end of the job.

The worst failure of a job is silent: N processes that do not see each other, each training on the whole global batch.
So the number of ranks of every communicator is compared with what the innermost launcher started.
"""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.comm.launch_environment import UNKNOWN_LAUNCHER, Launcher, find_launcher
from mixtera_hpc.comm.mpi import Mpi
from mixtera_hpc.errors import (
    LaunchError,
    MixteraError,
    SavedAndStopped,
    exit_code_of,
    is_clean_exit,
    missing_package,
)

__all__ = [
    "check_world_size",
    "communicator_of",
    "end_job",
    "mark_saved",
    "open_communicator",
    "run_guarded",
    "started_by_launcher",
    "wait_for_other_reports",
]

REPORT_GRACE_S = 2.0
"""Seconds for which a rank that refuses to run waits before it exits. torchrun ends the other ranks as soon as one has
exited, but each of them should report why it refuses."""


def started_by_launcher() -> bool:
    """Return True if a launcher, but not srun with one task, started this process. Imports no MPI, no torch."""
    launcher = find_launcher()
    return launcher is not None and (launcher.name != "srun" or launcher.size != 1)


def open_communicator(kind: str = "auto", *, subset: bool = False, creates_group: bool = False) -> Communicator:
    """Open the communicator of all ranks of the job. **Collective.**

    Args:
        kind: `local`, `mpi`, `torch`, or `auto`, which takes torch's process group if it is initialised, else MPI if an
            MPI launcher started several processes, else this process alone.
        subset: accept fewer ranks than the launcher started.
        creates_group: create the process group if the launcher needs one and there is none. For our own programs: the
            process group of a user's program belongs to the trainer, which chooses its backend.

    Raises:
        LaunchError: the ranks of the job would not see each other, or torch's process group does not exist yet.
        UserError: mpi4py is not installed, but needed.
    """
    launcher = find_launcher()
    comm = _choose_communicator(kind, launcher, creates_group)
    check_world_size(comm, subset)
    return comm


def communicator_of(comm: Any, kind: str, *, subset: bool = False) -> Communicator:
    """Return a communicator for the caller to free, over the ranks of `comm`. **Collective.**

    Args:
        comm: a `Communicator`, an mpi4py communicator, a torch process group, or None to use `open_communicator`.
        kind: `dataplane.comm`, for None.
        subset: accept fewer ranks than the launcher started.

    Raises:
        LaunchError: the ranks of the job would not see each other.
        TypeError: `comm` is something else.
    """
    if comm is None:
        return open_communicator(kind, subset=subset)
    if isinstance(comm, Communicator):
        check_world_size(comm, subset)
        return comm.Dup()
    if type(comm).__module__.startswith("torch"):
        own = _torch_communicator(comm)
    elif hasattr(comm, "Split_type"):
        own = Mpi(comm)
    else:
        raise TypeError(
            f"comm is {comm!r}, but must be None, a Communicator, an mpi4py communicator, or a torch process group "
            "that this rank belongs to."
        )
    check_world_size(own, subset)
    return own


def check_world_size(comm: Communicator, subset: bool = False) -> None:
    """Refuse a communicator with fewer ranks than the innermost launcher started.

    More ranks are accepted: programs may start processes themselves (Lightning, `torch.multiprocessing`).

    Raises:
        LaunchError: names both numbers and the cure.
    """
    launcher = find_launcher()
    if subset or launcher is None or launcher.size is None or comm.size >= launcher.size:
        return
    raise LaunchError(
        f"{launcher.name} started {launcher.size} processes, but the data plane sees {comm.size}. Processes that do "
        f"not see each other would each train on the whole global batch.\n  {_cure(comm, launcher)}\n"
        "  If only some of the processes load data, open the data plane with DataPlane.open(subset=True)."
    )


def _cure(comm: Communicator, launcher: Launcher) -> str:
    """Return what to do so that the data plane sees all processes of `launcher`."""
    if launcher.needs_process_group and isinstance(comm, (Local, Mpi)):
        change = "Set dataplane.comm=auto" if isinstance(comm, Local) else "Give DataPlane.open no MPI communicator"
        return f"{change}, and call init_process_group (or create the Accelerator) before you open the data plane."
    if isinstance(comm, Mpi) and comm.world_size == launcher.size:
        return "Give DataPlane.open MPI.COMM_WORLD, or no comm."
    if isinstance(comm, Mpi):
        return (
            "The launcher does not support this MPI library. Under Slurm choose the right srun --mpi (cluster.mpi=pmi2 "
            "for MPICH, pmix for Open MPI); elsewhere use the mpiexec that belongs to this MPI library."
        )
    if isinstance(comm, Local):
        return f"Set dataplane.comm=auto, or start one process without {launcher.name}."
    return f"Give DataPlane.open a process group of all {launcher.size} processes, or none to take the default group."


def _choose_communicator(kind: str, launcher: Launcher | None, creates_group: bool) -> Communicator:
    """Open the communicator for `kind`. **Collective.**"""
    needs_group = launcher is not None and launcher.needs_process_group
    if kind == "local":
        return Local()
    if kind == "mpi":
        return _mpi_communicator(launcher)
    if launcher is not None and needs_group and not creates_group and not _torch_is_initialised():
        raise _no_group_error(launcher)
    if kind == "torch" or needs_group or _torch_is_initialised():
        return _torch_communicator(None, creates_group=creates_group and needs_group)

    # One process needs no MPI, and a laptop may have none.
    if launcher is not None and launcher.size != 1:
        return _mpi_communicator(launcher)
    return Local()


def _no_group_error(launcher: Launcher) -> LaunchError:
    """Return the error for a process that is not in a torch process group, although its launcher needs one."""
    name = launcher.name
    cure = "Call init_process_group (or create the Accelerator) first, then open the data plane."
    if name == UNKNOWN_LAUNCHER:
        name += f" (RANK, WORLD_SIZE={launcher.size} and MASTER_ADDR are set)"
        cure += "\n  If this process is alone, unset WORLD_SIZE."
    return LaunchError(f"{name} started this process, but there is no torch process group yet.\n  {cure}")


def _mpi_communicator(launcher: Launcher | None) -> Mpi:
    # MPI would start with the variables of an outer mpiexec or srun, and crash in their process manager.
    if launcher is not None and launcher.name == "torchrun":
        raise LaunchError(
            "dataplane.comm is mpi, but torchrun started this process, and torchrun's processes cannot use MPI.\n"
            "  Set dataplane.comm=auto or dataplane.comm=torch, or start the program with mpiexec or srun."
        )
    try:
        return Mpi.world()
    except ModuleNotFoundError as error:
        raise missing_package(error) or error from None


def _torch_communicator(group: Any, *, creates_group: bool = False) -> Communicator:
    """Open a communicator beside a torch process group; None: the default group. **Collective.**"""
    try:
        # Imported here because torch takes seconds, and most commands do not need it.
        from mixtera_hpc.comm.torch_distributed import TorchDistributed, create_process_group
    except ModuleNotFoundError as error:
        raise missing_package(error) or error from None

    creates_group = creates_group and not _torch_is_initialised()
    if creates_group:
        create_process_group()
    return TorchDistributed(group, owns_process_group=creates_group)


def _torch_is_initialised() -> bool:
    """Return True if this process has a torch process group. Does not import torch."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def wait_for_other_reports() -> None:
    """Under torchrun or DeepSpeed, give the other ranks time to report the same refusal before this process exits."""
    launcher = find_launcher()
    if launcher is not None and launcher.needs_process_group and launcher.started_several:
        with contextlib.suppress(ValueError):  # Only the main thread can do that.
            # Otherwise the rank that exits first would replace the exit code of the others.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(REPORT_GRACE_S)


def end_job(comm: Communicator | None, error: BaseException) -> None:
    """Name this rank and its failure and end all ranks; return if the job has one process, or `error` is a clean exit.

    For programs without `run_guarded`: under plain mpiexec the other ranks would wait for ever for a rank that leaves
    with an exception.

    Args:
        comm: of the ranks to end; None if it could not be opened.
        error: why this rank ends.

    Raises:
        SystemExit: instead of `error`, if this process sees no other rank; has the exit code of `error`.
    """
    launcher = find_launcher()
    several = (comm is not None and comm.size > 1) or (launcher is not None and launcher.started_several)
    if not several or is_clean_exit(error):
        return
    code = _report_failure(Local() if comm is None else comm, error)
    if comm is None or comm.size == 1:
        wait_for_other_reports()
        raise SystemExit(code)
    comm.Abort(code)


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
        return 0 if mark_saved(comm) else stop.exit_code
    except BaseException as error:
        code = _report_failure(comm, error)
        if comm.size > 1:
            comm.Abort(code)
        return code
    return 0


def mark_saved(comm: Communicator) -> bool:
    """Tell the batch script that the state is saved and the run continues; return False if no script asks for that.

    With `srun --kill-on-bad-exit` the first rank that exits with 75 would get the ranks killed that are still exiting,
    and the job would end with their exit code. So a script sets `MIXTERA_SAVED_FILE`. If the ranks exit with 0 and the
    file exists, the script exits with 75.
    """
    saved_file = os.environ.get("MIXTERA_SAVED_FILE")
    if saved_file is not None and comm.rank == 0:
        Path(saved_file).touch()
    return saved_file is not None


def _report_failure(comm: Communicator, error: BaseException) -> int:
    """Write why this rank failed, and return its exit code."""
    where = _name_of_rank(comm)
    code = exit_code_of(error)
    if isinstance(error, MixteraError):
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        _write_last_words(f"{where}{type(error).__name__}: {error}{notes}")
    elif isinstance(error, KeyboardInterrupt):
        _write_last_words(f"{where}interrupted")
    elif isinstance(error, SystemExit):
        _write_last_words(f"{where}{error.code if isinstance(error.code, str) else f'exits with code {code}'}")
    else:
        _write_last_words(f"{where}failed:\n{''.join(traceback.format_exception(error))}")
    return code


def _name_of_rank(comm: Communicator) -> str:
    """Return the start of a message, which names this rank; nothing in a job of one process."""
    if comm.size > 1:
        return f"[rank {comm.rank} on {comm.hostname}] "
    launcher = find_launcher()
    if launcher is not None and launcher.started_several:
        return f"[rank {launcher.rank} on {comm.hostname}] "
    return ""


def _write_last_words(text: str) -> None:
    """Write to stderr and not to a logger: the process ends now, whether or not a handler is configured."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
