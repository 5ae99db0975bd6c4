"""Make the folder of a run before anything starts, so that a job finds its configuration and the place of its logs."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from mixtera_hpc.config.convert import to_plain
from mixtera_hpc.config.files.write_errors import explain_write_errors
from mixtera_hpc.config.run_folder import RunFolder, new_run_id
from mixtera_hpc.config.schema import Config
from mixtera_hpc.config.yaml_files import dump_yaml
from mixtera_hpc.errors import LaunchError
from mixtera_hpc.launch.manifest import collect_manifest, git_diff

__all__ = ["ensure_manifest", "prepare_run", "replace_config", "restore_config", "with_absolute_paths"]


def prepare_run(config: Config, overrides: Sequence[str], now: datetime) -> RunFolder:
    """Make the folder of a new run, with `config.yaml`, `overrides.txt` and `manifest.json`. One process calls this.

    Args:
        config: The composed configuration; its paths become absolute.
        overrides: What the user typed.
        now: Time for the run id.

    Raises:
        LaunchError: `run.id` names an existing run, or no folder can be made in `run.root`.
    """
    config = with_absolute_paths(config)
    try:
        folder = _make_folder(config, now)
    except OSError as error:
        raise LaunchError(
            f"No folder can be made in run.root={config.run.root!r}: {error.strerror}.\n"
            "  Set run.root (or MIXTERA_RUNS) to a folder that you may write to, on a file system that all nodes share."
        ) from None
    with explain_write_errors(folder.path, "No run was started, and the folder is no run yet."):
        _fill_folder(folder, config, overrides)
    return folder


def _fill_folder(folder: RunFolder, config: Config, overrides: Sequence[str]) -> None:
    # A folder with a fixed `run.id` may be left from an earlier try.
    folder.control.mkdir(exist_ok=True)
    folder.metrics.mkdir(exist_ok=True)
    folder.overrides.write_text("".join(f"{word}\n" for word in overrides))
    config = replace(config, run=replace(config.run, id=folder.run_id))
    ensure_manifest(folder, config)
    # This file makes the folder a run, so it is written last.
    _write(folder.config, dump_yaml(to_plain(config)))


def with_absolute_paths(config: Config) -> Config:
    """Return `config` with absolute paths, so that it means the same from any folder.

    A text that is not a path below the working folder (such as the name of a tokenizer) stays as it is.
    """
    data_sets = {name: replace(data_set, root=_rooted(data_set.root)) for name, data_set in config.data.sets.items()}
    index = replace(
        config.index,
        path=_rooted(config.index.path),
        paths=[_rooted(path) for path in config.index.paths],
        trusted_roots=[_rooted(root) for root in config.index.trusted_roots],
    )
    tokenizer = config.dataplane.tokenizer
    environment = replace(
        config.environment,
        image=_existing(config.environment.image),
        venv=_existing(config.environment.venv),
        python=_existing(config.environment.python),
    )
    return replace(
        config,
        run=replace(config.run, root=str(Path(config.run.root).absolute())),
        data=replace(config.data, root=_rooted(config.data.root), sets=data_sets),
        index=index,
        environment=environment,
        dataplane=replace(config.dataplane, tokenizer=_rooted(tokenizer) if tokenizer else None),
    )


def ensure_manifest(folder: RunFolder, config: Config) -> None:
    """Write `manifest.json` unless it exists, and `git.diff` if the checkout differs from its commit.

    If the batch script made the run folder, there is no manifest until rank 0 calls this.
    """
    if folder.manifest.exists():
        return
    facts = collect_manifest(config.environment.image)
    if facts["git"] and facts["git"]["dirty"]:
        _write(folder.git_diff, git_diff())
    _write(folder.manifest, json.dumps(facts, indent=1) + "\n")


def replace_config(folder: RunFolder, plain: dict[str, Any], overrides: Sequence[str]) -> None:
    """Replace the run's configuration; the folder of the newest attempt gets a copy of the old one."""
    newest = max(folder.attempts(), default=0)
    if newest:
        _write(folder.replaced_config(newest), folder.config.read_text())
    with folder.overrides.open("a") as file:
        file.writelines(f"{word}\n" for word in overrides)
    _write(folder.config, dump_yaml(plain))


def restore_config(folder: RunFolder, text: str) -> None:
    """Write the content of `config.yaml` back that `replace_config` has replaced."""
    if folder.config.read_text() != text:
        _write(folder.config, text)


def _make_folder(config: Config, now: datetime) -> RunFolder:
    parent = Path(config.run.root) / config.run.name
    if config.run.id is not None:
        folder = RunFolder(parent / config.run.id)
        if folder.config.exists():
            raise LaunchError(
                f"run.id={config.run.id} exists: {folder.path}\n  Continue it with mixtera-hpc resume {config.run.id}, "
                "or remove run.id to start a new run."
            )
        folder.path.mkdir(parents=True, exist_ok=True)
        return folder

    plain = to_plain(config)
    while True:  # If the same configuration starts twice within a second, the later run takes the next second's name.
        folder = RunFolder(parent / new_run_id(plain, now))
        try:
            folder.path.mkdir(parents=True)
        except FileExistsError:
            now += timedelta(seconds=1)
        else:
            return folder


def _rooted(path: str) -> str:
    if not path:
        return path
    absolute = Path(path).expanduser().absolute()
    return str(absolute) if absolute.exists() or absolute.parent.exists() else path


def _existing(path: str | None) -> str | None:
    """Return the absolute path if there is such a file or folder; other texts are names, which stay as they are."""
    return str(Path(path).absolute()) if path and Path(path).exists() else path


def _write(path: Path, text: str) -> None:
    """Replace `path` atomically: on a full disk, the old file stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.rename(path)
