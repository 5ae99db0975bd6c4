"""`mixtera-hpc run`: train here, in one process or as every rank of mpiexec, srun or torchrun.

Without `--folder`, rank 0 makes a run folder. Batch scripts start their ranks with `--folder` and `--attempt`, which
name an attempt of a prepared run.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from mixtera_hpc.cli.all_ranks import run_on_all_ranks
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.launch.attempts import batch_script_attempt, start_local_attempt
from mixtera_hpc.launch.prepare import prepare_run

__all__ = ["arguments", "run"]


def arguments(parser: ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    parser.add_argument("--folder", type=Path, help="run an attempt of this prepared run folder; used by batch scripts")
    parser.add_argument("--attempt", type=int, help="with --folder: the number of this job's attempt")
    parser.epilog = """\
Examples:
  mixtera-hpc run experiment=demo training.num_steps=40
  mpiexec -n 4 mixtera-hpc run experiment=demo
  torchrun --nproc-per-node 4 --no-python mixtera-hpc run experiment=demo
The run folder is <run.root>/<run.name>/<run id>. To continue a run, use mixtera-hpc resume."""


def run(args: Namespace) -> int:
    """Train; every rank calls this. **Collective.**"""
    return run_on_all_ranks(lambda: _run_attempt(args))


def _run_attempt(args: Namespace) -> int:
    _check_arguments(args)
    if args.folder is None:
        return _start_run(args.overrides)
    folder = RunFolder(args.folder.absolute())
    if args.attempt is not None and args.attempt != batch_script_attempt(folder):
        raise ConfigError(
            f"--attempt {args.attempt} names an attempt that no batch script has begun for this process.\n"
            f"  Only batch scripts give --attempt. To continue the run: mixtera-hpc resume {folder.path}"
        )
    # Imported here because it imports numpy, which takes longer than `--help` may take.
    from mixtera_hpc.training.continue_run import continue_run

    return continue_run(folder, attempt=args.attempt)


def _check_arguments(args: Namespace) -> None:
    if args.folder is None and args.attempt is not None:
        raise ConfigError("--attempt needs --folder.\n  Give the run folder that the attempt belongs to.")
    if args.folder is not None and args.overrides:
        raise ConfigError(
            "run accepts --folder or overrides, but not both.\n"
            "  To change a run, use mixtera-hpc resume RUN [overrides]."
        )


def _start_run(overrides: Sequence[str]) -> int:
    # Imported here because it imports numpy, which takes longer than `--help` may take.
    from mixtera_hpc.training.continue_run import check_num_ranks
    from mixtera_hpc.training.run_attempt import Attempt, check_trained_here, run_attempt

    config = compose(overrides)
    check_trained_here(config)

    def prepare(num_ranks: int) -> Attempt:
        check_num_ranks(config, num_ranks)
        folder = prepare_run(config, overrides, datetime.now(UTC))
        return Attempt(folder=folder, number=start_local_attempt(folder, config, ranks=num_ranks))

    return run_attempt(config.dataplane.comm, prepare)
