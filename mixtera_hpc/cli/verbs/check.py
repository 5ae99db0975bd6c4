"""`mixtera-hpc check`: check a configuration, or every experiment on every cluster, and list every problem."""

from argparse import ArgumentParser, Namespace

from mixtera_hpc.cli.console import print_json
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.launch.check import CheckResult, check_all_pairs, check_one

__all__ = ["arguments", "run"]


def arguments(parser: ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides of one configuration")
    parser.add_argument(
        "--all",
        action="store_true",
        help="check every experiment and every environment on every cluster; the default without overrides",
    )
    parser.add_argument("--json", action="store_true", help="with --all: print one JSON object")
    parser.epilog = """\
Examples:
  mixtera-hpc check experiment=mine cluster=clariden job.nodes=64
  mixtera-hpc check --all
--all tries conf/experiment (and no experiment) and conf/environment with conf/cluster, including your own in
$MIXTERA_CONF. Nothing is submitted, and no data is read. The exit code is 2 if something does not fit."""


def run(args: Namespace) -> int:
    """Check and print the problems."""
    if args.overrides:
        if args.all or args.json:
            raise ConfigError(
                f"{args.overrides[0]!r} names one configuration, but --all and --json are about every pair.\n"
                "  Give overrides, or --all."
            )
        needed = check_one(args.overrides)
        print("The configuration and its batch script have no problem.")
        if needed:
            print(f"Before a job can be submitted: {needed}")
        return 0
    result = check_all_pairs()
    if args.json:
        print_json(result)
    else:
        _print_problems(result)
    return 2 if result.failures else 0


def _print_problems(result: CheckResult) -> None:
    for pair in result.failures:
        environment = "" if pair.environment == "none" else f" environment={pair.environment}"
        print(f"experiment={pair.experiment or '(none)'} cluster={pair.cluster}{environment}\n  {pair.problem}")
    if result.unset:
        print(f"Environment variables that are not set here, replaced by placeholders: {', '.join(result.unset)}")
    num_good = result.num_pairs - len(result.failures)
    print(f"{num_good} of {result.num_pairs} combinations of experiment, environment and cluster fit.")
