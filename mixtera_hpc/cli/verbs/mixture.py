"""`mixtera-hpc mixture`: show the mixture of a run and its history, or request another one from a named chunk on."""

import argparse
from pathlib import Path

from mixtera_hpc.cli.run_arguments import add_run_argument

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "action",
        choices=("show", "set"),
        help="show: the weights of the run and how they changed; set: request another mixture",
    )
    add_run_argument(parser)
    parser.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        nargs="?",
        help="set: YAML with the keys below `mixture:`, e.g. kind, domains",
    )
    parser.add_argument(
        "--at-chunk", metavar="N", help="set: the first chunk that uses the mixture (default: the next one)"
    )
    parser.add_argument(
        "--json", action="store_true", help="show: print one JSON object per change of weights and per decision"
    )
    parser.epilog = """\
Examples:
  mixtera-hpc mixture show demo
  mixtera-hpc mixture set demo mixture.yaml --at-chunk 40"""


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    # Imported here because h5py and numpy take longer to import than `--help` may take.
    from mixtera_hpc.cli.answers.mixture_answer import show_or_set_mixture

    show_or_set_mixture(args)
    return 0
