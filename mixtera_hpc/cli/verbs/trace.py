"""`mixtera-hpc trace`: the samples of a step, the steps of a sample, and the proof of what a run consumed."""

import argparse
from pathlib import Path

from mixtera_hpc.cli.run_arguments import add_run_argument

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_run_argument(parser)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--step", type=int, help="list the sequences of this step")
    action.add_argument("--steps", metavar="A..B", help="list the sequences of steps A to B")
    action.add_argument(
        "--row", type=int, help="with --shard: list every step, rank and position at which this row was served"
    )
    action.add_argument("--diff", metavar="RUN_B", help="show the first difference from another run, and its cause")
    action.add_argument(
        "--verify", action="store_true", help="prove that every planned sequence was consumed exactly once"
    )
    parser.add_argument("--rank", type=int, help="only sequences that this rank was served")
    parser.add_argument("--domain", help="only sequences of this domain, an id or a name")
    parser.add_argument("--shard", help="only sequences with data of this shard, e.g. train/a.jsonl")
    parser.add_argument(
        "--show", action="store_true", help="also print the text of every sequence, or the sample; images are written"
    )
    parser.add_argument(
        "--export", metavar="FILE.npz", type=Path, help="write the batches of --step or --steps as numpy arrays"
    )
    parser.add_argument(
        "--worst", metavar="N", type=int, help="list the N sequences with the highest mean loss, of these steps or all"
    )
    parser.add_argument(
        "--write", metavar="FILE", type=Path, help="with --worst: write shard and row of the documents, one per line"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.epilog = """\
Examples:
  mixtera-hpc trace demo --step 100 --rank 3
  mixtera-hpc trace demo --step 100 --show
  mixtera-hpc trace demo --step 100 --export batch.npz
  mixtera-hpc trace demo --shard train/a.jsonl --row 17
  mixtera-hpc trace demo --worst 20 --steps 90..110 --show
  mixtera-hpc trace demo --diff OTHER_RUN
  mixtera-hpc trace demo --verify
--verify needs a run that was trained with dataplane.audit=true, --worst one with dataplane.record_losses=true."""


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    # Imported here because h5py and numpy take longer to import than `--help` may take.
    from mixtera_hpc.cli.answers.trace_answer import print_trace

    print_trace(args)
    return 0
