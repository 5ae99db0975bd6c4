"""`mixtera-hpc check`: compose every experiment on every cluster and list every problem."""

from argparse import ArgumentParser, Namespace

from mixtera_hpc.cli.console import print_json
from mixtera_hpc.launch.check import CheckResult, check_all_pairs

__all__ = ["arguments", "run"]


def arguments(parser: ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.epilog = """\
The pairs are those of conf/experiment (and no experiment) with conf/cluster, including your own in $MIXTERA_CONF.
The exit code is 2 if a pair does not fit."""


def run(args: Namespace) -> int:
    """Check all pairs and print the problems."""
    result = check_all_pairs()
    if args.json:
        print_json(result)
    else:
        _print_problems(result)
    return 2 if result.failures else 0


def _print_problems(result: CheckResult) -> None:
    for pair in result.failures:
        print(f"experiment={pair.experiment or '(none)'} cluster={pair.cluster}\n  {pair.problem}")
    if result.unset:
        print(f"Environment variables that are not set here, replaced by placeholders: {', '.join(result.unset)}")
    num_good = result.num_pairs - len(result.failures)
    print(f"{num_good} of {result.num_pairs} pairs of experiment and cluster fit.")
