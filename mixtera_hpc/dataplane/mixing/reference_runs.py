"""Read values per domain for mixing algorithms: from a JSON file, or from the losses of an earlier run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixtera_hpc.config.files.json_text import parse_json
from mixtera_hpc.config.run_folder import RunFolder, runs_root
from mixtera_hpc.core.mixing.named_parameters import FROM_RUN
from mixtera_hpc.core.mixing.parameters import CONFIG_KEY
from mixtera_hpc.errors import ConfigError, LaunchError
from mixtera_hpc.track.event_reader import read_events

__all__ = ["load_named_values"]

LAST_SHARE = 20
"""Without a validation, the losses of the last twentieth of a run count."""


def load_named_values(parameter: str, place: str) -> Any:
    """Return the mapping of domain names that a file or a run holds.

    Args:
        parameter: `from_run`, for a run, or the name of the parameter, for a file.
        place: run or path.

    Raises:
        ConfigError: the file cannot be read, or the run has no losses.
    """
    if parameter == FROM_RUN:
        return _reference_losses_of_run(place)
    path = Path(place)
    try:
        content = parse_json(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{CONFIG_KEY}.{parameter} is {place!r}, which cannot be read: {error}.\n"
            '  Give a JSON file with one value per domain name, for example {"source=web": 2.31}.'
        ) from None
    if not isinstance(content, Mapping | list):
        raise ConfigError(f"{CONFIG_KEY}.{parameter}: {place} holds {content!r:.60}, expected names and values.")
    return content


def _reference_losses_of_run(name: str) -> dict[str, float]:
    """Return domain name → loss of a run: that of its newest validation, else the mean over its last steps.

    Args:
        name: run id, name or folder.

    Raises:
        ConfigError: there is no such run, or it has recorded no losses.
    """
    try:
        folder = RunFolder.find(name, runs_root())
    except LaunchError as error:
        raise ConfigError(f"{CONFIG_KEY}.from_run is {name!r}. {error}") from None
    starts = read_events(folder.metric("attempts"), every_attempt=True)
    losses = _validation_losses(folder)
    if losses is None:
        losses = _last_losses(folder)
    if losses is None or not starts:
        raise ConfigError(
            f"{CONFIG_KEY}.from_run is {name!r}, but {folder.path} has recorded no losses per domain.\n"
            "  Name a run that has trained."
        )
    pairs = zip(starts[-1]["domains"], losses.tolist(), strict=True)
    return {domain: loss for domain, loss in pairs if np.isfinite(loss)}


def _validation_losses(folder: RunFolder) -> Any:
    events = read_events(folder.metric("validation"))
    return np.array(events[-1]["domain_loss"], np.float64) if events else None


def _last_losses(folder: RunFolder) -> Any:
    """Return the mean loss of every domain over the last lines of a run, weighted by tokens."""
    events = read_events(folder.metric("steps"))
    if not events:
        return None
    last = events[-max(len(events) // LAST_SHARE, 1) :]
    tokens = np.array([event["domain_tokens"] for event in last], np.float64)
    losses = np.nan_to_num(np.array([event["domain_loss"] for event in last], np.float64))
    total = tokens.sum(axis=0)
    return np.where(total > 0, (losses * tokens).sum(axis=0) / np.maximum(total, 1), np.nan)
