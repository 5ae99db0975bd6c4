"""A run's folder is made before anything starts: a job that begins at once finds its logs' place and its configuration."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from mixtera_hpc.config.convert import to_plain
from mixtera_hpc.config.run_folder import RunFolder, new_run_id
from mixtera_hpc.config.schema import Config
from mixtera_hpc.config.yaml_files import dump_yaml
from mixtera_hpc.errors import LaunchError
from mixtera_hpc.launch.manifest import git_diff, manifest

__all__ = ["ensure_manifest", "prepare_run", "replace_config", "with_absolute_paths"]


def prepare_run(config: Config, overrides: Sequence[str], now: datetime) -> RunFolder:
    """Make the folder of a new run, with `config.yaml`, `overrides.txt` and `manifest.json`; one process does it.

    Raises:
        LaunchError: `run.id` names a run that exists, or `run.root` is no place for folders.
    """
    config = with_absolute_paths(config)
    try:
        folder = _make_folder(config, now)
    except OSError as error:
        raise LaunchError(
            f"run.root is {config.run.root!r}, where no folder can be made: {error.strerror}.\n"
            "  Set run.root (or MIXTERA_RUNS) to a folder you may write to, on a file system that all nodes share."
        ) from None
    folder.control.mkdir()
    folder.metrics.mkdir()
    folder.overrides.write_text("".join(f"{word}\n" for word in overrides))
    config = replace(config, run=replace(config.run, id=folder.run_id))
    ensure_manifest(folder, config)
    _write(folder.config, dump_yaml(to_plain(config)))  # Last: this file is what makes the folder a run.
    return folder


def with_absolute_paths(config: Config) -> Config:
    """`config` with paths that mean the same from any folder; what does not exist below this one stays as it is."""
    plane, data, index = config.dataplane, config.data, config.index
    sets = {name: replace(data_set, root=_rooted(data_set.root)) for name, data_set in data.sets.items()}
    return replace(
        config,
        run=replace(config.run, root=str(Path(config.run.root).absolute())),
        data=replace(data, root=_rooted(data.root), sets=sets),
        index=replace(
            index,
            path=_rooted(index.path),
            paths=[_rooted(path) for path in index.paths],
            trusted_roots=[_rooted(root) for root in index.trusted_roots],
        ),
        dataplane=replace(plane, tokenizer=_rooted(plane.tokenizer) if plane.tokenizer else None),
    )


def ensure_manifest(folder: RunFolder, config: Config) -> None:
    """Write `manifest.json` and, for a checkout that differs from its commit, `git.diff`; keeps what is there.

    A run whose batch script made the folder has none until its rank 0 calls this.
    """
    if folder.manifest.exists():
        return
    facts = manifest(config.job.container)
    if facts["git"] and facts["git"]["dirty"]:
        _write(folder.path / "git.diff", git_diff())
    _write(folder.manifest, json.dumps(facts, indent=1) + "\n")


def replace_config(folder: RunFolder, plain: dict[str, Any], overrides: Sequence[str]) -> None:
    """Continue with another configuration; the one before stays with the last attempt that ran with it."""
    last = max(folder.attempts(), default=0)
    if last:
        _write(folder.attempt(last) / "config.yaml", folder.config.read_text())
    with folder.overrides.open("a") as file:
        file.writelines(f"{word}\n" for word in overrides)
    _write(folder.config, dump_yaml(plain))


def _make_folder(config: Config, now: datetime) -> RunFolder:
    parent = Path(config.run.root) / config.run.name
    if config.run.id is not None:
        folder = RunFolder(parent / config.run.id)
        if folder.config.exists():
            raise LaunchError(
                f"run.id={config.run.id} exists: {folder.path}\n  Continue it with mixtera-hpc resume {config.run.id}, "
                "or leave run.id out for a new run."
            )
        folder.path.mkdir(parents=True, exist_ok=True)
        return folder
    plain = to_plain(config)
    while True:  # The same configuration twice in a second: the later one takes the next second's name.
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


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.rename(path)
