"""The `mixtera-hpc` command: choose the verb, import only that verb's module, turn errors into exit codes.

A verb is a module of `cli.verbs` with `arguments(parser)` and `run(args) -> int`. Nothing heavier than argparse is
imported before the verb is known.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

from mixtera_hpc import __version__
from mixtera_hpc.cli.logging_setup import messages_on_stderr
from mixtera_hpc.cli.safe_output import escaped_output, open_closed_streams
from mixtera_hpc.config.files.file_trust import deny_world_write
from mixtera_hpc.errors import MixteraError, did_you_mean, explain_system_error, missing_package

__all__ = ["GROUPS", "VERBS", "main", "verb_parser"]

GROUPS: Mapping[str, Mapping[str, str]] = {
    "Start here": {
        "demo": "train, stop, resume, verify and report on this machine's own text, with nothing to configure",
    },
    "Data": {
        "migrate": "write an experiment with the data sets and weights of another loader",
        "index": "build, inspect, verify or refresh the property index of a data collection, or add properties",
        "query": "count the samples and tokens of every domain",
        "tokenize": "write the token ids of all documents of an index, for runs that tokenize nothing",
        "tokenizer": "train a tokenizer on the documents that a mixture selects",
        "plan": "forecast what a mixture will serve, or list the sequences of chosen steps",
    },
    "Runs": {
        "run": "train here, in one process or as every rank of mpiexec, srun or torchrun",
        "submit": "submit a run to Slurm; --dry-run prints the script",
        "sweep": "submit one run per combination of values",
        "swarm": "find a mixture: train small proxies on sampled mixtures, fit their losses, propose the best one",
        "resume": "continue a run in its folder, with any number of ranks",
        "status": "list runs and the state of their jobs",
        "runs": "list runs with what they were started with, and choose among them",
        "watch": "show the mixture, losses, speed and slowest rank of a run while it trains",
        "logs": "print or follow the logs of a run",
        "cancel": "cancel the jobs of a run",
        "mixture": "show the mixture of a run, change it while the run trains, or replay an algorithm on its losses",
        "fork": "continue a checkpoint of a run on several mixtures, as runs of their own",
        "trace": "list the samples of any step of a run, or prove what it consumed",
        "report": "print tables and write plots and an HTML page from recorded metrics",
    },
    "Cluster": {
        "check": "check a configuration, or that every experiment fits every cluster, without submitting anything",
        "doctor": "report what works on this machine: MPI, HDF5, Slurm, GPUs",
        "completion": "complete verbs, keys and runs with the Tab key in bash, zsh or fish",
    },
}
"""Verbs and their summaries, in the order of `--help`."""

VERBS: Mapping[str, str] = {verb: summary for group in GROUPS.values() for verb, summary in group.items()}

_EPILOG = """\
Settings are Hydra overrides: mixtera-hpc plan experiment=demo dataplane.seed=3
Exit codes: 0 success, 1 internal error, 2 wrong input, 75 state saved (continue with resume)
Options of a verb: mixtera-hpc VERB --help"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"mixtera-hpc {__version__}")
        return 0
    if argv[0] not in VERBS:
        hint = did_you_mean(argv[0], list(VERBS))
        print(f"mixtera-hpc has no verb {argv[0]!a}.{hint}\n  List them with mixtera-hpc --help.", file=sys.stderr)
        return 2
    return _run_verb(argv[0], argv[1:])


def verb_parser(verb: str) -> tuple[argparse.ArgumentParser, ModuleType]:
    """Import the module of `verb` and return the parser of its arguments, and the module."""
    module = importlib.import_module(f"mixtera_hpc.cli.verbs.{verb}")
    parser = argparse.ArgumentParser(
        prog=f"mixtera-hpc {verb}",
        description=f"{VERBS[verb][0].upper()}{VERBS[verb][1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.arguments(parser)
    return parser, module


def _run_verb(verb: str, argv: list[str]) -> int:
    deny_world_write()
    open_closed_streams()
    with escaped_output():
        return _run_unescaped(verb, argv)


def _run_unescaped(verb: str, argv: list[str]) -> int:
    try:
        parser, module = verb_parser(verb)
        args = parser.parse_intermixed_args(argv)
        with messages_on_stderr():
            code = int(module.run(args))
        # A reader that closed the pipe is noticed here. At exit, the interpreter would print an error about it.
        sys.stdout.flush()
        return code
    except ModuleNotFoundError as error:
        explained = missing_package(error)
        if explained is None:
            raise
        print(f"{type(explained).__name__}: {explained}", file=sys.stderr)
        return explained.exit_code
    except MixteraError as error:
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        print(f"{type(error).__name__}: {error}{notes}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError, RuntimeError) as error:
        if (message := explain_system_error(error)) is None:
            raise
        print(f"{type(error).__name__}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _usage() -> str:
    width = max(map(len, VERBS)) + 2
    lines = ["usage: mixtera-hpc VERB [overrides] [options]"]
    for group, verbs in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {verb:<{width}}{summary}" for verb, summary in verbs.items())]
    return "\n".join([*lines, "", _EPILOG])


if __name__ == "__main__":
    sys.exit(main())
