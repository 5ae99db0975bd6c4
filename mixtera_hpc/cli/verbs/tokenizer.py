"""`mixtera-hpc tokenizer`: train a tokenizer on the documents that a mixture selects."""

import argparse
from pathlib import Path

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("action", choices=("train",), help="train: a byte-level BPE tokenizer, as tokenizer.json")
    parser.add_argument(
        "overrides", nargs="*", help="Hydra overrides that name an index and a mixture; no tokenizer is needed"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the tokenizer.json to write")
    parser.add_argument("--vocab-size", type=int, default=32_768, metavar="N", help="number of tokens (%(default)s)")
    parser.add_argument(
        "--sample-mb",
        type=float,
        default=200,
        metavar="MB",
        help="text to train on, in 10^6 bytes (%(default)s); it is held in memory",
    )
    parser.add_argument(
        "--special-token",
        action="append",
        default=[],
        metavar="TOKEN",
        help="one more special token, such as '<|im_start|>'; can be repeated",
    )
    parser.epilog = """\
Examples:
  mixtera-hpc index build data.root=DIR index.path=i.h5
  mixtera-hpc tokenizer train index.path=i.h5 mixture.group_by=[source] --out tokenizer.json --vocab-size 50000"""


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    # Imported here because h5py and numpy take longer to import than `--help` may take.
    from mixtera_hpc.cli.answers.tokenizer_answer import train_tokenizer

    train_tokenizer(args)
    return 0
