"""`mixtera-hpc submit`: submit a configuration as a Slurm job, or with --dry-run print its script."""

import logging
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.launch.follow import follow_run, run_exit_code
from mixtera_hpc.launch.submit import Submitted, missing_account_message, script_text, submit_run

__all__ = ["arguments", "check_data", "follow_submitted", "print_submitted", "run", "submit_or_print"]

_logger = logging.getLogger("mixtera_hpc")


def arguments(parser: ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    parser.add_argument("--dry-run", action="store_true", help="print the script and do nothing else")
    parser.add_argument(
        "--wait",
        action="store_true",
        help="after submitting, print the run's logs until it ends; exit with its exit code",
    )
    parser.epilog = """\
Examples:
  mixtera-hpc submit experiment=demo cluster=clariden job.nodes=4 job.account=PROJECT
  mixtera-hpc submit experiment=demo cluster=clariden --dry-run >job.sh; sbatch job.sh
A printed script needs no run folder: it makes one when it starts."""


def run(args: Namespace) -> int:
    """Compose the configuration and submit it."""
    config = compose(args.overrides)
    if not args.dry_run:
        check_data(config)
    return submit_or_print(config, args)


def check_data(config: Config) -> None:
    """Open the data as the job will, so that what it would refuse is refused before it waits in the queue.

    A `job.command` may open other data, and may build its index itself: its indexes are read only if they exist.
    """
    # Imported here because numpy and h5py take longer to import than `--help` may take.
    from mixtera_hpc.cli.answers.packing_text import unused_balance_of_job
    from mixtera_hpc.cli.answers.plan_answer import print_decode_cost
    from mixtera_hpc.comm.communicator import Local
    from mixtera_hpc.dataplane.reading.source import open_source
    from mixtera_hpc.index.read.configured import check_stored_roots
    from mixtera_hpc.trace.forecast import forecast_mixture, longest_forecast

    if (warning := unused_balance_of_job(config)) is not None:
        _logger.warning(warning)
    check_stored_roots(config)
    if config.job.command and not all(Path(path).exists() for path in config.index.paths_to_read):
        return
    source = open_source(config, Local(), check=not config.job.command)
    num_steps = min(config.training.num_steps, longest_forecast(source))
    print_decode_cost(source, forecast_mixture(source, num_steps))


def submit_or_print(config: Config, args: Namespace) -> int:
    """Submit `config`, or with `--dry-run` print its script; with `--wait` follow the run to its end."""
    if args.dry_run:
        if problem := missing_account_message(config):
            _logger.warning(problem)
        sys.stdout.write(script_text(config, args.overrides))
        return 0
    submitted = submit_run(config, args.overrides)
    print_submitted(submitted)
    return follow_submitted(submitted) if args.wait else 0


def print_submitted(submitted: Submitted) -> None:
    """Print the job, its folder, and the verbs that look after it."""
    attempt = f" (attempt {submitted.attempt})" if submitted.attempt > 1 else ""
    print(f"job     {submitted.job_id}{attempt}")
    print(f"folder  {submitted.folder.path}")
    for verb in ("status", "logs", "cancel"):
        print(f"  mixtera-hpc {verb} {submitted.folder.path}")


def follow_submitted(submitted: Submitted) -> int:
    """Print the run's lines until it has ended, and return its exit code."""
    for line in follow_run(submitted.folder, attempt=submitted.attempt):
        print(line, flush=True)
    return run_exit_code(submitted.folder)
