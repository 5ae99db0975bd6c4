"""`mixtera-hpc sweep`: one run per combination of values, submitted to Slurm or run here, after printing the cost."""

import json
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import replace

from mixtera_hpc.cli.verbs.submit import check_data
from mixtera_hpc.config.convert import to_plain
from mixtera_hpc.config.schema import JobConfig, RunConfig
from mixtera_hpc.errors import LaunchError
from mixtera_hpc.launch.slurm.slurm_commands import JobState
from mixtera_hpc.launch.submit import check_submittable
from mixtera_hpc.launch.sweep.job_array import submit_points
from mixtera_hpc.launch.sweep.local_points import check_runnable_here, run_points
from mixtera_hpc.launch.sweep.sweep_plan import SweepPlan, plan_sweep
from mixtera_hpc.launch.sweep.sweep_wait import wait_for_runs

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
    parser.add_argument(
        "--local", action="store_true", help="run the points on this machine, one after the other, without Slurm"
    )
    parser.add_argument(
        "--wait", action="store_true", help="wait until all runs have ended, then do what report --scaling does"
    )
    add_submit_arguments(parser)
    parser.epilog = """\
Examples: a scaling curve; 6 runs, at most 2 at a time; three runs on this machine
  mixtera-hpc sweep sweep=strong experiment=demo cluster=clariden job.nodes=1,2,4 --wait
  mixtera-hpc sweep experiment=demo cluster=clariden job.nodes=1,2,4 dataplane.seed=0,1 --max-parallel 2
  mixtera-hpc sweep sweep=weak experiment=demo job.nodes=1,2,4 --local
sweep=strong keeps dataplane.global_batch_size, sweep=weak multiplies it by job.nodes. Points of one shape are submitted
as a job array. A job takes at most nodes × job.time node-hours, and a run at most job.max_attempts jobs. Repeating the
command submits only runs that are new or have not finished."""


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
    """Plan the sweep, print it, and submit or run the points that are due."""
    check_max_parallel(args)
    if not args.local:
        plan = plan_sweep(args.overrides, args.max_parallel)
        submit_plan(plan, args)
        if plan.due and not args.dry_run:
            print(f"  mixtera-hpc report --scaling {plan.points[0].record.folder}")
        return _wait_and_report(plan) if args.wait and not args.dry_run else 0
    plan = plan_sweep(args.overrides)
    _print_plan(plan, is_local=True)
    if args.dry_run:
        return 0
    _check_data(plan)
    check_runnable_here(plan.due)
    plan.record()
    num_incomplete = _run_here(plan)
    _report(plan)
    return 1 if num_incomplete else 0


def check_max_parallel(args: Namespace) -> None:
    """Refuse a number of parallel jobs below 1.

    Raises:
        LaunchError: The number is too small.
    """
    if args.max_parallel is not None and args.max_parallel < 1:
        raise LaunchError(
            f"--max-parallel is {args.max_parallel}, but at least 1 job must run at a time.\n  Give 1 or more."
        )


def submit_plan(plan: SweepPlan, args: Namespace) -> int:
    """Print a plan, and submit its due points unless --dry-run is given."""
    _print_plan(plan, is_local=False)
    if args.dry_run:
        return 0
    if plan.due:
        check_submittable(plan.due[0].config)
        _check_data(plan)
        _confirm(plan.node_hours_of_one_job, args)
    plan.record()
    if plan.due:
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
    num_submitted = 0
    try:
        for submitted in submit_points(plan.due):
            num_submitted += 1
            print(f"{submitted.job_id}  {submitted.folder.path}", flush=True)
    except LaunchError as error:
        error.add_note(f"{num_submitted} of {len(plan.due)} jobs were submitted; the same command submits the rest.")
        raise


def _run_here(plan: SweepPlan) -> int:
    """Run the points that are due, and return how many of them are not complete."""
    num_incomplete = 0
    for folder, code in run_points(plan.due):
        num_incomplete += code != 0
        print(f"exit code {code}  {folder.path}", flush=True)
    return num_incomplete


def _wait_and_report(plan: SweepPlan) -> int:
    """Wait for all runs of the sweep, compare them, and return the exit code: 1 if one is not complete, else 0."""
    folders = [folder for point in plan.points if (folder := point.record.runs().get(point.fingerprint))]
    states = {}
    for status in wait_for_runs(folders):
        states[status.folder] = status.state
        reason = f" ({status.reason})" if status.reason else ""
        print(f"{status.state}{reason}  {status.folder}", flush=True)
    _report(plan)
    return int(any(state != JobState.COMPLETED for state in states.values()))


def _report(plan: SweepPlan) -> None:
    # Imported here because it imports rich and matplotlib, which take longer than `--help` may take.
    from mixtera_hpc.cli.answers.scaling_answer import compare_sweep

    for record in dict.fromkeys(point.record for point in plan.points):
        if any(folder.metric("steps").exists() for folder in record.runs().values()):
            compare_sweep(record)
        else:
            print("No run has recorded metrics/steps.jsonl, so there is nothing to compare.")


def _print_plan(plan: SweepPlan, is_local: bool) -> None:
    for point in plan.points:
        job = point.config.job
        print(f"{job.nodes:>4} nodes × {job.time}  {' '.join(point.overrides)}  ({_TEXT_OF_ACTION[point.action]})")
    if not plan.due:
        print(f"{plan.num_finished} of {len(plan.points)} done, nothing to submit.")
    verb = "run" if is_local else "submit"
    cost = f": {plan.node_hours_of_one_job:g} node-hours with one job per run, at most {plan.node_hours:g}"
    print(f"{len(plan.due)} of {len(plan.points)} runs to {verb}{'' if is_local else cost}")


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
