"""`mixtera-hpc report`: write tables, plots and an HTML page from what runs recorded."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from mixtera_hpc.cli.console import open_console, print_json
from mixtera_hpc.cli.run_arguments import add_root_argument, find_run_named
from mixtera_hpc.config.run_folder import RunFolder, runs_root
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.report.run_metrics import load_run_metrics
from mixtera_hpc.report.summary import summarize_run

__all__ = ["arguments", "run"]


def arguments(parser: ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run id, name or folder; a name means its newest run")
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="compare the throughput of the runs, or of all runs of a sweep if one RUN names it: table, CSV and PNG",
    )
    parser.add_argument(
        "--model",
        type=int,
        metavar="NODES",
        help="with --scaling: also model the costs of the data plane on up to so many nodes, with the assumptions",
    )
    parser.add_argument(
        "--compare", action="store_true", help="write one page that compares the losses and mixtures of the runs"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the numbers as one JSON object per run; write no page"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of pages and plots, with a subfolder per run if there are several (default: report/ of the run)",
    )
    add_root_argument(parser)
    parser.epilog = """\
Examples:
  mixtera-hpc report demo
  mixtera-hpc report nodes1 nodes2 nodes4 --scaling
  mixtera-hpc report my_sweep --scaling --model 4096
  mixtera-hpc report demo-s200-code demo-s200-prose --compare"""


def run(args: Namespace) -> int:
    """Print or write the reports."""
    if args.model is not None and not args.scaling:
        raise ConfigError("--model extends the table of --scaling.\n  Add --scaling, or leave --model out.")
    if args.scaling and not args.compare:
        _compare_scaling(args)
        return 0
    folders = [find_run_named(name, args) for name in args.runs]
    if args.compare:
        _write_comparison(folders, args)
    elif args.json:
        for folder in folders:
            print_json(summarize_run(load_run_metrics(folder)))
    else:
        _write_pages(folders, args.out)
    return 0


def _compare_scaling(args: Namespace) -> None:
    # Imported here because it imports numpy, which takes longer than `--help` may take.
    from mixtera_hpc.cli.answers.scaling_answer import compare_runs, compare_sweep, find_sweep

    if args.model is not None and args.model < 1:
        raise ConfigError(f"--model is {args.model}, but a job has at least 1 node.\n  Give 1 or more.")
    sweep = find_sweep(args.runs[0], args.root or runs_root()) if len(args.runs) == 1 else None
    if sweep is not None:
        compare_sweep(sweep, args.out, as_json=args.json, model_nodes=args.model)
        return
    folders = [find_run_named(name, args) for name in args.runs]
    runs = [load_run_metrics(folder) for folder in folders]
    compare_runs(runs, args.out or folders[0].report, as_json=args.json, model_nodes=args.model)


def _write_comparison(folders: Sequence[RunFolder], args: Namespace) -> None:
    if len(folders) < 2 or args.json or args.scaling:
        raise ConfigError("report --compare takes two runs or more, without --json and --scaling.")
    # Imported here because it imports rich, which `--help` does not need.
    from mixtera_hpc.report.mixing.comparison import compare_runs, comparison_page, comparison_text

    comparison = compare_runs([load_run_metrics(folder) for folder in folders])
    target = (args.out or folders[0].report) / "comparison.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(comparison_page(comparison), encoding="utf-8")
    open_console().print(comparison_text(comparison))
    print(f"Comparison  {target}")


def _write_pages(folders: Sequence[RunFolder], out: Path | None) -> None:
    # Imported here because they import matplotlib, which takes half a second, and h5py.
    from mixtera_hpc.cli.answers.packing_text import packing_rows_of_run
    from mixtera_hpc.report.report_files import write_report
    from mixtera_hpc.report.terminal import report_text

    for folder in folders:
        target = out / folder.run_id if out is not None and len(folders) > 1 else out
        open_console().print(report_text(write_report(folder, target, packing_rows_of_run)))
