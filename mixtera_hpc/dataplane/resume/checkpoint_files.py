"""Usable checkpoints of a run: one check for everything that reads them.

`training.json` lists every file of a checkpoint with its size and CRC-32, so an incomplete copy or a changed byte is
noticed before anything is read from it.
"""

import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mixtera_hpc.config.files.json_text import parse_json
from mixtera_hpc.config.run_folder import PLANE_STATE_FILE, RunFolder
from mixtera_hpc.dataplane.plane_state import unpack_state
from mixtera_hpc.errors import DataError

__all__ = ["CONTENTS_FILE", "FORMAT_VERSION", "crc32_of", "find_damage", "saved_states"]

FORMAT_VERSION = 1
"""Version of the files of a checkpoint; other versions are refused."""

CONTENTS_FILE = "training.json"

READ_BYTES = 1 << 20
"""Bytes read at a time to compute a checksum."""

_logger = logging.getLogger("mixtera_hpc")


def find_damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, as the end of a sentence, or None if it is complete."""
    try:
        # Reading a pipe in place of the file would block forever.
        plain = parse_json((path / CONTENTS_FILE).read_text()) if (path / CONTENTS_FILE).is_file() else None
    except (OSError, ValueError) as error:
        return f"{CONTENTS_FILE} cannot be read ({error})"
    if plain is None:
        return f"{CONTENTS_FILE} cannot be read (there is no such file)"
    if isinstance(plain, dict) and plain.get("version", FORMAT_VERSION) != FORMAT_VERSION:
        return f"its version is {plain['version']}, but this program reads version {FORMAT_VERSION}"
    try:
        contents = msgspec.convert(plain, _Contents)
    except msgspec.ValidationError as error:
        return f"{CONTENTS_FILE} is not the contents of a checkpoint ({error})"
    if path.name != RunFolder(path.parents[1]).checkpoint(contents.step).name:
        return f"{CONTENTS_FILE} is of step {contents.step}"
    if PLANE_STATE_FILE not in contents.files:
        return f"{CONTENTS_FILE} does not list {PLANE_STATE_FILE}"
    damages = (_damage_of(path / name, file) for name, file in contents.files.items())
    return next(filter(None, damages), None)


class _File(msgspec.Struct):
    """A file of a checkpoint."""

    bytes: int
    crc32: int


class _Contents(msgspec.Struct, kw_only=True):
    """The values of `training.json`."""

    version: int
    step: int
    model_settings: dict[str, Any]
    files: dict[str, _File]


def _damage_of(path: Path, expected: _File) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != expected.bytes:
        return f"{path.name} has {size} bytes, expected {expected.bytes}"
    if crc32_of(path) != expected.crc32:
        return f"the checksum of {path.name} does not match"
    return None


def saved_states(run: RunFolder) -> Iterator[dict[str, Any]]:
    """Yield the JSON values of the data plane's state in every usable checkpoint, in order of steps.

    Damaged checkpoints are skipped with a warning.
    """
    for step in run.checkpoint_steps():
        path = run.checkpoint(step)
        if not (path / PLANE_STATE_FILE).is_file():
            continue
        # A training program of the user's may keep the state of the data plane without our table of contents.
        damage = find_damage(path) if (path / CONTENTS_FILE).exists() else None
        state = None if damage else _unpacked(path / PLANE_STATE_FILE)
        if isinstance(state, dict):
            yield state
        else:
            _logger.warning("Checkpoint %s is skipped: %s.", path, damage or state)


def _unpacked(path: Path) -> dict[str, Any] | str:
    """Return the JSON values of a saved state, or what is wrong with it."""
    try:
        state = unpack_state(np.fromfile(path, np.uint8))[0]
    except (DataError, OSError) as error:
        return str(error)
    return state if isinstance(state, dict) else f"{path.name} holds no state"


def crc32_of(path: Path) -> int:
    """Return the CRC-32 of a file."""
    checksum = 0
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            checksum = zlib.crc32(data, checksum)
    return checksum
