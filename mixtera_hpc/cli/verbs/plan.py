"""`mixtera-hpc plan`: forecast what a mixture will serve, or list the sequences of chosen steps."""

import argparse

from mixtera_hpc.cli.run_or_overrides import add_run_or_overrides

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_run_or_overrides(parser, "mixture=unimax plan.first_step=0 plan.steps=100")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per sequence instead of the forecast"
    )
    parser.epilog = """\
Examples:
  mixtera-hpc plan experiment=demo mixture=unimax
  mixtera-hpc plan experiment=demo plan.first_step=0 plan.steps=100 --json
  mixtera-hpc plan experiment=mine cluster=clariden job.nodes=16 plan.step_s=0.8
With plan.step_s, or for a run that has recorded steps, the forecast includes time, GPU-hours and node-hours."""


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    # Imported here because h5py and numpy take longer to import than `--help` may take.
    from mixtera_hpc.cli.answers.plan_answer import print_plan

    print_plan(args)
    return 0
