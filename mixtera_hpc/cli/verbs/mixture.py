"""`mixtera-hpc mixture`: show the mixture of a run, request another one, or replay an algorithm on recorded losses."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from mixtera_hpc.cli.run_arguments import add_run_argument
from mixtera_hpc.errors import ConfigError

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "action",
        choices=("show", "set", "replay", "export"),
        help="show: the weights of the run and how they changed; set: request another mixture; replay: run a mixing "
        "algorithm on the losses of a run or a trace; export: write the losses of a run as a trace",
    )
    add_run_argument(parser)
    parser.add_argument(
        "words",
        metavar="WORD",
        nargs="*",
        help="set: a YAML file with the keys below `mixture:`, e.g. kind, domains; replay (RUN may be a TRACE.npz): "
        "algorithm.KEY=VALUE",
    )
    parser.add_argument(
        "--algorithm", metavar="NAME", help="replay: its name or import path (default: that of the run)"
    )
    parser.add_argument("--variant", metavar="NAME", help="replay: the variant of the algorithm, e.g. paper")
    parser.add_argument("--out", metavar="FILE.npz", type=Path, help="replay, export: the file to write")
    parser.add_argument(
        "--at-chunk", metavar="N", help="set: the first chunk that uses the mixture (default: the next one)"
    )
    parser.add_argument(
        "--json", action="store_true", help="show: print one JSON object per change of weights and per decision"
    )
    parser.epilog = """\
Examples:
  mixtera-hpc mixture show demo
  mixtera-hpc mixture set demo mixture.yaml --at-chunk 40
  mixtera-hpc mixture export demo --out trace.npz
  mixtera-hpc mixture replay trace.npz --algorithm ado --variant paper --out paper.npz algorithm.warmup=100
  mixtera-hpc mixture replay demo"""


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    # Imported here because h5py and numpy take longer to import than `--help` may take.
    if args.action in ("replay", "export"):
        from mixtera_hpc.cli.answers.replay_answer import export_trace, replay_losses

        _check_unused(args, {"--at-chunk": args.at_chunk, "--json": args.json}, "set or show")
        (replay_losses if args.action == "replay" else export_trace)(args)
        return 0
    from mixtera_hpc.cli.answers.mixture_answer import show_or_set_mixture

    _check_unused(args, {f"--{n}": getattr(args, n) for n in ("algorithm", "variant", "out")}, "replay or export")
    show_or_set_mixture(args)
    return 0


def _check_unused(args: argparse.Namespace, values: Mapping[str, object], owner: str) -> None:
    """Refuse options of another action."""
    for option, value in values.items():
        if value:
            raise ConfigError(f"{option} belongs to mixture {owner}, not to mixture {args.action}. Leave it out.")
