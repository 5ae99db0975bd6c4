"""`mixtera-hpc status`: what became of runs."""

import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixtera_hpc.launch.status import RunStatus

__all__ = ["arguments", "clock", "run"]

SHOWN = 20
"""Newest runs listed when none is named; --all lists every one."""


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run id, name or folder; all runs when none is given")
    parser.add_argument("--json", action="store_true", help="one JSON object per run and line")
    parser.add_argument("--watch", nargs="?", type=float, const=5.0, metavar="SECONDS", help="again and again")
    parser.add_argument("--all", action="store_true", help=f"more than the {SHOWN} newest runs")
    parser.add_argument("--root", type=Path, help="folder of all runs (default: $MIXTERA_RUNS or ./runs)")


def run(args: Namespace) -> int:
    while True:
        statuses = _statuses(args)
        if args.watch is not None and sys.stdout.isatty():
            print("\033[2J\033[H", end="")
        print(_lines(statuses) if args.json else _table(statuses), flush=True)
        if args.watch is None or not any(status.state.active for status in statuses):
            return 0
        time.sleep(max(1.0, args.watch))


def clock(seconds: int | None) -> str:
    """`H:MM:SS`, or a dash."""
    if seconds is None:
        return "-"
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _statuses(args: Namespace) -> list["RunStatus"]:
    from datetime import UTC, datetime

    from mixtera_hpc.config.run_folder import RunFolder, find_runs, runs_root
    from mixtera_hpc.launch.status import run_statuses

    root = args.root or runs_root()
    if args.runs:
        folders = [RunFolder.find(name, root) for name in args.runs]
    else:
        folders = find_runs(root) if args.all else find_runs(root)[-SHOWN:]
    return run_statuses(folders, datetime.now(UTC))


def _lines(statuses: list["RunStatus"]) -> str:
    import json
    from dataclasses import asdict

    return "\n".join(json.dumps(asdict(status)) for status in statuses)


def _table(statuses: list["RunStatus"]) -> str:
    if not statuses:
        return "No runs here yet. Start one: mixtera-hpc demo"
    rows: list[tuple[str, ...]] = [
        ("run", "state", "job", "nodes", "time / limit", "step", "tokens/s", "log age", "reason")
    ]
    rows += [_row(status) for status in statuses]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _row(status: "RunStatus") -> tuple[str, ...]:
    elapsed, limit = clock(status.elapsed_s), clock(status.limit_s)
    return (
        f"{status.name}/{status.run_id}",
        str(status.state),
        status.job_id or "-",
        "-" if status.nodes is None else str(status.nodes),
        f"{elapsed} / {limit}",
        "-" if status.step is None else str(status.step),
        "-" if status.tokens_per_s is None else f"{status.tokens_per_s:,.0f}",
        clock(status.last_log_age_s),
        (status.reason or "").splitlines()[0] if status.reason else "",
    )
