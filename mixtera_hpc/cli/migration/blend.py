"""The common form of other loaders' blends: data sets with weights, and the unit that the weights count."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mixtera_hpc.errors import ConfigError

__all__ = ["Blend", "BlendEntry", "check_weight", "merge_entries", "parse_weighted_words"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendEntry:
    """One data set of a blend."""

    name: str
    """Proposed name; `merge_entries` makes names valid and different."""
    root: Path
    include: tuple[str, ...]
    weight: float | None
    """Share of the data set; None if it is proportional to its size."""
    text_columns: tuple[str, ...] | None = None
    """Columns that may hold the document; None if `data.text` does not depend on columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blend:
    """The data sets of another loader, and how it mixes them."""

    entries: tuple[BlendEntry, ...]
    unit: Literal["tokens", "samples"]
    counts: str
    """The unit that weights are shares of, as the summary names it."""
    format: str | None = None
    """Value of `data.format`, if it is not found by the endings of the files."""
    notes: tuple[str, ...] = ()
    """Settings of the source that the experiment does not have."""


def parse_weighted_words(words: Sequence[str]) -> list[tuple[float | None, str]]:
    """Split `WEIGHT SOURCE WEIGHT SOURCE …`, or sources without weights.

    Raises:
        ConfigError: some sources have weights and others have none, or a weight is not above 0.
    """
    # As in Megatron: an even number of words of which every first one is a number.
    weights = [_number(word) for word in words[::2]]
    if len(words) % 2 or all(weight is None for weight in weights):
        numbers = [word for word in words if _number(word) is not None]
        if numbers:
            raise ConfigError(
                f"The blend has {len(words)} words, and {numbers[0]} is a number, but not every source has a weight.\n"
                "  Give WEIGHT SOURCE pairs, or sources without weights."
            )
        return [(None, word) for word in words]
    pairs: list[tuple[float | None, str]] = []
    for weight, word, source in zip(weights, words[::2], words[1::2], strict=True):
        if weight is None:
            raise ConfigError(
                f"The blend has {word!r} where a weight is expected, before {source!r}.\n"
                "  Give WEIGHT SOURCE pairs, or sources without weights."
            )
        pairs.append((check_weight(weight, source), source))
    return pairs


def check_weight(weight: object, source: str) -> float:
    """Return a weight.

    Raises:
        ConfigError: it is not a number above 0.
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise ConfigError(
            f"The weight of {source!r} is {weight!r}, but must be a number above 0.\n"
            "  Correct it, or leave the data set out."
        )
    return float(weight)


def merge_entries(entries: Sequence[BlendEntry]) -> tuple[BlendEntry, ...]:
    """Add up the weights of entries with the same files, and give the others different names.

    Raises:
        ConfigError: there are no entries.
    """
    if not entries:
        raise ConfigError("The source names no data sets.\n  Give at least one.")
    merged: dict[tuple[Path, tuple[str, ...]], BlendEntry] = {}
    for entry in entries:
        key = (entry.root, entry.include)
        first = merged.get(key)
        if first is None:
            merged[key] = entry
        elif first.weight is not None and entry.weight is not None:
            merged[key] = replace(first, weight=first.weight + entry.weight)
    names: set[str] = set()
    named = []
    for entry in merged.values():
        name = _unused_name(entry, names)
        names.add(name)
        named.append(replace(entry, name=name))
    return tuple(named)


def _unused_name(entry: BlendEntry, names: set[str]) -> str:
    """Return a name for a data set: its own, with the folder before it, or with a number."""
    own = _as_name(entry.name)
    candidates = [own, f"{_as_name(entry.root.parent.name)}_{own}", *(f"{own}_{i}" for i in range(2, len(names) + 3))]
    return next(name for name in candidates if name not in names)


def _as_name(text: str) -> str:
    """Replace what a key of a config cannot have."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_")
    return name if name and not name[0].isdigit() else f"set_{name}"


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
