"""`mixtera-hpc tokenize`: write the token ids of all documents of an index, for runs that tokenize nothing."""

import argparse

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "overrides",
        nargs="*",
        help="Hydra overrides that name the index, its tokenizer and, with data.tokens=DIR, a folder for the tokens; "
        "without it they are written beside the index",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.epilog = """\
Runs also under mpiexec, srun or torchrun. A job that is interrupted continues when the same command is run again.
Examples:
  mixtera-hpc tokenize index.path=i.h5 dataplane.tokenizer=tokenizer.json
  mpiexec -n 8 mixtera-hpc tokenize index.path=i.h5 dataplane.tokenizer=tokenizer.json data.tokens=/scratch/tokens"""


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    # Imported here because h5py and numpy take longer to import than `--help` may take.
    from mixtera_hpc.cli.all_ranks import run_on_all_ranks
    from mixtera_hpc.cli.answers.tokenize_answer import tokenize

    return run_on_all_ranks(lambda: tokenize(args))
