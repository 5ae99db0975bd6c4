"""Checkpoints: one folder per step, which is either complete or absent.

A checkpoint is written to a temporary folder, synced to disk and renamed. A damaged one is detected at loading, see
`dataplane/resume/checkpoint_files.py`, and the previous checkpoint is used instead. A checkpoint does not depend on the
number of ranks.

Price: rank 0 writes the weights and the optimizer state of one replica, and reads all files twice when it loads a
checkpoint (once for the checksums).
"""

import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mixtera_hpc.config.files.json_text import parse_json
from mixtera_hpc.config.files.write_errors import explain_write_errors
from mixtera_hpc.config.run_folder import PLANE_STATE_FILE, RunFolder
from mixtera_hpc.dataplane.plane_state import unpack_state
from mixtera_hpc.dataplane.resume.checkpoint_files import CONTENTS_FILE, FORMAT_VERSION, crc32_of, find_damage
from mixtera_hpc.errors import DataError

__all__ = ["Checkpoint", "load_newest_checkpoint", "read_checkpoint", "write_checkpoint"]

logger = logging.getLogger("mixtera_hpc")

MODEL_FILE = "model.pt"
OPTIMIZER_FILE = "optimizer.pt"

_UNREADABLE = (DataError, OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError)
"""Exceptions that reading the files of a damaged checkpoint raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Everything that a run needs to continue."""

    step: int
    """Number of finished steps, which is also the number of the next step."""
    model_settings: Mapping[str, Any]
    """Settings that the resumed run must share, by key, for example `training.num_layers`. Values are JSON."""
    model: Mapping[str, torch.Tensor]
    """State dict of the model."""
    optimizer: Mapping[str, Any]
    """State dict of the optimizer."""
    dataplane: NDArray[np.uint8]
    """State of the data plane: the array that `DataPlane.state_dict` returned."""


def write_checkpoint(run: RunFolder, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint into the run folder, update LATEST and remove old checkpoints.

    Args:
        run: the run folder.
        checkpoint: what to write. An existing checkpoint of the same step is replaced.
        keep: number of checkpoints to keep, this one included. Checkpoints of later steps are always removed: the run
            did not continue from them, so they are damaged or belong to an abandoned history.

    Returns:
        The folder of the new checkpoint.

    Raises:
        DataError: it cannot be written, for example because the disk is full; earlier checkpoints are as before.
    """
    safe = "The checkpoints written before are whole; mixtera-hpc resume RUN continues from the newest of them."
    # torch reports a full disk as a RuntimeError.
    with explain_write_errors(run.checkpoint(checkpoint.step), safe, others=(RuntimeError,)):
        return _write_checkpoint(run, checkpoint, keep)


def _write_checkpoint(run: RunFolder, checkpoint: Checkpoint, keep: int) -> Path:
    target = run.checkpoint(checkpoint.step)
    try:
        _write_whole(run, target, checkpoint)
    # torch raises a RuntimeError if a file cannot be written.
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(run.path).free
        reason = error.strerror if isinstance(error, OSError) else f"{error} ({free} bytes are free)"
        raise DataError(
            f"The checkpoint {target} cannot be written: {reason}.\n"
            "  Earlier checkpoints are safe. Free space or repair the folder's permissions, then continue the run with "
            "mixtera-hpc resume RUN."
        ) from error
    _remove_old_checkpoints(run, checkpoint.step, keep)
    return target


def _write_whole(run: RunFolder, target: Path, checkpoint: Checkpoint) -> None:
    """Write the files to a temporary folder, which then becomes `target`, the latest checkpoint."""
    run.checkpoints.mkdir(parents=True, exist_ok=True)

    # A killed job may have left a temporary folder behind.
    for abandoned in run.checkpoints.glob(".step_*.partial"):
        shutil.rmtree(abandoned)
    partial = _temporary(target)
    partial.mkdir()
    _write_files(partial, checkpoint)

    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)

    latest = run.latest_checkpoint
    _write_text(_temporary(latest), target.name + "\n")
    _temporary(latest).rename(latest)
    _sync(run.checkpoints)


def load_newest_checkpoint(
    run: RunFolder, accept: Callable[[Mapping[str, Any]], bool] = lambda state: True
) -> Checkpoint | None:
    """Load the newest complete checkpoint. Warn about damaged ones and skip them.

    Args:
        run: the run folder.
        accept: whether to use a checkpoint, given the JSON values of its data plane state. The caller rejects
            checkpoints of an abandoned history.

    Returns:
        The checkpoint, or None if there is none and the run starts at step 0.

    Raises:
        DataError: all checkpoints are damaged. Starting again from step 0 would remove them.
    """
    damaged = []
    for step in reversed(run.checkpoint_steps()):
        path = run.checkpoint(step)
        damage = find_damage(path)
        if damage is not None:
            logger.warning("Checkpoint %s is skipped: %s.", path, damage)
            damaged.append(f"\n    {path.name}: {damage}")
            continue
        try:
            if accept(unpack_state(np.fromfile(run.checkpoint_plane_state(step), np.uint8))[0]):
                return read_checkpoint(path)
        except _UNREADABLE as error:
            logger.warning("Checkpoint %s is skipped: %s.", path, error)
            damaged.append(f"\n    {path.name}: {error}")

    if damaged:
        raise DataError(
            f"No checkpoint in {run.checkpoints} can be used:{''.join(damaged)}\n"
            "  Restore one of them. To start again from step 0 instead, move that folder away."
        )
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint; tensors are placed on the CPU. Code in the files is never executed."""
    contents = _read_json(path / CONTENTS_FILE)
    return Checkpoint(
        step=contents["step"],
        model_settings=contents["model_settings"],
        model=torch.load(path / MODEL_FILE, map_location="cpu", weights_only=True),
        optimizer=torch.load(path / OPTIMIZER_FILE, map_location="cpu", weights_only=True),
        dataplane=np.fromfile(path / PLANE_STATE_FILE, np.uint8),
    )


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    """Write and sync all files. The table of contents comes last: it holds the sizes and checksums of the others."""
    torch.save(dict(checkpoint.model), folder / MODEL_FILE)
    torch.save(dict(checkpoint.optimizer), folder / OPTIMIZER_FILE)
    # The array holds the bytes of an npz file, so that numpy can open the file too.
    checkpoint.dataplane.tofile(folder / PLANE_STATE_FILE)

    files = {path.name: {"bytes": path.stat().st_size, "crc32": crc32_of(path)} for path in sorted(folder.iterdir())}
    for name in files:
        _sync(folder / name)

    contents = {
        "version": FORMAT_VERSION,
        "step": checkpoint.step,
        "model_settings": dict(checkpoint.model_settings),
        "files": files,
    }
    _write_text(folder / CONTENTS_FILE, json.dumps(contents, indent=1) + "\n")
    _sync(folder)


def _remove_old_checkpoints(run: RunFolder, step: int, keep: int) -> None:
    """Remove all checkpoints but that of `step` and the `keep` - 1 before it."""
    steps = run.checkpoint_steps()
    later = [other for other in steps if other > step]
    earlier = [other for other in steps if other < step]
    num_removed = max(len(earlier) - (keep - 1), 0)
    for other in later + earlier[:num_removed]:
        try:
            shutil.rmtree(run.checkpoint(other))
        except OSError as error:  # Another program reads it, or its files are another user's.
            logger.warning("%s cannot be removed: %s. Remove it.", run.checkpoint(other), error.strerror)


def _temporary(path: Path) -> Path:
    """Return the path that is written to before it is renamed to `path`."""
    return path.with_name(f".{path.name}.partial")


def _read_json(path: Path) -> Any:
    return parse_json(path.read_text())


def _write_text(path: Path, text: str) -> None:
    """Write a small file and sync it to disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Flush a file or the entries of a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
