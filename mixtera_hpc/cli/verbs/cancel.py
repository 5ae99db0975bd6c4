"""`mixtera-hpc cancel`: end a run, now or after it has saved."""

from argparse import ArgumentParser, Namespace

from mixtera_hpc.cli.run_arguments import add_run_argument, find_run
from mixtera_hpc.launch.cancel import cancel_after_save, cancel_now

__all__ = ["arguments", "run"]


def arguments(parser: ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_run_argument(parser)
    parser.add_argument(
        "--after-save",
        action="store_true",
        help="let running jobs write a checkpoint before they stop; waiting jobs are cancelled at once",
    )
    parser.epilog = """\
Follow-up jobs of the run are cancelled too. A local run gets SIGTERM; the reference trainer then saves and stops.
A cancelled run can be continued with mixtera-hpc resume RUN."""


def run(args: Namespace) -> int:
    """Cancel the run and print what was ended."""
    folder = find_run(args)
    done = cancel_after_save(folder) if args.after_save else cancel_now(folder)
    if done.ended:
        print(f"ended   {' '.join(done.ended)}")
    if done.saving:
        print(f"saving  {' '.join(done.saving)}")
    print(f"  mixtera-hpc resume {folder.path}")
    return 0
