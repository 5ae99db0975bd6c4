"""Run a mixing algorithm on recorded losses, or write them as a trace: `mixtera-hpc mixture replay` and `export`."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixtera_hpc.cli.console import open_console
from mixtera_hpc.cli.run_arguments import find_run
from mixtera_hpc.config.mixture.learning import checked_algorithm
from mixtera_hpc.config.yaml_files import parse_yaml_value
from mixtera_hpc.core.mixing.algorithm import make_algorithm
from mixtera_hpc.core.mixing.mixed_domains import MixedDomains
from mixtera_hpc.core.mixing.named_parameters import resolve_named
from mixtera_hpc.core.mixing.replay.loss_trace import LossTrace
from mixtera_hpc.core.mixing.replay.replay import ReplayedMixture, replay_trace
from mixtera_hpc.dataplane.mixing.reference_runs import load_named_values
from mixtera_hpc.dataplane.mixing.run_trace import RecordedRun, read_recorded_run
from mixtera_hpc.errors import ConfigError, DataError, pluralize

__all__ = ["export_trace", "replay_losses"]

MAX_DIFFERENCE = 1e-6
"""A replay agrees with a run if no weight differs by more."""

MAX_DOMAINS = 20
"""Domains in the table."""


def replay_losses(args: argparse.Namespace) -> None:
    """Replay an algorithm on a trace or a run, and write or print its mixtures."""
    path = Path(args.run_name)
    recorded: RecordedRun | None = None
    if path.suffix == ".npz" or path.is_file():
        trace = _read_trace(path)
    else:
        recorded = read_recorded_run(find_run(args))
        trace = recorded.trace
    written = _algorithm(args, recorded)
    mixed = MixedDomains.of(trace.prior).ids.tolist()
    checked_algorithm(written)  # Refuses what is wrong before files are read.
    parameters = resolve_named({k: v for k, v in written.items() if k != "name"}, trace.names, mixed, load_named_values)
    replayed = replay_trace(make_algorithm(written["name"], parameters), trace)
    if args.out is not None:
        _write(args.out, replayed.arrays(trace))
    _print_replay(trace, replayed, written)
    if recorded is not None and not _is_changed(args):
        _print_difference(recorded)


def export_trace(args: argparse.Namespace) -> None:
    """Write the losses of a run as a trace."""
    if args.out is None:
        raise ConfigError("mixture export needs --out FILE.npz.")
    if args.words or _is_changed(args):
        raise ConfigError("mixture export takes RUN and --out only; algorithms belong to mixture replay.")
    recorded = read_recorded_run(find_run(args))
    _write(args.out, recorded.trace.arrays())
    trace = recorded.trace
    validations = pluralize(len(trace.held_out_step), "validation")
    print(f"{args.out}: {len(trace.loss_mean)} steps and {validations} of {pluralize(len(trace.names), 'domain')}")
    if recorded.steps_per_line > 1:
        print(_lines_text(recorded.steps_per_line))


def _algorithm(args: argparse.Namespace, recorded: RecordedRun | None) -> dict[str, Any]:
    """Return the name and the parameters of the algorithm, as `mixture.algorithm` has them."""
    own: Mapping[str, Any] = {}
    if recorded is not None and recorded.config.mixture.kind == "dynamic":
        own = recorded.config.mixture.algorithm
    if args.algorithm is None and not own:
        raise ConfigError(
            "Name the algorithm: mixtera-hpc mixture replay TRACE.npz|RUN --algorithm ado. A run of "
            "mixture.kind=dynamic has its own."
        )
    # Parameters of the run belong to its own algorithm.
    is_own = args.algorithm in (None, own.get("name", "ado")) and bool(own)
    written = {"name": "ado", **own} if is_own else {"name": args.algorithm}
    if args.variant is not None:
        written["variant"] = args.variant
    return written | _parameters(args.words)


def _parameters(words: Sequence[str]) -> dict[str, Any]:
    """Return the parameters of `algorithm.KEY=VALUE` words; values are YAML."""
    parameters = {}
    for word in words:
        key, separator, value = word.partition("=")
        name = key.removeprefix("mixture.").removeprefix("algorithm.")
        if not separator or name == key or not name:
            raise ConfigError(f"{word!r} is not a parameter. Write algorithm.KEY=VALUE, e.g. algorithm.warmup=1000.")
        parameters[name] = parse_yaml_value(word, value)
    return parameters


def _is_changed(args: argparse.Namespace) -> bool:
    """Return True if the replay is not that of the run's own algorithm."""
    return bool(args.algorithm or args.variant or args.words)


def _read_trace(path: Path) -> LossTrace:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
    # numpy, zipfile, zlib and tokenize raise a dozen unrelated types for damaged bytes.
    except Exception as error:
        raise DataError(
            f"{path} cannot be read as an npz file: {error}.\n  Give a trace of losses, or a run."
        ) from None
    return LossTrace.from_arrays(arrays, str(path))


def _write(path: Path, arrays: Mapping[str, Any]) -> None:
    if path.suffix != ".npz":
        raise ConfigError(f"--out is {path}, expected a name that ends in .npz.")
    try:
        np.savez_compressed(path, **arrays)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}. Choose another --out.") from None


def _print_replay(trace: LossTrace, replayed: ReplayedMixture, written: Mapping[str, Any]) -> None:
    # rich takes 0.1 s to import, which `mixture set` does not need.
    from rich.table import Table

    last = replayed.mixture[-1] if len(replayed.mixture) else trace.prior
    title = f"{written['name']} on {len(replayed.mixture)} steps of {len(trace.names)} domains"
    table = Table(title=title, title_justify="left")
    for heading in ("domain", "mu", "weight after the last step", "smallest", "largest"):
        table.add_column(heading, justify="left" if heading == "domain" else "right")
    mixtures = replayed.mixture if len(replayed.mixture) else trace.prior[None]
    by_weight = np.argsort(-last, kind="stable")
    for d in by_weight[:MAX_DOMAINS].tolist():
        column = mixtures[:, d]
        table.add_row(
            trace.names[d], f"{trace.prior[d]:.4f}", f"{last[d]:.4f}", f"{column.min():.4f}", f"{column.max():.4f}"
        )
    console = open_console()
    console.print(table)
    if len(by_weight) > MAX_DOMAINS:
        console.print(f"and {len(by_weight) - MAX_DOMAINS} more domains")
    if len(replayed.refit_steps):
        console.print(f"laws were fitted in the steps {', '.join(map(str, replayed.refit_steps.tolist()))}")


def _print_difference(recorded: RecordedRun) -> None:
    difference = recorded.compare()
    if not difference.num_chunks:
        print("No recorded chunk has weights that depend on losses yet.")
        return
    verdict = "agrees with" if difference.largest <= MAX_DIFFERENCE else "DIFFERS from"
    print(
        f"The replay {verdict} the recorded weights of {difference.num_chunks} chunks; the largest difference of a "
        f"weight is {difference.largest:.2g}."
    )
    if recorded.steps_per_line > 1:
        print(_lines_text(recorded.steps_per_line))


def _lines_text(steps_per_line: int) -> str:
    return (
        f"The metrics have one line for {steps_per_line} steps (training.log_every), so losses within a line count as "
        "equal; a run with training.log_every=1 replays exactly."
    )
