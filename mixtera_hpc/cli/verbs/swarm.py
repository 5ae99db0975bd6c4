"""`mixtera-hpc swarm`: sample mixtures, train a small proxy run on each, fit their losses, and propose a mixture."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from mixtera_hpc.cli.verbs.sweep import add_submit_arguments
from mixtera_hpc.errors import ConfigError

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "action",
        choices=("sample", "train", "submit", "fit"),
        help="sample: write the mixtures of the proxies; train: train them here, one after another; submit: submit "
        "them to Slurm; fit: collect their losses, and write the proposed mixture and a page",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of the swarm; its name is that of the runs")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="sample: Hydra overrides of the proxies; fit: swarm.objective, swarm.regression or swarm.penalty",
    )
    parser.add_argument(
        "--reuse",
        metavar="FOLDER",
        type=Path,
        help="sample: an earlier swarm over some of the domains. Its proposal keeps its ratios, so that few proxies "
        "suffice, and its runs take part in the fit",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="train, submit: not the proxies, but the proposal, and the natural and the uniform mixture beside it",
    )
    _add_table_arguments(parser)
    add_submit_arguments(parser)
    parser.epilog = """\
Example:
  mixtera-hpc swarm sample pilot experiment=demo mixture=natural mixture.group_by=[kind] query.holdout.fraction=0.05 \\
    training.num_steps=100 training.validate_every=100 swarm.num_proxies=24
  mixtera-hpc swarm train pilot
  mixtera-hpc swarm fit pilot
  mixtera-hpc swarm train pilot --check
  MIXTERA_CONF=pilot mixtera-hpc plan experiment=demo mixture=pilot-proposal
Repeating `train` or `submit` continues with the proxies that have not finished."""


def _add_table_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the tables of runs that were trained elsewhere."""
    parser.add_argument(
        "--ratios", metavar="FILE", type=Path, help="fit: mixtures of other runs (default: those of the proxies)"
    )
    parser.add_argument("--metrics", metavar="FILE", type=Path, help="fit: losses that were measured elsewhere")


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    _check_arguments(args)
    # Imported here because numpy and h5py take longer to import than `--help` may take.
    from mixtera_hpc.cli.answers.swarm_answer import fit, sample, submit, train

    actions = {"sample": sample, "train": train, "submit": submit, "fit": fit}
    return actions[args.action](args)


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse options of another action."""
    _check_unused(args, {"--reuse": args.reuse}, ("sample",))
    _check_unused(args, {"--check": args.check}, ("train", "submit"))
    _check_unused(args, {"--ratios": args.ratios, "--metrics": args.metrics}, ("fit",))
    submit_options = {"--max-parallel": args.max_parallel, "--yes": args.yes, "--dry-run": args.dry_run}
    _check_unused(args, submit_options, ("submit",))
    if args.overrides and args.action in ("train", "submit"):
        raise ConfigError(
            f"swarm {args.action} takes no overrides, but got {args.overrides[0]!r}: all proxies have those of swarm "
            "sample.\n  Leave it out, or sample into another folder."
        )


def _check_unused(args: argparse.Namespace, values: Mapping[str, object], owners: tuple[str, ...]) -> None:
    for option, value in values.items():
        if value and args.action not in owners:
            raise ConfigError(f"{option} belongs to swarm {' and '.join(owners)}, not to {args.action}. Leave it out.")
