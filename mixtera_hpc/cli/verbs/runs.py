"""`mixtera-hpc runs`: list runs with what they were started with, and choose among them."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace

from mixtera_hpc.cli.run_arguments import add_root_argument
from mixtera_hpc.launch.slurm.slurm_commands import JobState

__all__ = ["arguments", "run"]


def arguments(parser: ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "filters",
        nargs="*",
        metavar="NAME | KEY=VALUE",
        help="runs of this name or id (* and ? are wildcards), or with this value in their configuration, "
        "or with this choice among their overrides (experiment=mine); a run must pass all filters",
    )
    parser.add_argument("--state", choices=[str(state) for state in JobState], help="runs in this state")
    parser.add_argument("--last", type=_count, metavar="N", help="only the N newest of them")
    parser.add_argument("--json", action="store_true", help="print one JSON object per run")
    add_root_argument(parser)
    parser.epilog = """\
Examples:
  mixtera-hpc runs
  mixtera-hpc runs 'ablation*' job.nodes=4 --state COMPLETED
  mixtera-hpc runs mixture.kind=dynamic --last 5 --json
mixtera-hpc status shows what the jobs of runs are doing."""


def run(args: Namespace) -> int:
    """Print the runs."""
    # Imported here because msgspec and the reader of metrics take longer to import than `--help` may take.
    from mixtera_hpc.cli.answers.runs.runs_answer import print_runs

    print_runs(args)
    return 0


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise ArgumentTypeError(f"{text!r} is not a number of runs, at least 1")
    return number
