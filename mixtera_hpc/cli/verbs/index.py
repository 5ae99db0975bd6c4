"""`mixtera-hpc index build|inspect|verify|refresh|derive|duplicates`: the property index of a data collection."""

import argparse

from mixtera_hpc.errors import ConfigError

__all__ = ["arguments", "run"]

_ACTIONS = ("build", "derive", "duplicates", "inspect", "refresh", "verify")
_ACTIONS_OF_FLAG = {
    "json": _ACTIONS,
    "submit": ("build", "refresh", "derive"),
    "dry_run": ("build", "refresh", "derive"),
    "wait": ("build", "refresh", "derive"),
    "deep": ("verify",),
    "again": ("derive",),
    "write": ("duplicates",),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "action",
        choices=_ACTIONS,
        help="build an index, show its content, compare it with its shards, update it, add properties to it, or "
        "find samples with equal documents; all but inspect also run under mpiexec or srun",
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. data.root=DIR dataplane.tokenizer=FILE")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--deep", action="store_true", help="verify: compare content, not only size and modification time"
    )
    parser.add_argument("--again", action="store_true", help="derive: recompute properties that the index already has")
    parser.add_argument(
        "--write", metavar="FILE", help="duplicates: list all groups of equal samples, one JSON list per line"
    )
    parser.add_argument("--submit", action="store_true", help="run the action as a Slurm job: cluster=NAME job.nodes=N")
    parser.add_argument(
        "--dry-run", action="store_true", help="with --submit: print the batch script and do nothing else"
    )
    parser.add_argument("--wait", action="store_true", help="with --submit: follow the job and exit with its exit code")
    parser.epilog = """\
Examples:
  mixtera-hpc index build data.root=DIR data.properties.language=lang dataplane.tokenizer=tokenizer.json
  mpiexec -n 8 mixtera-hpc index refresh data.root=DIR data.properties.language=lang
  mixtera-hpc index inspect index.path=DIR/index.h5"""


def run(args: argparse.Namespace) -> int:
    """Run one action and return the exit code."""
    _check_flags(args)
    # Imported here because h5py and numpy take longer to import than `--help` may take.
    if args.submit:
        from mixtera_hpc.cli.index_submit import submit_action

        return submit_action(args)
    from mixtera_hpc.cli.index_actions import run_action

    return run_action(args)


def _check_flags(args: argparse.Namespace) -> None:
    for flag, actions in _ACTIONS_OF_FLAG.items():
        name = flag.replace("_", "-")
        if getattr(args, flag) and args.action not in actions:
            raise ConfigError(f"index {args.action} has no --{name}. These have: index {', '.join(actions)}.")
        if getattr(args, flag) and flag in ("dry_run", "wait") and not args.submit:
            raise ConfigError(f"--{name} needs --submit.")
