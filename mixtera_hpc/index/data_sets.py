"""Describe the data sets of an index: where their shards are, and how the build read their rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["DataSetFacts", "data_set_key", "merged_sources"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSetFacts:
    """The facts that an index stores about one data set."""

    root: str
    """The folder of its shards during the build."""
    text: str | None = None
    """Place of the document in a row; None when samples have no text."""
    text_digest: str = ""
    """Hex digest of the source file of the function that makes the documents; empty without one."""
    parser: str | None = None
    """Import path of the user's parser; None without one."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Property → where its values come from. A property that is not listed is null in this data set."""


def data_set_key(dataset: str, key: str) -> str:
    """Return the path of a key of a data set in the configuration; a single data set has the name ''."""
    return f"data.sets.{dataset}.{key}" if dataset else f"data.{key}"


def merged_sources(sets: Mapping[str, DataSetFacts]) -> dict[str, str]:
    """Return property → where its values come from; the data sets are named where they differ."""
    # Property → source → the data sets that have it.
    users: dict[str, dict[str, list[str]]] = {}
    for dataset, facts in sets.items():
        for name, source in facts.sources.items():
            users.setdefault(name, {}).setdefault(source, []).append(dataset)

    merged = {}
    for name, datasets in sorted(users.items()):
        if len(datasets) == 1:
            (merged[name],) = datasets
        else:
            merged[name] = "; ".join(f"{source} ({', '.join(names)})" for source, names in datasets.items())
    return merged
