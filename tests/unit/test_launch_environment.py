"""The innermost launcher of a process, from its environment alone."""

import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.comm.launch_environment import UNKNOWN_LAUNCHER, find_launcher
from mixtera_hpc.comm.launcher import check_world_size, open_communicator
from mixtera_hpc.errors import LaunchError

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "8"}
DEEPSPEED = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "1"}
SRUN = {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}
SALLOC = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4"}
BATCH_SCRIPT = {**SALLOC, "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967291", "SLURM_STEP_NUM_TASKS": "4"}
INTERACTIVE_STEP = {**BATCH_SCRIPT, "SLURM_STEP_ID": "4294967290"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (TORCHRUN, ("torchrun", 3, 8)),
        (MPICH, ("mpiexec", 1, 2)),
        (OPEN_MPI, ("mpiexec", 1, 2)),
        (SRUN, ("srun", 2, 4)),
        ({**SRUN, "PMIX_RANK": "2"}, ("srun", 2, 4)),
        ({**SRUN, **MPICH}, ("mpiexec", 1, 2)),
        ({**SRUN, **MPICH, **TORCHRUN}, ("torchrun", 3, 8)),
        ({"PMI_RANK": "0"}, ("mpiexec", 0, None)),
        (SALLOC, None),
        (BATCH_SCRIPT, None),
        (INTERACTIVE_STEP, None),
        (DEEPSPEED, (UNKNOWN_LAUNCHER, 3, 8)),
        ({**BATCH_SCRIPT, **DEEPSPEED}, (UNKNOWN_LAUNCHER, 3, 8)),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", **DEEPSPEED}, (UNKNOWN_LAUNCHER, 3, 8)),
        # Scripts export these variables for the trainer, and start the ranks with srun or mpiexec.
        ({**SRUN, **DEEPSPEED}, ("srun", 2, 4)),
        ({**MPICH, **DEEPSPEED}, ("mpiexec", 1, 2)),
        ({**DEEPSPEED, "WORLD_SIZE": "1"}, None),
        # Left over from a notebook or a Trainer: nothing started this process with torchrun.
        ({"RANK": "0", "WORLD_SIZE": "8"}, None),
    ],
)
def test_the_innermost_launcher_counts(environment: dict[str, str], expected: tuple[str, int, int | None]) -> None:
    launcher = find_launcher(environment)

    assert (launcher and (launcher.name, launcher.rank, launcher.size)) == expected


def test_fewer_ranks_than_the_launcher_started_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(LaunchError, match="srun started 4 processes, but the data plane sees 1"):
        check_world_size(Local())
    check_world_size(Local(), subset=True)


def test_more_ranks_than_the_launcher_started_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program may start its processes itself, as Lightning does."""
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "1")
    comm = Local()
    comm.size = 4

    check_world_size(comm)


def test_processes_of_an_unknown_launcher_need_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them would otherwise train on the whole global batch, without a message."""
    for name, value in DEEPSPEED.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(LaunchError, match=r"WORLD_SIZE=8 and MASTER_ADDR are set.*\n.*init_process_group"):
        open_communicator()
    with pytest.raises(LaunchError, match="another launcher started 8 processes, but the data plane sees 1"):
        open_communicator("local")
