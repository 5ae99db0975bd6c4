"""Run a verb that every rank of mpiexec, srun or torchrun executes."""

from collections.abc import Callable

from mixtera_hpc.comm.launch_environment import find_launcher
from mixtera_hpc.dataplane.control import block_time_limit_signal
from mixtera_hpc.errors import MixteraError

__all__ = ["run_on_all_ranks"]


def run_on_all_ranks(body: Callable[[], int]) -> int:
    """Call `body` on every rank and return its exit code. **Collective.**

    Slurm's signal before the time limit is held back until the data plane handles it. An error before the ranks
    communicate is the same on all of them, so only the first rank reports it.

    Raises:
        MixteraError: On the first rank, what `body` raised. Other ranks return the exit code of that error.
    """
    block_time_limit_signal()
    try:
        return body()
    except MixteraError as error:
        if _is_first_rank():
            raise
        return error.exit_code


def _is_first_rank() -> bool:
    launcher = find_launcher()
    return launcher is None or launcher.rank == 0
