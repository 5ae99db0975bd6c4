"""The arguments of verbs that take a configuration or, instead of it, a run: `query` and `plan`."""

import argparse

from mixtera_hpc.cli.run_arguments import add_root_argument, find_run_named
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.errors import ConfigError

__all__ = ["add_run_or_overrides", "find_optional_run"]


def add_run_or_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    """Declare the positional arguments and --split.

    Args:
        example: overrides shown in the help.
    """
    parser.add_argument(
        "overrides",
        metavar="RUN | OVERRIDE",
        nargs="*",
        help=f"a run (id, name or folder), without the samples that it has dropped; or Hydra overrides, e.g. {example}",
    )
    parser.add_argument(
        "--split",
        choices=("train", "validation"),
        default="train",
        help="which samples of query.holdout: training or held-out (default: train)",
    )
    add_root_argument(parser)


def find_optional_run(args: argparse.Namespace) -> RunFolder | None:
    """Return the run that the positional arguments name; None if they are overrides.

    Raises:
        ConfigError: there are overrides besides the run, whose configuration is recorded.
        LaunchError: there is no such run.
    """
    names = [word for word in args.overrides if "=" not in word and not word.startswith("~")]
    if not names:
        return None
    others = [word for word in args.overrides if word != names[0]]
    if others:
        raise ConfigError(
            f"{names[0]} names a run, whose configuration is recorded, but there is also {others[0]!r}.\n"
            "  Give a run or overrides, which have the form key=value."
        )
    return find_run_named(names[0], args)
