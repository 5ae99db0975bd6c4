"""`mixtera-hpc submit`: a configuration becomes a job, or with --dry-run only its script."""

import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixtera_hpc.config.schema import Config
    from mixtera_hpc.launch.submit import Submitted

__all__ = ["arguments", "follow_submitted", "print_submitted", "run", "submit_or_print"]


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", help="Hydra overrides, e.g. experiment=demo cluster=clariden job.nodes=4"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script and do nothing")
    parser.add_argument("--wait", action="store_true", help="follow the run and leave with its exit code")


def run(args: Namespace) -> int:
    from mixtera_hpc.config.compose import compose

    return submit_or_print(compose(args.overrides), args)


def submit_or_print(config: "Config", args: Namespace) -> int:
    """Submit `config`, or with `--dry-run` print its script; with `--wait` see it to its end."""
    from mixtera_hpc.launch.submit import missing_account_message, script_text, submit_run

    if args.dry_run:
        if problem := missing_account_message(config):
            print(f"warning: {problem}", file=sys.stderr)
        sys.stdout.write(script_text(config, args.overrides))
        return 0
    submitted = submit_run(config, args.overrides)
    print_submitted(submitted)
    return follow_submitted(submitted) if args.wait else 0


def print_submitted(submitted: "Submitted") -> None:
    """Say what was submitted and how to look after it."""
    print(f"job     {submitted.job_id}" + (f" (attempt {submitted.attempt})" if submitted.attempt > 1 else ""))
    print(f"folder  {submitted.folder.path}")
    for verb in ("status", "logs", "cancel"):
        print(f"  mixtera-hpc {verb} {submitted.folder.path}")


def follow_submitted(submitted: "Submitted") -> int:
    """Print its lines until it has ended; returns what it left with."""
    from mixtera_hpc.launch.follow import follow_run, run_exit_code

    for line in follow_run(submitted.folder, attempt=submitted.attempt):
        print(line, flush=True)
    return run_exit_code(submitted.folder)
