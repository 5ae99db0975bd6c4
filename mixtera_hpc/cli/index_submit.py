"""Run `mixtera-hpc index ACTION` as a Slurm job, with `--submit`.

The job is an ordinary run whose `job.command` is the same index command, so `status`, `logs`, `cancel` and `resume`
work on it. A job that was killed continues where it stopped when it is resumed.
"""

import argparse
from dataclasses import replace

from mixtera_hpc.cli.collection import compose_build, compose_data
from mixtera_hpc.cli.verbs.submit import submit_or_print
from mixtera_hpc.config.check import check_index_job
from mixtera_hpc.config.job_shape import python_of_ranks
from mixtera_hpc.config.schema import Config

__all__ = ["submit_action"]


def submit_action(args: argparse.Namespace) -> int:
    """Submit the job, or print its script with `--dry-run`."""
    return submit_or_print(_job_config(args), args)


def _job_config(args: argparse.Namespace) -> Config:
    """Return the configuration of a run whose ranks execute this action."""
    compose = compose_data if args.action == "derive" else compose_build
    config = compose(args.overrides)
    check_index_job(config)
    flags = [f"--{name}" for name in ("json", "again") if getattr(args, name)]
    command = [
        python_of_ranks(config),
        "-u",
        "-m",
        "mpi4py",
        "-m",
        "mixtera_hpc",
        "index",
        args.action,
        *args.overrides,
        *flags,
    ]
    has_name = any(override.startswith("run.name=") for override in args.overrides)
    name = config.run.name if has_name else f"index-{args.action}"
    return replace(config, run=replace(config.run, name=name), job=replace(config.job, command=command))
