"""Facts from the environment about the launcher that started this process: torchrun, mpiexec, srun, or another one.

Launchers can be nested (`srun -n1 torchrun …`, `mpiexec -n 2 torchrun …`), and children inherit the variables of the
outer one. The innermost launcher decides how many processes belong together. Nothing here imports MPI or torch.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["UNKNOWN_LAUNCHER", "Launcher", "find_launcher"]

VARIABLES_OF_A_GROUP = ("RANK", "WORLD_SIZE", "MASTER_ADDR")
"""Needed by a torch process group. DeepSpeed and the operators of Kubernetes set no variable that names the launcher.
`RANK` and `WORLD_SIZE` without an address are left over from a notebook or a trainer."""
UNKNOWN_LAUNCHER = "DeepSpeed or another launcher"

STEPS_OF_ONE_TASK = ("4294967291", "4294967290")
"""Step ids that Slurm gives to a batch script and to the interactive step of salloc. Neither has several tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """The innermost launcher of this process."""

    name: str
    """torchrun, mpiexec, srun, or `UNKNOWN_LAUNCHER`."""
    rank: int
    """Number of this process among those that the launcher started."""
    size: int | None
    """Number of processes that the launcher started; None if its variables do not say."""

    needs_process_group: bool = False
    """True if the processes meet in a torch process group."""

    @property
    def started_several(self) -> bool:
        """True if the launcher is known to have started more than one process."""
        return self.size is not None and self.size > 1


def find_launcher(env: Mapping[str, str] | None = None) -> Launcher | None:
    """Return the innermost launcher that started this process, or None for a plain `python`.

    Args:
        env: the environment; None: `os.environ`.
    """
    env = os.environ if env is None else env
    if "TORCHELASTIC_RUN_ID" in env:
        return _of_group(env, "torchrun")
    launcher = _mpi_launcher(env)
    has_several = (_number(env, "WORLD_SIZE") or 1) > 1 and all(env.get(name) for name in VARIABLES_OF_A_GROUP)
    if has_several and (launcher is None or launcher.size == 1):
        return _of_group(env, UNKNOWN_LAUNCHER)
    return launcher


def _of_group(env: Mapping[str, str], name: str) -> Launcher:
    """Return a launcher whose processes meet in a torch process group."""
    size = _number(env, "WORLD_SIZE")
    return Launcher(name=name, rank=_number(env, "RANK") or 0, size=size, needs_process_group=True)


def _mpi_launcher(env: Mapping[str, str]) -> Launcher | None:
    """Return the innermost of mpiexec and srun."""
    for prefix in ("PMI", "OMPI_COMM_WORLD"):
        if f"{prefix}_SIZE" in env:
            return Launcher(
                name="mpiexec", rank=_number(env, f"{prefix}_RANK") or 0, size=_number(env, f"{prefix}_SIZE")
            )
    if "SLURM_STEP_NUM_TASKS" in env and env.get("SLURM_STEP_ID", STEPS_OF_ONE_TASK[0]) not in STEPS_OF_ONE_TASK:
        return Launcher(name="srun", rank=_number(env, "SLURM_PROCID") or 0, size=_number(env, "SLURM_STEP_NUM_TASKS"))

    # Some process managers give a rank and no size.
    for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK"):
        rank = _number(env, name)
        if rank is not None:
            return Launcher(name="mpiexec", rank=rank, size=None)
    return None


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "")
    return int(text) if text.isdecimal() else None
