"""Facts from the environment about the launcher that started this process: torchrun, mpiexec or srun.

Launchers can be nested (`srun -n1 torchrun …`, `mpiexec -n 2 torchrun …`), and children inherit the variables of the
outer one. The innermost launcher decides how many processes belong together. Nothing here imports MPI or torch.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Launcher", "find_launcher"]

STEPS_OF_ONE_TASK = ("4294967291", "4294967290")
"""Step ids that Slurm gives to a batch script and to the interactive step of salloc. Neither has several tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """The innermost launcher of this process."""

    name: str
    """torchrun, mpiexec or srun."""
    rank: int
    """Number of this process among those that the launcher started."""
    size: int | None
    """Number of processes that the launcher started; None if its variables do not say."""

    @property
    def is_torchrun(self) -> bool:
        return self.name == "torchrun"

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
        return Launcher(name="torchrun", rank=_number(env, "RANK") or 0, size=_number(env, "WORLD_SIZE"))
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
