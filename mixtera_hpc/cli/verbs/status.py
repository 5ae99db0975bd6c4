"""`mixtera-hpc status`: list runs and their state."""

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from datetime import UTC, datetime

from mixtera_hpc.cli.console import print_json
from mixtera_hpc.cli.run_arguments import add_root_argument, find_run_named
from mixtera_hpc.cli.safe_output import terminal
from mixtera_hpc.config.run_folder import find_runs, runs_root
from mixtera_hpc.launch.status import RunStatus, run_statuses

__all__ = ["arguments", "format_duration", "format_steps", "run"]

NUM_NEWEST = 20
"""Number of runs that are listed if no run is named; --all lists every run."""

HEADER = ("run", "state", "attempt", "job", "nodes", "time / limit", "steps", "tokens/s", "log age", "reason")
CLEAR_SCREEN = "\033[2J\033[H"


def arguments(parser: ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help=f"run id, name or folder (default: the {NUM_NEWEST} newest runs)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per run")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=5.0,
        metavar="SECONDS",
        help="repeat until no run is waiting or running (every 5 s by default)",
    )
    parser.add_argument("--all", action="store_true", help="list all runs")
    add_root_argument(parser)
    parser.epilog = """\
Attempts and steps are numbered as in the logs: the first attempt is 1, and steps are those that have finished.
States: PENDING, RUNNING, COMPLETED, SAVED (stopped with its state saved), FAILED, CANCELLED, TIMEOUT, NODE_FAIL, and
UNKNOWN where neither the run folder nor Slurm can tell."""


def run(args: Namespace) -> int:
    """Print the table, again and again with --watch."""
    while True:
        statuses = _statuses(args)
        if args.watch is not None and sys.stdout.isatty():
            print(CLEAR_SCREEN, end="", file=terminal(sys.stdout))
        if args.json:
            for status in statuses:
                print_json(status)
        else:
            print(_table(statuses))
        sys.stdout.flush()
        if args.watch is None or not any(status.state.active for status in statuses):
            return 0
        time.sleep(max(1.0, args.watch))


def format_duration(seconds: int | None) -> str:
    """Return `H:MM:SS`, or a dash for None."""
    if seconds is None:
        return "-"
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def format_steps(status: RunStatus) -> str:
    """Return `120 of 400`: the finished steps, as in the logs, of all steps; a dash if none was recorded."""
    if status.steps_done is None:
        return "-"
    return f"{status.steps_done} of {status.num_steps}" if status.num_steps else str(status.steps_done)


def _statuses(args: Namespace) -> list[RunStatus]:
    if args.runs:
        folders = [find_run_named(name, args) for name in args.runs]
    else:
        folders = find_runs(args.root or runs_root())
        if not args.all:
            folders = folders[-NUM_NEWEST:]
    return run_statuses(folders, datetime.now(UTC))


def _table(statuses: Sequence[RunStatus]) -> str:
    if not statuses:
        return "There are no runs here yet. Start one with mixtera-hpc demo"
    rows = [HEADER, *(_row(status) for status in statuses)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _row(status: RunStatus) -> tuple[str, ...]:
    reason_lines = (status.reason or "").splitlines()
    tokens_per_s = "-" if status.tokens_per_s is None else f"{status.tokens_per_s:,.0f}"
    return (
        f"{status.name}/{status.run_id}",
        str(status.state),
        _or_dash(status.attempt),
        status.job_id or "-",
        _or_dash(status.nodes),
        f"{format_duration(status.elapsed_s)} / {format_duration(status.limit_s)}",
        format_steps(status),
        tokens_per_s,
        format_duration(status.last_log_age_s),
        next(iter(reason_lines), ""),
    )


def _or_dash(number: int | None) -> str:
    return "-" if number is None else str(number)
