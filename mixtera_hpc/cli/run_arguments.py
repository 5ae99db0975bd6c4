"""The arguments that verbs about existing runs share: RUN and --root."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from mixtera_hpc.config.run_folder import RunFolder, runs_root

__all__ = ["add_root_argument", "add_run_argument", "find_run", "find_run_named"]


def add_run_argument(parser: ArgumentParser) -> None:
    """Add RUN and --root."""
    parser.add_argument("run_name", metavar="RUN", help="run id, name or folder; a name means its newest run")
    add_root_argument(parser)


def add_root_argument(parser: ArgumentParser) -> None:
    """Add --root."""
    parser.add_argument("--root", type=Path, help="folder of all runs (default: $MIXTERA_RUNS or ./runs)")


def find_run(args: Namespace) -> RunFolder:
    """Return the run that RUN names.

    Raises:
        LaunchError: There is no such run.
    """
    return find_run_named(args.run_name, args)


def find_run_named(name: str, args: Namespace) -> RunFolder:
    """Return the run `name` below --root.

    Raises:
        LaunchError: There is no such run.
    """
    return RunFolder.find(name, args.root or runs_root())
