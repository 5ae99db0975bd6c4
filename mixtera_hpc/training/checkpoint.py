"""Checkpoints: a folder per step that is either complete or not there.

Everything is written to a temporary folder, fsynced and renamed. `training.json` names every file with its size and checksum, so
a copy that was cut short is recognised and the one before it is taken. Nothing in a checkpoint depends on the number of
ranks. Price: one replica's weights and optimizer state written by rank 0, and read once more at loading to check them.
"""

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixtera_hpc.errors import DataError

__all__ = ["Checkpoint", "checkpoint_path", "load_newest_checkpoint", "read_checkpoint", "write_checkpoint"]

VERSION = 1
CONTENTS = "training.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a run needs to go on."""

    step: int
    """Steps done, and so the number of the next one."""
    facts: Mapping[str, Any]
    """What must be the same to go on: the model's sizes. JSON."""
    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, Any]
    dataplane: Mapping[str, Any]
    """`{"json": …, "arrays": {name: array}}`, as the data plane gave it."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return folder / f"step_{step:08d}"


def write_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `folder/step_XXXXXXXX` and point LATEST to it; returns its path.

    Of older checkpoints the newest `keep` - 1 stay. Later ones go: the run did not continue from them, so they are broken or of a
    past that was abandoned.
    """
    target = checkpoint_path(folder, checkpoint.step)
    partial = folder / f".{target.name}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step_*.partial"):
        shutil.rmtree(leftover)
    partial.mkdir()
    _write_contents(partial, checkpoint)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    _write_text(folder / ".LATEST.partial", target.name + "\n")
    (folder / ".LATEST.partial").rename(folder / "LATEST")
    _sync(folder)
    _prune(folder, target, keep)
    return target


def load_newest_checkpoint(
    folder: Path, accept: Callable[[Mapping[str, Any]], bool] = lambda state: True
) -> Checkpoint | None:
    """The newest checkpoint that is complete; None when none was ever written. Broken ones are skipped with a warning.

    Args:
        accept: whether a checkpoint whose data plane's state has this "json" is of this run's past.

    Raises:
        DataError: there are checkpoints and none can be used; beginning anew would remove them.
    """
    faults = []
    for path in _candidates(folder):
        broken = _fault(path)
        if broken is None:
            if accept(json.loads((path / "dataplane.json").read_text())):
                return read_checkpoint(path)
            continue
        warnings.warn(f"Checkpoint {path} is skipped: {broken}.", stacklevel=2)
        faults.append(f"\n    {path.name}: {broken}")
    if faults:
        raise DataError(
            f"None of the checkpoints in {folder} can be used:{''.join(faults)}\n"
            "  Bring one back; or, to begin again from step 0, move that folder away."
        )
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint, tensors onto the CPU. Code in the files is never run."""
    contents = json.loads((path / CONTENTS).read_text())
    with np.load(path / "dataplane.npz", allow_pickle=False) as arrays:
        dataplane = {"json": json.loads((path / "dataplane.json").read_text()), "arrays": dict(arrays)}
    return Checkpoint(
        step=contents["step"],
        facts=contents["facts"],
        model=torch.load(path / "model.pt", map_location="cpu", weights_only=True),
        optimizer=torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
        dataplane=dataplane,
    )


def _write_contents(folder: Path, checkpoint: Checkpoint) -> None:
    torch.save(dict(checkpoint.model), folder / "model.pt")
    torch.save(dict(checkpoint.optimizer), folder / "optimizer.pt")
    (folder / "dataplane.json").write_text(json.dumps(checkpoint.dataplane["json"]))
    np.savez(folder / "dataplane.npz", **checkpoint.dataplane["arrays"])
    files = {path.name: {"bytes": path.stat().st_size, "crc32": _crc32(path)} for path in sorted(folder.iterdir())}
    for name in files:
        _sync(folder / name)
    contents = {"version": VERSION, "step": checkpoint.step, "facts": dict(checkpoint.facts), "files": files}
    _write_text(folder / CONTENTS, json.dumps(contents, indent=1) + "\n")
    _sync(folder)


def _prune(folder: Path, newest: Path, keep: int) -> None:
    older = [path for path in _candidates(folder) if path.name < newest.name]
    later = [path for path in _candidates(folder) if path.name > newest.name]
    for path in later + older[keep - 1 :]:
        shutil.rmtree(path)


def _candidates(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((p for p in folder.glob("step_[0-9]*") if p.is_dir()), reverse=True)


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint; None when nothing is."""
    try:
        contents = json.loads((path / CONTENTS).read_text())
    except (OSError, ValueError) as error:
        return f"{CONTENTS} cannot be read ({error})"
    if contents.get("version") != VERSION:
        return f"its version is {contents.get('version')}, this program writes {VERSION}"
    for name, expected in contents["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, expected {expected['bytes']}"
        if _crc32(file) != expected["crc32"]:
            return f"the checksum of {name} does not match"
    return None


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            value = zlib.crc32(piece, value)
    return value


def _write_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
