"""Show the mixture of a run and its history, or leave a request for another one: `mixtera-hpc mixture`."""

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from mixtera_hpc.cli.console import open_console
from mixtera_hpc.cli.run_arguments import find_run
from mixtera_hpc.config.compose import load_config
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.yaml_files import read_yaml
from mixtera_hpc.dataplane.mixing.requests import MixtureDecision, read_decisions
from mixtera_hpc.dataplane.mixing.submission import submit_request
from mixtera_hpc.dataplane.mixing.weight_changes import WeightChange, find_weight_changes
from mixtera_hpc.dataplane.recording.run_history import History
from mixtera_hpc.errors import ConfigError, pluralize
from mixtera_hpc.launch.status import run_statuses

__all__ = ["show_or_set_mixture"]

MAX_COLUMNS = 5
"""Weights shown side by side."""


def show_or_set_mixture(args: argparse.Namespace) -> None:
    """Show or request a mixture."""
    folder = find_run(args)
    if args.action == "show":
        if args.words or args.at_chunk is not None:
            raise ConfigError("FILE and --at-chunk belong to mixture set RUN FILE. Use that, or leave them out.")
        _show(folder, args.json)
        return
    if args.json:
        raise ConfigError("--json belongs to mixture show. Leave it out.")
    if len(args.words) != 1:
        raise ConfigError("mixture set needs a file: mixtera-hpc mixture set RUN FILE.")
    _set(folder, Path(args.words[0]), _chunk(args.at_chunk))


def _chunk(text: str | None) -> int | None:
    """Return the chunk of --at-chunk; None for the next one."""
    if text in (None, "next"):
        return None
    if not text.isdigit():
        raise ConfigError(f"--at-chunk is {text!r}, expected the number of a chunk, or next.")
    return int(text)


def _set(folder: RunFolder, file: Path, chunk: int | None) -> None:
    if not file.is_file():
        raise ConfigError(f"There is no file {file}. Give a YAML file with the keys below `mixture:`.")
    is_active = run_statuses([folder], datetime.now(UTC))[0].state.active
    submitted = submit_request(folder, load_config(folder.config), read_yaml(file), chunk=chunk, is_active=is_active)
    print(f"requested, from {'the next chunk' if chunk is None else f'chunk {chunk}'} on:")
    if submitted.weights is not None:
        for name, weight in zip(submitted.names, submitted.weights, strict=True):
            print(f"  {weight:.4f}  {name}")
    if not is_active:
        print(f"The run is not active; it reads the request with: mixtera-hpc resume {folder.name}/{folder.run_id}")
    print(f"See the decision with: mixtera-hpc mixture show {folder.name}/{folder.run_id}")


def _show(folder: RunFolder, as_json: bool) -> None:
    changes = find_weight_changes(History(folder.journal))
    decisions = read_decisions(folder.decisions)
    if as_json:
        lines = [*(change.to_dict() for change in changes), *(decision.to_dict() for decision in decisions)]
        for line in lines:
            print(json.dumps(line))
        return
    _print_table(changes)
    for decision in decisions:
        _print_decision(decision)
    if folder.mixture_request.exists():
        print("another request is waiting for the run to read it")


def _print_decision(decision: MixtureDecision) -> None:
    result = f"refused: {decision.refused}" if decision.refused else f"mixture.kind={decision.mixture.kind}"
    print(f"requested from chunk {decision.chunk} on, {result}")


def _print_table(changes: Sequence[WeightChange]) -> None:
    """Print the first and the newest weights, and those between as far as they fit."""
    # rich takes 0.1 s to import, which `mixture set` and `show --json` do not need.
    from rich.table import Table

    if not changes:
        print("nothing has been planned yet")
        return
    shown = changes if len(changes) <= MAX_COLUMNS else [changes[0], *changes[1 - MAX_COLUMNS :]]
    table = Table(title=f"weights changed {pluralize(len(changes) - 1, 'time')}", title_justify="left")
    table.add_column("domain")
    for change in shown:
        table.add_column(f"chunk {change.chunk}\nstep {change.step}", justify="right")
    for d, name in enumerate(changes[-1].domains):
        table.add_row(name, *(f"{change.weights[d]:.4f}" for change in shown))
    open_console().print(table)
