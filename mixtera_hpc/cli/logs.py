"""`mixtera-hpc logs`: what ranks and batch scripts wrote, over all attempts."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

__all__ = ["arguments", "run"]


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run_name", metavar="RUN", help="run id, name or folder")
    parser.add_argument(
        "--rank", type=_rank, default="main", help="a rank, or all (default: rank 0 and the batch script)"
    )
    parser.add_argument("-f", "--follow", action="store_true", help="go on with new lines until the run has ended")
    parser.add_argument("--root", type=Path, help="folder of all runs (default: $MIXTERA_RUNS or ./runs)")


def run(args: Namespace) -> int:
    from mixtera_hpc.config.run_folder import RunFolder, runs_root
    from mixtera_hpc.errors import LaunchError
    from mixtera_hpc.launch.follow import follow_run
    from mixtera_hpc.launch.logs import all_lines

    folder = RunFolder.find(args.run_name, args.root or runs_root())
    lines = follow_run(folder, args.rank) if args.follow else all_lines(folder, args.rank)
    empty = True
    for line in lines:
        print(line, flush=args.follow)
        empty = False
    if empty:
        raise LaunchError(
            f"{folder.run_id} has no log lines{'' if args.rank == 'main' else f' of rank {args.rank}'}.\n  A run started "
            "with mpiexec or mixtera-hpc run writes to its terminal; see mixtera-hpc status for the others."
        )
    return 0


def _rank(text: str) -> int | str:
    if text in ("all", "main"):
        return text
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is neither a rank nor 'all'") from None
