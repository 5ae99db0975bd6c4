"""The four actions of `mixtera-hpc swarm`."""

import argparse
from datetime import UTC, datetime

import numpy as np

from mixtera_hpc.cli.console import open_console
from mixtera_hpc.cli.verbs.sweep import check_max_parallel, submit_plan
from mixtera_hpc.comm.launch_environment import find_launcher
from mixtera_hpc.config.compose import compose, compose_plain
from mixtera_hpc.config.convert import from_plain, raise_problems, to_plain
from mixtera_hpc.config.files.json_text import parse_json
from mixtera_hpc.config.mixture.check_swarm import swarm_problems
from mixtera_hpc.config.schema import SwarmConfig
from mixtera_hpc.errors import ConfigError, DataError, LaunchError, pluralize
from mixtera_hpc.launch.attempts import start_local_attempt
from mixtera_hpc.launch.prepare import prepare_run
from mixtera_hpc.launch.sweep.sweep_plan import SweepPoint
from mixtera_hpc.swarm.mixture_file import mixture_text
from mixtera_hpc.swarm.swarm_fit import SwarmFit, fit_swarm
from mixtera_hpc.swarm.swarm_folder import SwarmFolder, SwarmRecord
from mixtera_hpc.swarm.swarm_reuse import open_earlier
from mixtera_hpc.swarm.swarm_runs import SwarmRuns
from mixtera_hpc.swarm.swarm_sample import sample_swarm
from mixtera_hpc.training.continue_run import continue_run
from mixtera_hpc.training.run_attempt import Attempt, check_trained_here, run_attempt

__all__ = ["fit", "sample", "submit", "train"]

FIT_SETTINGS = ("objective", "regression", "penalty")
"""Keys of `swarm` that can change after the mixtures were sampled."""


def sample(args: argparse.Namespace) -> int:
    """Sample the mixtures of all proxies and write them."""
    folder = SwarmFolder.named(args.folder)
    config = compose(args.overrides)
    earlier = open_earlier(SwarmFolder.named(args.reuse), config) if args.reuse else None
    record = sample_swarm(folder, config, args.overrides, earlier)
    _print_mixtures(folder, record)
    for verb in ("train", "submit"):
        print(f"  mixtera-hpc swarm {verb} {args.folder}")
    return 0


def train(args: argparse.Namespace) -> int:
    """Train the runs that have not finished, in this process; return the first exit code that is not 0."""
    launcher = find_launcher()
    if launcher is not None and launcher.started_several:
        raise LaunchError(
            f"swarm train runs in one process, but {launcher.name} started {launcher.size}: each would train all "
            "proxies.\n  Start it without a launcher, or use mixtera-hpc swarm submit."
        )
    folder = SwarmFolder.named(args.folder)
    plan = _runs(folder, args).plan()
    for number, point in enumerate(plan.due, 1):
        print(f"{point.config.run.id}: {number} of {len(plan.due)}", flush=True)
        code = _train(point)
        if code:
            return code
    print(f"{len(plan.due)} trained, {len(plan.points) - len(plan.due)} had finished or are active.")
    print(f"  mixtera-hpc swarm fit {args.folder}")
    return 0


def submit(args: argparse.Namespace) -> int:
    """Submit the runs that have not finished, as a sweep."""
    check_max_parallel(args)
    return submit_plan(_runs(SwarmFolder.named(args.folder), args).plan(args.max_parallel), args)


def fit(args: argparse.Namespace) -> int:
    """Fit the losses of the finished proxies, and write the proposal and its page."""
    folder = SwarmFolder.named(args.folder)
    if args.ratios is not None and args.metrics is None:
        raise ConfigError("--ratios needs --metrics, the losses of the same runs.\n  Give both files.")
    outside = [(args.ratios or folder.ratios, args.metrics)] if args.metrics is not None else []
    result = fit_swarm(folder, _fit_settings(folder.read(), args.overrides), outside)

    path = folder.mixture_file(folder.proposal_name)
    folder.write(path, mixture_text(result.record.proposed_mixture(result.proposal), _comment(folder, result)))
    folder.write_json(folder.proposal_record, result.to_plain())
    # Imported here because it imports matplotlib, which only this action needs.
    from mixtera_hpc.swarm.swarm_page import swarm_page

    folder.write(folder.page, swarm_page(folder, result))
    _print_fit(result)
    print(f"Page      {folder.page}")
    print(f"Mixture   {path}")
    print(f"  MIXTERA_CONF={args.folder} mixtera-hpc plan … mixture={folder.proposal_name}")
    if result.measured_check(2) is None:
        print(
            f"  mixtera-hpc swarm train {args.folder} --check    # or submit: the proposal beside natural and uniform"
        )
    return 0


def _comment(folder: SwarmFolder, result: SwarmFit) -> str:
    """Return the comment above the proposed mixture."""
    comment = f"Proposed by mixtera-hpc swarm fit from {len(result.measured.runs)} runs; see {folder.page.name}."
    if result.record.num_phases > 1 and not result.record.starts_in_tokens:
        steps = result.record.config.training.num_steps
        comment += f"\nThe starts are steps of a proxy, which has {steps}. Scale them for the final run."
    return comment


def _runs(folder: SwarmFolder, args: argparse.Namespace) -> SwarmRuns:
    """Return the proxies, or with --check the runs that verify the proposal."""
    record = folder.read()
    if not args.check:
        return SwarmRuns.proxies(folder, record)
    if not folder.proposal_record.is_file():
        raise DataError(
            f"{folder.path} has no proposal to check.\n  Make it first: mixtera-hpc swarm fit {args.folder}"
        )
    proposal = parse_json(folder.proposal_record.read_text(encoding="utf-8"))
    return SwarmRuns.checks(folder, record, np.array(proposal["weights"], np.float64).reshape(-1))


def _train(point: SweepPoint) -> int:
    """Train one run from its start, or from its newest checkpoint."""
    if point.folder is not None:
        return continue_run(point.folder)
    check_trained_here(point.config)

    def prepare(num_ranks: int) -> Attempt:
        run = prepare_run(point.config, point.overrides, datetime.now(UTC))
        attempt = Attempt(folder=run, number=start_local_attempt(run, point.config, ranks=num_ranks))
        point.record.add_run(point.fingerprint, run.run_id, point.overrides)
        return attempt

    return run_attempt(point.config.dataplane.comm, prepare)


def _fit_settings(record: SwarmRecord, overrides: list[str]) -> SwarmConfig:
    """Return the settings that the swarm was sampled with, changed by overrides."""
    if not overrides:
        return record.config.swarm
    keys = [word.partition("=")[0].partition(".")[2].partition(".")[0] for word in overrides]
    for word, key in zip(overrides, keys, strict=True):
        if not word.startswith("swarm.") or key not in FIT_SETTINGS:
            raise ConfigError(
                f"swarm fit takes {', '.join(f'swarm.{name}' for name in FIT_SETTINGS)}, but got {word!r}: all other "
                "settings belong to swarm sample.\n  Leave it out."
            )
    composed = compose_plain(overrides)["swarm"]
    settings = from_plain(SwarmConfig, {**to_plain(record.config.swarm), **{key: composed[key] for key in keys}})
    raise_problems(swarm_problems(settings))
    return settings


def _print_mixtures(folder: SwarmFolder, record: SwarmRecord) -> None:
    # rich takes 0.1 s to import, which --help does not need.
    from rich.table import Table

    table = Table(title=f"{pluralize(len(record.mixtures), 'proxy run')} in {folder.path}", title_justify="left")
    for heading in ("domain", "natural", "smallest", "mean", "largest", "at most"):
        table.add_column(heading, justify="left" if heading == "domain" else "right")
    mixtures = record.mixtures if len(record.mixtures) else np.full((1, len(record.columns)), np.nan)
    columns = (record.natural, mixtures.min(axis=0), mixtures.mean(axis=0), mixtures.max(axis=0), record.high)
    for domain, name in enumerate(record.columns):
        table.add_row(name, *(f"{column[domain]:.3f}" for column in columns))
    open_console().print(table)


def _print_fit(result: SwarmFit) -> None:
    from rich.table import Table  # See `_print_mixtures`.

    console = open_console()
    unfinished = f"; {pluralize(result.num_unfinished, 'proxy run')} unfinished" if result.num_unfinished else ""
    console.print(f"{len(result.measured.runs)} runs, {pluralize(len(result.measured.metrics), 'metric')}{unfinished}")
    for candidate in result.validated:
        law = candidate.laws[0]
        chosen_for = pluralize(sum(own == law for own in result.chosen.laws), "metric")
        console.print(f"{law.name:<12} cross-validated error {candidate.rmse:.4f}, chosen for {chosen_for}")
    console.print(f"{'chosen':<12} cross-validated error {result.chosen.rmse:.4f}")
    console.print(f"{'constant':<12} cross-validated error {result.constant_rmse:.4f}")

    table = Table(title="mean loss", title_justify="left")
    for heading in ("mixture", "predicted", "measured"):
        table.add_column(heading, justify="left" if heading == "mixture" else "right")
    for place, name in enumerate(result.checks.names):
        measured = result.measured_check(place)
        table.add_row(name, f"{result.predicted[place]:.4f}", "—" if measured is None else f"{measured:.4f}")
    console.print(table)
    weights = Table(title="proposed mixture", title_justify="left")
    for heading in ("domain", "natural", "proposed"):
        weights.add_column(heading, justify="left" if heading == "domain" else "right")
    record = result.record
    for name, before, after in zip(record.columns, record.natural, result.proposal, strict=True):
        weights.add_row(name, f"{before:.4f}", f"{after:.4f}")
    console.print(weights)
