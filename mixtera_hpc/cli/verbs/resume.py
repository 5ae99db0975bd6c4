"""`mixtera-hpc resume`: start the next attempt of a run, in its folder.

A run that Slurm ran is submitted again. A local run continues in this process, and so does every run under a
launcher: `mpiexec -n 8 mixtera-hpc resume RUN` runs this module in every rank.
"""

import re
from argparse import ArgumentParser, Namespace
from pathlib import Path

from mixtera_hpc.cli.all_ranks import run_on_all_ranks
from mixtera_hpc.cli.run_arguments import add_run_argument, find_run
from mixtera_hpc.cli.verbs.submit import follow_submitted, print_submitted
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.launch.newest_attempt import was_submitted
from mixtera_hpc.launch.resume import ResumeRequest

__all__ = ["arguments", "run"]


EPILOG = """\
Without --here and --submit, a run that was a Slurm job is submitted again, and any other run continues in this process.
Under mpiexec, srun or torchrun, every run continues in these ranks.

Examples:
  mixtera-hpc resume demo job.nodes=4 training.num_steps=2000
  mpiexec -n 2 mixtera-hpc resume demo
  mixtera-hpc resume demo --drop "source == 'x'" --skip-steps 990..1010
  mixtera-hpc resume demo --drop-documents worst.jsonl
  mixtera-hpc resume demo --change-seq-len 8192

Without these flags, keys that identify the run's data or model cannot change; the error message names them."""


def arguments(parser: ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_run_argument(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides on the recorded configuration"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--here", action="store_true", help="train in this process, even if the run was a Slurm job before"
    )
    where.add_argument("--submit", action="store_true", help="submit a job, even if the run was local before")
    parser.add_argument(
        "--wait",
        action="store_true",
        help="after submitting, print the run's logs until it ends; exit with its exit code",
    )
    _add_edits(parser)
    parser.epilog = EPILOG


def _add_edits(parser: ArgumentParser) -> None:
    edits = parser.add_argument_group(
        "run edits",
        "Changes to the data of the coming steps. They take effect at the checkpoint that the run\n"
        "continues from, and are recorded in the run's decisions.jsonl.",
    )
    edits.add_argument(
        "--skip-steps",
        metavar="A..B",
        help="skip the data of steps A to B; the run continues from a checkpoint at or before step A",
    )
    edits.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="EXPRESSION",
        help="do not serve samples that match, e.g. \"source == 'x'\"; repeatable, and permanent for the run",
    )
    edits.add_argument(
        "--drop-documents",
        metavar="FILE",
        type=Path,
        help='do not serve the documents of FILE, one {"shard": "a.jsonl", "row": 17} per line, as written by '
        "mixtera-hpc trace RUN --worst N --write FILE; permanent for the run",
    )
    edits.add_argument("--change-seed", action="store_true", help="allow a new dataplane.seed=N")
    edits.add_argument(
        "--change-batch-size",
        action="store_true",
        help="allow a new dataplane.global_batch_size=N or dataplane.batch_schedule=[…]",
    )
    edits.add_argument(
        "--change-seq-len",
        metavar="N",
        type=int,
        help="cut the coming tokens into sequences of N: those of the epoch that were not served yet, each once",
    )


def run(args: Namespace) -> int:
    """Continue the run here, on every rank, or submit it."""
    return run_on_all_ranks(lambda: _resume(args))


def _resume(args: Namespace) -> int:
    # Imported here because they import numpy, which takes longer than `--help` may take.
    from mixtera_hpc.cli.documents_file import read_documents
    from mixtera_hpc.comm.launcher import started_by_launcher
    from mixtera_hpc.launch.attempts import is_own_program
    from mixtera_hpc.training.continue_run import continue_run, edit_program_run, submit_next_attempt

    folder = find_run(args)
    drop = list(args.drop)
    if args.drop_documents is not None:
        drop.append(read_documents(args.drop_documents))
    request = ResumeRequest(
        skip_steps=_steps(args.skip_steps) if args.skip_steps else None,
        drop=tuple(drop),
        change_seed=args.change_seed,
        change_batch_size=args.change_batch_size,
        change_seq_len=args.change_seq_len is not None,
    )
    overrides = list(args.overrides)
    if args.change_seq_len is not None:
        overrides.append(_seq_len_override(args.change_seq_len, overrides))
    starts_attempt = args.here or args.submit or args.wait or started_by_launcher()
    if request.has_edits and not starts_attempt and is_own_program(folder):
        to_set = edit_program_run(folder, overrides, request)
        settings = f" with {' '.join(to_set)}" if to_set else ""
        print(f"Start your program again{settings}, and let it load its newest state.")
        return 0
    if not args.submit and (args.here or started_by_launcher() or not was_submitted(folder)):
        return continue_run(folder, overrides, request)
    submitted = submit_next_attempt(folder, overrides, request)
    print_submitted(submitted)
    return follow_submitted(submitted) if args.wait else 0


def _seq_len_override(seq_len: int, overrides: list[str]) -> str:
    """Return the override of `--change-seq-len`; refuse a second value."""
    override = f"dataplane.seq_len={seq_len}"
    others = [word for word in overrides if word.startswith("dataplane.seq_len=") and word != override]
    if others:
        raise ConfigError(f"--change-seq-len is {seq_len}, but {others[0]} is given as well.\n  Remove one of them.")
    return override


def _steps(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if not match or int(match[1]) > int(match[2]):
        raise ConfigError(
            f"--skip-steps is {text!r}, but must be the first and the last step.\n  For example --skip-steps 990..1010."
        )
    return int(match[1]), int(match[2])
