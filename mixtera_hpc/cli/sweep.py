"""`mixtera-hpc sweep`: one run per combination of values, its price told first."""

import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from mixtera_hpc.errors import LaunchError

if TYPE_CHECKING:
    from mixtera_hpc.launch.sweep import SweepPlan

__all__ = ["arguments", "run"]

_WORDS = {
    "new": "new",
    "continue": "continues",
    "finished": "finished before, skipped",
    "active": "waits or runs, left alone",
}


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", help="any may list values: job.nodes=1,2,4 dataplane.seed=0,1")
    parser.add_argument("--max-parallel", type=int, metavar="N", help="at most N jobs at a time")
    parser.add_argument("--dry-run", action="store_true", help="list the points and their price, submit nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument(
        "--ask-above", type=float, default=100.0, metavar="NODE_HOURS", help="ask first above this (default: 100)"
    )


def run(args: Namespace) -> int:
    from mixtera_hpc.launch.sweep import plan_sweep, submit_point

    if args.max_parallel is not None and args.max_parallel < 1:
        raise LaunchError(f"--max-parallel is {args.max_parallel}, expected at least 1.")
    plan = plan_sweep(args.overrides, args.max_parallel)
    _tell(plan)
    if args.dry_run or not plan.due:
        return 0
    _confirm(plan.node_hours, args)
    for number, point in enumerate(plan.due):
        try:
            submitted = submit_point(point)
        except LaunchError as error:
            error.add_note(f"{number} of {len(plan.due)} jobs were submitted; the same command submits the rest.")
            raise
        print(f"{submitted.job_id}  {submitted.folder.path}", flush=True)
    print("  mixtera-hpc status")
    return 0


def _tell(plan: "SweepPlan") -> None:
    for point in plan.points:
        job = point.config.job
        print(f"{job.nodes:>4} nodes × {job.time}  {' '.join(point.overrides)}  ({_WORDS[point.action]})")
    print(f"{len(plan.due)} of {len(plan.points)} points to submit, at most {plan.node_hours:g} node-hours")


def _confirm(node_hours: float, args: Namespace) -> None:
    if args.yes or node_hours <= args.ask_above:
        return
    if not sys.stdin.isatty():
        raise LaunchError(
            f"{node_hours:g} node-hours are more than --ask-above={args.ask_above:g}. Add --yes to submit."
        )
    if input("Submit? [y/N] ").strip().lower() not in ("y", "yes"):
        raise LaunchError("Nothing was submitted.")
