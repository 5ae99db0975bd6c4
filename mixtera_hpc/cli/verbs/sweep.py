"""`mixtera-hpc sweep`: submit one run per combination of values, after printing what the sweep may cost."""

import json
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import replace

from mixtera_hpc.cli.verbs.submit import check_data
from mixtera_hpc.config.convert import to_plain
from mixtera_hpc.config.schema import JobConfig, RunConfig
from mixtera_hpc.errors import LaunchError
from mixtera_hpc.launch.sweep import SweepPlan, plan_sweep, submit_point

__all__ = ["add_submit_arguments", "arguments", "check_max_parallel", "run", "submit_plan"]

_TEXT_OF_ACTION = {
    "new": "new",
    "continue": "is continued",
    "finished": "has finished, is skipped",
    "active": "waits or runs, is left alone",
}


def arguments(parser: ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUES", help="Hydra overrides; commas separate the values of a key"
    )
    add_submit_arguments(parser)
    parser.epilog = """\
Example: 6 runs, at most 2 at a time
  mixtera-hpc sweep experiment=demo cluster=clariden job.nodes=1,2,4 dataplane.seed=0,1 --max-parallel 2
A job takes at most nodes × job.time node-hours, and a run at most job.max_attempts jobs. Repeating the command submits
only runs that are new or have not finished."""


def add_submit_arguments(parser: ArgumentParser) -> None:
    """Declare how the runs of a sweep are submitted."""
    parser.add_argument("--max-parallel", type=int, metavar="N", help="run at most N jobs at a time")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their node-hours; submit nothing")
    parser.add_argument("--yes", action="store_true", help="submit without asking")
    parser.add_argument(
        "--ask-above",
        type=float,
        default=100.0,
        metavar="NODE_HOURS",
        help="ask before submitting more node-hours than this, with one job per run (default: 100); without a "
        "terminal, --yes is needed",
    )


def run(args: Namespace) -> int:
    """Plan the sweep, print it, and submit the points that are due."""
    check_max_parallel(args)
    return submit_plan(plan_sweep(args.overrides, args.max_parallel), args)


def check_max_parallel(args: Namespace) -> None:
    """Refuse a --max-parallel below 1.

    Raises:
        LaunchError: no job could run.
    """
    if args.max_parallel is not None and args.max_parallel < 1:
        raise LaunchError(
            f"--max-parallel is {args.max_parallel}, but at least 1 job must run at a time.\n  Give 1 or more."
        )


def submit_plan(plan: SweepPlan, args: Namespace) -> int:
    """Print a plan, and submit its due points unless --dry-run is given."""
    _print_plan(plan)
    if args.dry_run or not plan.due:
        return 0
    _check_data(plan)
    _confirm(plan.node_hours_of_one_job, args)
    _submit(plan)
    print("  mixtera-hpc status")
    return 0


def _check_data(plan: SweepPlan) -> None:
    """Check the data of the new points as `submit` does; points that differ in nothing else are checked once."""
    checked = set()
    for point in plan.due:
        data = to_plain(replace(point.config, job=JobConfig(command=point.config.job.command), run=RunConfig()))
        key = json.dumps(data, sort_keys=True)
        if point.action == "new" and key not in checked:
            checked.add(key)
            check_data(point.config)


def _submit(plan: SweepPlan) -> None:
    for num_submitted, point in enumerate(plan.due):
        try:
            submitted = submit_point(point)
        except LaunchError as error:
            error.add_note(
                f"{num_submitted} of {len(plan.due)} jobs were submitted; the same command submits the rest."
            )
            raise
        print(f"{submitted.job_id}  {submitted.folder.path}", flush=True)


def _print_plan(plan: SweepPlan) -> None:
    for point in plan.points:
        job = point.config.job
        print(f"{job.nodes:>4} nodes × {job.time}  {' '.join(point.overrides)}  ({_TEXT_OF_ACTION[point.action]})")
    print(
        f"{len(plan.due)} of {len(plan.points)} runs to submit: {plan.node_hours_of_one_job:g} node-hours with one job "
        f"per run, at most {plan.node_hours:g}"
    )


def _confirm(node_hours: float, args: Namespace) -> None:
    if args.yes or node_hours <= args.ask_above:
        return
    if not sys.stdin.isatty():
        raise LaunchError(
            f"The sweep may cost {node_hours:g} node-hours, which is more than --ask-above={args.ask_above:g}.\n"
            "  Add --yes to submit it."
        )
    if input("Submit? [y/N] ").strip().lower() not in ("y", "yes"):
        raise LaunchError("Nothing was submitted.")
