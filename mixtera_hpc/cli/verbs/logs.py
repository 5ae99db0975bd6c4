"""`mixtera-hpc logs`: print what ranks and batch scripts wrote, over all attempts."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace

from mixtera_hpc.cli.run_arguments import add_run_argument, find_run
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.errors import LaunchError, pluralize
from mixtera_hpc.launch.attempts import read_start
from mixtera_hpc.launch.follow import follow_run
from mixtera_hpc.launch.logs import all_lines, why_empty

__all__ = ["arguments", "run"]


def arguments(parser: ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_run_argument(parser)
    parser.add_argument(
        "--rank",
        type=_rank,
        default="main",
        help="a rank's number, or all (default: rank 0, the batch script, and the last lines of the first failed rank)",
    )
    parser.add_argument("-f", "--follow", action="store_true", help="print new lines until the run has ended")
    parser.epilog = """\
Examples:
  mixtera-hpc logs demo --follow
  mixtera-hpc logs demo --rank 17"""


def run(args: Namespace) -> int:
    """Print the lines."""
    folder = find_run(args)
    _check_rank(folder, args.rank)
    lines = follow_run(folder, args.rank) if args.follow else all_lines(folder, args.rank)
    is_empty = True
    for line in lines:
        print(line, flush=args.follow)
        is_empty = False
    if is_empty:
        of_rank = "" if args.rank == "main" else f" of rank {args.rank}"
        raise LaunchError(f"{folder.run_id} has no log lines{of_rank}. {why_empty(folder, args.rank)}")
    return 0


def _check_rank(folder: RunFolder, rank: int | str) -> None:
    """Refuse a rank that no attempt had."""
    starts = [read_start(folder, attempt) for attempt in folder.attempts()]
    sizes = [start.ranks for start in starts if start is not None]
    if isinstance(rank, int) and sizes and not 0 <= rank < max(sizes):
        raise LaunchError(
            f"--rank is {rank}, but {folder.run_id} has {pluralize(max(sizes), 'rank')}, numbered from 0.\n"
            f"  Give a number below {max(sizes)}, or all."
        )


def _rank(text: str) -> int | str:
    if text in ("all", "main"):
        return text
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is neither the number of a rank nor 'all'") from None
