"""Print the runs below a folder that pass some filters. Price: the configuration of each run is read only to filter."""

import fnmatch
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mixtera_hpc.cli.console import print_json
from mixtera_hpc.cli.verbs.status import format_steps
from mixtera_hpc.config.convert import unknown_key
from mixtera_hpc.config.key_paths import (
    groups,
    hint_of,
    schema_keys,
    takes_texts,
    without_none,
)
from mixtera_hpc.config.run_folder import RunFolder, find_runs, runs_root
from mixtera_hpc.config.yaml_files import load_yaml, parse_yaml_text, parse_yaml_value
from mixtera_hpc.errors import ConfigError, did_you_mean
from mixtera_hpc.launch.slurm.slurm_commands import JobState
from mixtera_hpc.launch.status import RunStatus, last_step, run_statuses

__all__ = ["RunLine", "print_runs"]

HEADER = ("run", "state", "attempts", "steps", "loss", "overrides")
MAX_OVERRIDES = 80
"""Characters of the overrides in the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLine:
    """One run; the field names are those of `--json`."""

    run_id: str
    name: str
    state: JobState
    attempts: int
    steps_done: int | None
    num_steps: int | None
    loss: float | None
    """Mean loss of the newest recorded steps, in nats."""
    overrides: Sequence[str]
    """Overrides as typed, in order; a resume appends to them."""
    folder: str


def print_runs(args: Namespace) -> None:
    """Print the runs that pass all filters, oldest first."""
    folders = _filtered(find_runs(args.root or runs_root()), args.filters)
    if args.last is not None and args.state is None:
        folders = folders[-args.last :]  # Slurm is asked about fewer jobs.
    statuses = run_statuses(folders, datetime.now(UTC))
    pairs = list(zip(folders, statuses, strict=True))
    if args.state is not None:
        pairs = [pair for pair in pairs if str(pair[1].state) == args.state]
    if args.last is not None:
        pairs = pairs[-args.last :]
    if args.json:
        for folder, status in pairs:
            print_json(_line(folder, status))
    else:
        _print_table(pairs)


def _filtered(folders: list[RunFolder], filters: Sequence[str]) -> list[RunFolder]:
    patterns = [word for word in filters if "=" not in word]
    typed = [word for word in filters if "=" in word and _is_choice(word)]
    values = [_key_and_value(word) for word in filters if "=" in word and not _is_choice(word)]
    named = [
        folder
        for folder in folders
        if all(any(fnmatch.fnmatchcase(name, pattern) for name in (folder.name, folder.run_id)) for pattern in patterns)
    ]
    chosen = [folder for folder in named if set(typed) <= set(_overrides(folder))] if typed else named
    return [folder for folder in chosen if _has_values(folder, values)]


def _is_choice(word: str) -> bool:
    """Return True for a choice of a config file (`experiment=demo`), which only the typed overrides show."""
    key = word.partition("=")[0]
    return key in ("experiment", *groups())


def _key_and_value(word: str) -> tuple[str, Any]:
    """Return the key and the value of a filter.

    Raises:
        ConfigError: there is no such key.
    """
    path, _, text = word.partition("=")
    hint = hint_of(path)
    if hint is None:
        raise ConfigError(unknown_key(path, did_you_mean(path, [key.path for key in schema_keys()])))
    is_text = without_none(hint) is str or takes_texts(hint)
    return path, parse_yaml_text(word, text) if is_text else parse_yaml_value(word, text)


def _has_values(folder: RunFolder, values: Sequence[tuple[str, Any]]) -> bool:
    if not values:
        return True
    try:
        config = load_yaml(folder.config)
    except ConfigError:
        return False  # The verbs about this run name the problem.
    return all(_value_at(config, path) == value for path, value in values)


def _value_at(config: Mapping[str, Any], path: str) -> Any:
    node: Any = config
    for name in path.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _line(folder: RunFolder, status: RunStatus) -> RunLine:
    loss = last_step(folder).get("loss")
    return RunLine(
        run_id=folder.run_id,
        name=folder.name,
        state=status.state,
        attempts=max(folder.attempts(), default=0),
        steps_done=status.steps_done,
        num_steps=status.num_steps,
        loss=loss if isinstance(loss, float) else None,
        overrides=_overrides(folder),
        folder=str(folder.path),
    )


def _overrides(folder: RunFolder) -> list[str]:
    try:
        return folder.overrides.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _print_table(pairs: Sequence[tuple[RunFolder, RunStatus]]) -> None:
    if not pairs:
        print("No run passes these filters. List all with mixtera-hpc runs")
        return
    rows = [HEADER, *(_row(_line(folder, status), status) for folder, status in pairs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def _row(line: RunLine, status: RunStatus) -> tuple[str, ...]:
    overrides = " ".join(line.overrides)
    if len(overrides) > MAX_OVERRIDES:
        overrides = f"{overrides[:MAX_OVERRIDES]}…"
    loss = "-" if line.loss is None else f"{line.loss:.4f}"
    return (
        f"{line.name}/{line.run_id}",
        str(line.state),
        str(line.attempts),
        format_steps(status),
        loss,
        overrides,
    )
