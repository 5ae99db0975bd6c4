"""`mixtera-hpc index … --submit`: the same command, on the ranks of a batch job.

It is an ordinary run whose ranks execute the index verb (`job.command`), so `status`, `logs`, `cancel` and `resume` know it; a
job that was killed goes on where it stopped when it is resumed.
"""

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixtera_hpc.config.schema import Config

__all__ = ["submit"]


def submit(args: argparse.Namespace) -> int:
    """Send it off, or print its script."""
    from mixtera_hpc.cli.submit import submit_or_print

    return submit_or_print(_job(args), args)


def _job(args: argparse.Namespace) -> "Config":
    """The configuration of a run that executes this verb."""
    from mixtera_hpc.cli.collection import compose_data
    from mixtera_hpc.config.check import check_index_job

    config = compose_data(args.overrides)
    check_index_job(config)
    python = config.cluster.python or ("python" if config.job.container else sys.executable)
    flags = [f"--{name}" for name in ("json", "again") if getattr(args, name)]
    command = [python, "-u", "-m", "mpi4py", "-m", "mixtera_hpc", "index", args.action, *args.overrides, *flags]
    name = config.run.name if any(word.startswith("run.name=") for word in args.overrides) else f"index-{args.action}"
    return replace(config, run=replace(config.run, name=name), job=replace(config.job, command=command))
