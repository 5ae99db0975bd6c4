"""`mixtera-hpc watch`: a live view of a run: mixture, losses of its domains, speed, slowest ranks, time left."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace

from mixtera_hpc.cli.run_arguments import add_run_argument

__all__ = ["arguments", "run"]


def arguments(parser: ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_run_argument(parser)
    parser.add_argument(
        "--interval", type=_seconds, default=2.0, metavar="SECONDS", help="time between two views (default: 2)"
    )
    parser.add_argument("--once", action="store_true", help="print one view, as for a file or a pipe")
    parser.epilog = """\
Examples:
  mixtera-hpc watch demo
  mixtera-hpc watch demo --once
On a terminal the view fills the screen until the run ends or you press Ctrl-C. Numbers are medians of the last 20 lines
of metrics/steps.jsonl; `change` compares the loss with the 20 lines before."""


def run(args: Namespace) -> int:
    """Show the run."""
    # Imported here because numpy takes longer to import than `--help` may take.
    from mixtera_hpc.cli.answers.runs.watch_answer import watch

    watch(args)
    return 0


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 3600")
    return seconds
