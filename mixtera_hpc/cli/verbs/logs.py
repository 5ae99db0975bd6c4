"""`mixtera-hpc logs`: print what ranks and batch scripts wrote, over all attempts."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace

from mixtera_hpc.cli.run_arguments import add_run_argument, find_run
from mixtera_hpc.errors import LaunchError
from mixtera_hpc.launch.follow import follow_run
from mixtera_hpc.launch.logs import all_lines

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
    lines = follow_run(folder, args.rank) if args.follow else all_lines(folder, args.rank)
    is_empty = True
    for line in lines:
        print(line, flush=args.follow)
        is_empty = False
    if is_empty:
        of_rank = "" if args.rank == "main" else f" of rank {args.rank}"
        raise LaunchError(
            f"{folder.run_id} has no log lines{of_rank}.\n  A run that was started with mixtera-hpc run, also under "
            "mpiexec, writes to its terminal only; see mixtera-hpc status for others."
        )
    return 0


def _rank(text: str) -> int | str:
    if text in ("all", "main"):
        return text
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is neither the number of a rank nor 'all'") from None
