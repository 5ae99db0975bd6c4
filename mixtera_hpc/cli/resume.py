"""`mixtera-hpc resume`: the next attempt of a run, in its folder.

A run that Slurm ran is submitted again. A local run, or any run when an MPI launcher started this process, goes on here:
`mpiexec -n 8 mixtera-hpc resume RUN` runs this file in every rank.
"""

import re
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixtera_hpc.config.run_folder import RunFolder
    from mixtera_hpc.launch.resume import ResumeRequest

__all__ = ["arguments", "run"]


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run_name", metavar="RUN", help="run id, name or folder")
    parser.add_argument("overrides", nargs="*", help="what changes, e.g. job.nodes=4 training.num_steps=2000")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--here", action="store_true", help="go on in this process, whoever ran it before")
    where.add_argument("--submit", action="store_true", help="submit it, even if it ran here before")
    parser.add_argument("--wait", action="store_true", help="follow a submitted run and leave with its exit code")
    parser.add_argument("--root", type=Path, help="folder of all runs (default: $MIXTERA_RUNS or ./runs)")
    surgery = parser.add_argument_group(
        "surgery", "each takes effect at the checkpoint gone on from, and is recorded in the run's journal"
    )
    surgery.add_argument(
        "--skip-steps", metavar="A..B", help="pass over the data of steps A to B; goes on from a checkpoint before A"
    )
    surgery.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="EXPR",
        help="leave samples out from now on, e.g. \"source == 'x'\"",
    )
    surgery.add_argument("--change-seed", action="store_true", help="allow dataplane.seed=N to differ")
    surgery.add_argument(
        "--change-batch-size", action="store_true", help="allow dataplane.global_batch_size=N to differ"
    )


def run(args: Namespace) -> int:
    from mixtera_hpc.comm.launcher import started_by_mpi
    from mixtera_hpc.config.run_folder import RunFolder, runs_root
    from mixtera_hpc.launch.resume import was_submitted

    folder = RunFolder.find(args.run_name, args.root or runs_root())
    change = _change(args)
    if not args.submit and (args.here or started_by_mpi() or not was_submitted(folder)):
        from mixtera_hpc.cli.run import run_folder

        return int(run_folder(folder, args.overrides, change=change))
    return _submit(folder, args, change)


def _submit(folder: "RunFolder", args: Namespace, change: "ResumeRequest") -> int:
    from mixtera_hpc.cli.run import take_over
    from mixtera_hpc.cli.submit import follow_submitted, print_submitted
    from mixtera_hpc.launch.resume import amended_config, check_ended
    from mixtera_hpc.launch.submit import submit_attempt

    newest = check_ended(folder)
    config = amended_config(folder, args.overrides, change)
    take_over(folder, config, args.overrides, change)
    submitted = submit_attempt(folder, config, after=newest)
    print_submitted(submitted)
    return follow_submitted(submitted) if args.wait else 0


def _change(args: Namespace) -> "ResumeRequest":
    from mixtera_hpc.launch.resume import ResumeRequest

    return ResumeRequest(
        skip_steps=_steps(args.skip_steps) if args.skip_steps else None,
        drop=tuple(args.drop),
        seed=args.change_seed,
        batch_size=args.change_batch_size,
    )


def _steps(text: str) -> tuple[int, int]:
    from mixtera_hpc.errors import ConfigError

    match = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if not match or int(match[1]) > int(match[2]):
        raise ConfigError(
            f"--skip-steps is {text!r}, expected the first and the last step, e.g. --skip-steps 990..1010."
        )
    return int(match[1]), int(match[2])
