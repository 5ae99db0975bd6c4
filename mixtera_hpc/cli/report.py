"""`mixtera-hpc report`: tables, plots and an HTML page from what runs recorded."""

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mixtera_hpc.config.run_folder import RunFolder

__all__ = ["arguments", "run"]


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run id, name or folder")
    parser.add_argument("--scaling", action="store_true", help="one table that compares the runs' throughput")
    parser.add_argument("--json", action="store_true", help="the numbers, one JSON object per run and line; no page")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where pages and plots go (default: the run's report/)")
    parser.add_argument("--root", type=Path, help="folder of all runs (default: $MIXTERA_RUNS or ./runs)")


def run(args: Namespace) -> int:
    from mixtera_hpc.config.run_folder import RunFolder, runs_root

    folders = [RunFolder.find(name, args.root or runs_root()) for name in args.runs]
    if args.scaling:
        _scaling(folders, args.json)
    elif args.json:
        _numbers(folders)
    else:
        _pages(folders, args.out)
    return 0


def _scaling(folders: list["RunFolder"], as_json: bool) -> None:
    from mixtera_hpc.report.run_metrics import load_run_metrics
    from mixtera_hpc.report.scaling import scaling_table

    rows = scaling_table([load_run_metrics(folder) for folder in folders])
    if as_json:
        for row in rows:
            _print_json(row)
        return
    from mixtera_hpc.report.terminal import scaling_text

    _print(scaling_text(rows))


def _numbers(folders: list["RunFolder"]) -> None:
    from mixtera_hpc.report.run_metrics import load_run_metrics
    from mixtera_hpc.report.summary import summarize_run

    for folder in folders:
        _print_json(summarize_run(load_run_metrics(folder)))


def _pages(folders: list["RunFolder"], out: Path | None) -> None:
    from mixtera_hpc.report.report_files import write_report
    from mixtera_hpc.report.terminal import report_text

    for folder in folders:
        target = out / folder.run_id if out is not None and len(folders) > 1 else out
        _print(report_text(write_report(folder, target)))


def _print_json(value: Any) -> None:
    import msgspec

    sys.stdout.write(msgspec.json.encode(asdict(value)).decode() + "\n")


def _print(text: "RenderableType") -> None:
    """As wide as it needs to be where nobody folds it: in a pipe or a file."""
    from mixtera_hpc.cli.console import open_console

    open_console().print(text)
