"""The `mixtera-hpc` command: picks the verb, imports only that verb's module, turns errors into exit codes.

A verb is a module with `arguments(parser)` and `run(args) -> int`; nothing heavier than argparse is imported before it.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from mixtera_hpc import __version__
from mixtera_hpc.errors import MixteraError, did_you_mean

__all__ = ["VERBS", "main"]

VERBS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "run everything once on this machine, on real text, and write a report"),
    "index": ("index", "build, inspect, verify, refresh or extend the property index of a data collection"),
    "query": ("query", "count samples and tokens of every domain"),
    "plan": ("plan", "forecast what a mixture will serve, or list the sequences of chosen steps"),
    "trace": ("trace", "name the samples of any step of a run, or prove what it consumed"),
    "mixture": ("mixture", "show what a run is served from, or change it while the run goes on"),
    "run": ("run", "train here: one process, or every rank of an mpiexec or srun"),
    "submit": ("submit", "send a run to Slurm; --dry-run prints the script"),
    "sweep": ("sweep", "submit one run per combination of values"),
    "status": ("status", "list runs and what Slurm says of them"),
    "logs": ("logs", "show or follow the logs of a run"),
    "cancel": ("cancel", "cancel a run's jobs"),
    "resume": ("resume", "continue a run in its folder, with any number of ranks"),
    "report": ("report", "tables, plots and an HTML page from recorded metrics"),
    "validate": ("validate", "check that every experiment fits every cluster"),
    "doctor": ("doctor", "say what works on this machine: MPI, HDF5, Slurm, GPUs"),
}

_EPILOG = """\
Settings are Hydra overrides: mixtera-hpc plan experiment=demo dataplane.seed=3
Exit codes: 0 done · 2 your input · 1 our fault · 75 saved, run me again
mixtera-hpc VERB --help says more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"mixtera-hpc {__version__}")
        return 0
    if argv[0] not in VERBS:
        print(
            f"{argv[0]!r} is not a verb.{did_you_mean(argv[0], list(VERBS))}\n  See mixtera-hpc --help.",
            file=sys.stderr,
        )
        return 2
    return _run_verb(argv[0], argv[1:])


def _run_verb(verb: str, argv: list[str]) -> int:
    module_name, summary = VERBS[verb]
    module = importlib.import_module(f"mixtera_hpc.cli.{module_name}")
    parser = argparse.ArgumentParser(prog=f"mixtera-hpc {verb}", description=summary, allow_abbrev=False)
    module.arguments(parser)
    args = parser.parse_intermixed_args(argv)
    try:
        code = int(module.run(args))
        sys.stdout.flush()  # Here, where a reader that has left is answered; the interpreter would complain at its end.
        return code
    except MixteraError as error:
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        print(f"{type(error).__name__}: {error}{notes}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _usage() -> str:
    width = max(map(len, VERBS)) + 2
    verbs = "\n".join(f"  {verb:<{width}}{summary}" for verb, (_, summary) in VERBS.items())
    return f"usage: mixtera-hpc VERB [overrides] [options]\n\n{verbs}\n\n{_EPILOG}"


if __name__ == "__main__":
    sys.exit(main())
