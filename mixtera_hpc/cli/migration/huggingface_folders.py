"""Folders that `Dataset.save_to_disk` has written, with the probabilities of `interleave_datasets`.

`interleave_datasets` draws every row from a data set with its probability: weights count samples.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixtera_hpc.cli.migration.blend import Blend, BlendEntry, merge_entries, parse_weighted_words
from mixtera_hpc.config.files.json_text import parse_json
from mixtera_hpc.errors import ConfigError

__all__ = ["read_huggingface_folders"]

STATE = "state.json"
INFO = "dataset_info.json"
SPLITS = "dataset_dict.json"


def read_huggingface_folders(sources: Sequence[str]) -> Blend:
    """Read folders of `save_to_disk`, each with its probability before it, or all without.

    Raises:
        ConfigError: a folder is none of `save_to_disk`, or the words are no blend.
    """
    pairs = parse_weighted_words(sources)
    # Without probabilities, interleave_datasets takes one row of each data set in turn.
    entries = [_entry(1.0 if weight is None else weight, Path(folder).absolute()) for weight, folder in pairs]
    note = (
        'interleave_datasets ends with the first exhausted data set (stopping_strategy="first_exhausted"): '
        "mixture.on_exhausted=stop does the same."
    )
    return Blend(entries=merge_entries(entries), unit="samples", counts="samples", notes=(note,))


def _entry(weight: float, folder: Path) -> BlendEntry:
    splits = folder / SPLITS
    if splits.is_file():
        names = _read_json(splits).get("splits", [])
        raise ConfigError(
            f"{folder} holds a DatasetDict, with the splits {', '.join(map(str, names))}.\n"
            f"  Name the folder of one split, e.g. {folder / str(next(iter(names), 'train'))}."
        )
    if not (folder / STATE).is_file():
        raise ConfigError(
            f"{folder} has no {STATE}, so it is no folder of save_to_disk.\n"
            "  Give such a folder. The cache of load_dataset is none: call Dataset.save_to_disk first."
        )
    state = _read_json(folder / STATE)
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise ConfigError(
            f"{folder} was saved with an order or selection of rows beside its files (_indices_files in {STATE}), but "
            "files are read here as they are.\n  Call flatten_indices() before save_to_disk."
        )
    files = [str(entry["filename"]) for entry in state.get("_data_files", [])]
    missing = [name for name in files if not (folder / name).is_file()]
    if missing or not files:
        raise ConfigError(
            f"{folder} is incomplete: {', '.join(missing) or 'no data file'} of {STATE} is missing.\n"
            "  Copy the folder again."
        )
    columns = _text_columns(folder)
    return BlendEntry(name=folder.name, root=folder, include=("*.arrow",), weight=weight, text_columns=columns)


def _text_columns(folder: Path) -> tuple[str, ...]:
    """Return the columns of texts."""
    features = _read_json(folder / INFO).get("features") if (folder / INFO).is_file() else None
    if not isinstance(features, dict):
        return ("text",)
    return tuple(
        name
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("dtype") in ("string", "large_string")
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        plain = parse_json(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.\n  Copy the folder again.") from None
    return plain if isinstance(plain, dict) else {}
