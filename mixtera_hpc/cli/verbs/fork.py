"""`mixtera-hpc fork`: continue a checkpoint of a run on several mixtures, as runs of their own."""

import argparse
from pathlib import Path

from mixtera_hpc.cli.run_arguments import add_run_argument

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_run_argument(parser)
    parser.add_argument("--step", type=int, required=True, metavar="S", help="the checkpoint after S steps")
    parser.add_argument(
        "--set",
        dest="mixtures",
        action="append",
        type=Path,
        required=True,
        metavar="FILE",
        help="YAML with the keys below `mixture:`; one new run for each --set, named after the file",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="steps of each new run (default: to the parent's end)")
    parser.add_argument(
        "--keep-rate",
        action="store_true",
        help="keep the learning rates of the parent's schedule; otherwise the rate falls linearly to 0 at the end",
    )
    parser.add_argument("--run", dest="train", action="store_true", help="train the new runs here, one after another")
    parser.epilog = """\
The new runs continue with `mixtera-hpc resume`, which also takes other changes, e.g. --change-seq-len. Their journals
point to the parent; `trace --verify` covers the parent's part, and `report --compare` puts them side by side.

Example:
  mixtera-hpc fork demo --step 200 --set code.yaml --set prose.yaml --steps 50 --run
  mixtera-hpc report --compare demo-s200-code demo-s200-prose"""


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    # Imported here because h5py and numpy take longer to import than `--help` may take.
    from mixtera_hpc.cli.answers.runs.fork_answer import fork_and_train

    return fork_and_train(args)
