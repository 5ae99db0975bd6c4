"""`mixtera-hpc query`: what a query selects, and how the domains of a mixture share it."""

import argparse

from mixtera_hpc.cli.run_or_overrides import add_run_or_overrides

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_run_or_overrides(parser, "query.where=... mixture.group_by=[source]")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--explain", action="store_true", help="also print how the counts were computed, and the time of each part"
    )
    parser.epilog = """\
Examples:
  mixtera-hpc query index.path=DIR/index.h5 "query.where=language == 'en'" mixture.group_by=[source]
  mixtera-hpc query demo"""


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    # Imported here because h5py and numpy take longer to import than `--help` may take.
    from mixtera_hpc.cli.answers.query_answer import print_answer

    print_answer(args)
    return 0
