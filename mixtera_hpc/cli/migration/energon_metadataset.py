"""Energon's metadataset YAML: blends of WebDatasets, nested ones included.

Energon draws every sample from a data set with the probability of its weight: weights count samples. The `repetitions`
of `blend_epochized` are passes over a data set, so they are multiplied by its number of samples.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mixtera_hpc.cli.migration.blend import Blend, BlendEntry, check_weight, merge_entries
from mixtera_hpc.config.files.json_text import parse_json
from mixtera_hpc.config.yaml_files import read_yaml
from mixtera_hpc.errors import ConfigError

__all__ = ["read_energon_metadataset"]

META = ".nv-meta"
_BLENDS = {"blend": "weight", "blend_epochized": "repetitions", "datasets": "weight"}
"""Key of a blend → the key of its weights. `datasets` is the one of the first version."""
_IGNORED = {"subflavor", "subflavors", "shuffle_over_epochs_multiplier", "dataset_config"}
"""Keys of a data set that concern the task encoder of Energon, and not which samples are read."""
_KNOWN = {"path", "split_part", "weight", "repetitions", *_IGNORED}
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def read_energon_metadataset(sources: Sequence[str]) -> Blend:
    """Read the training split of a metadataset.

    Raises:
        ConfigError: the file is no metadataset, or asks for what has no counterpart here.
    """
    if len(sources) != 1:
        raise ConfigError(f"Energon has one metadataset, but {len(sources)} words were given.\n  Give its YAML file.")
    path = Path(sources[0]).absolute()
    ignored: set[str] = set()
    entries = list(_read_metadataset(path, "train", 1.0, ignored))
    notes = [f"Left out, because they are for Energon's task encoder: {', '.join(sorted(ignored))}."] if ignored else []
    return Blend(entries=merge_entries(entries), unit="samples", counts="samples", notes=tuple(notes))


def _read_metadataset(path: Path, split: str, weight: float, ignored: set[str]) -> Iterator[BlendEntry]:
    """Yield the data sets of one split of a file, whose weights sum to `weight`."""
    plain = read_yaml(path)
    splits = plain.get("splits")
    if plain.get("__class__") not in ("Metadataset", "MetadatasetV2") or not isinstance(splits, Mapping):
        raise ConfigError(
            f"{path} is not a metadataset of Energon: __class__ is {plain.get('__class__')!r}.\n"
            "  Give the YAML file with __class__: MetadatasetV2 and splits."
        )
    if split not in splits:
        raise ConfigError(f"{path} has no split {split!r}; it has {', '.join(map(str, splits))}.\n  Add it.")
    yield from _read_node(splits[split], path, split, weight, ignored)


def _read_node(node: Any, path: Path, split: str, weight: float, ignored: set[str]) -> Iterator[BlendEntry]:
    """Yield the data sets of a blend, or the one of a path."""
    if not isinstance(node, Mapping):
        raise ConfigError(f"{path}: expected a path or a blend, got {node!r}.\n  Correct the file.")
    blend_key = next((key for key in _BLENDS if key in node), None)
    if blend_key is None:
        yield from _read_reference(node, path, split, weight, ignored)
        return
    members = [
        list(_read_node(_without_weight(member), path, split, 1.0, ignored))
        for member in _members(node, blend_key, path)
    ]
    weights = [
        _member_weight(member, entries, blend_key, path)
        for member, entries in zip(node[blend_key], members, strict=True)
    ]
    for entries, own in zip(members, weights, strict=True):
        # The weights inside a member are shares of the member.
        inner = sum(entry.weight or 0 for entry in entries)
        for entry in entries:
            yield replace(entry, weight=weight * own / sum(weights) * (entry.weight or 0) / inner)


def _members(node: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    members = node[key]
    if not isinstance(members, list) or not members or not all(isinstance(member, Mapping) for member in members):
        raise ConfigError(f"{path}: {key} must be a list of data sets, each with a path.\n  Correct the file.")
    return members


def _without_weight(member: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in member.items() if key not in ("weight", "repetitions")}


def _member_weight(member: Mapping[str, Any], entries: list[BlendEntry], key: str, path: Path) -> float:
    """Return the weight of a member of a blend: as written, or repetitions times samples."""
    weight = check_weight(member.get(_BLENDS[key], 1), str(member.get("path", path)))
    if key == "blend_epochized":
        return weight * sum(_num_samples(entry) for entry in entries)
    return weight


def _read_reference(
    node: Mapping[str, Any], path: Path, split: str, weight: float, ignored: set[str]
) -> Iterator[BlendEntry]:
    """Yield the data set that a node refers to, or the data sets of another metadataset."""
    unknown = sorted(set(map(str, node)) - _KNOWN)
    if unknown or not isinstance(node.get("path"), str):
        raise ConfigError(
            f"{path}: {', '.join(unknown) or 'a data set without a path'} has no counterpart here.\n"
            "  These can be migrated: path, split_part, blend with weight, blend_epochized with repetitions."
        )
    ignored |= _IGNORED & set(node)
    target = (path.parent / node["path"]).absolute()
    part = str(node.get("split_part", split))
    if target.suffix in (".yaml", ".yml"):
        yield from _read_metadataset(target, part, weight, ignored)
        return
    yield _data_set(target, part, split, weight)


def _data_set(folder: Path, part: str, split: str, weight: float) -> BlendEntry:
    """Return the data set of a folder that `energon prepare` has prepared."""
    split_file = folder / META / "split.yaml"
    if not split_file.is_file():
        raise ConfigError(
            f"{folder} has no {META}/split.yaml, which names the shards of every split.\n"
            "  Give a data set that energon prepare has prepared."
        )
    plain = read_yaml(split_file)
    parts = plain.get("split_parts")
    if not isinstance(parts, Mapping) or part not in parts:
        names = ", ".join(map(str, parts)) if isinstance(parts, Mapping) else "none"
        raise ConfigError(f"{split_file} has no split part {part!r}; it has {names}.\n  Correct split_part.")
    excluded = {shard for pattern in plain.get("exclude") or [] for shard in _expand(str(pattern))}
    single = sorted(shard for shard in excluded if not shard.endswith(".tar"))
    if single:
        raise ConfigError(
            f"{split_file} excludes single samples, for example {single[0]!r}, and there is no list of samples in a "
            "config.\n  Remove them from exclude and leave them out with query.where, or write the shards again."
        )
    shards = [shard for pattern in parts[part] or [] for shard in _expand(str(pattern)) if shard not in excluded]
    if not shards:
        raise ConfigError(f"{split_file}: split part {part!r} has no shards.\n  Leave the data set out.")
    name = folder.name if part == split else f"{folder.name}_{part}"
    return BlendEntry(name=name, root=folder, include=tuple(shards), weight=weight)


def _expand(pattern: str) -> list[str]:
    """Return the names that a pattern with ranges, `shard_{000..012}.tar`, stands for."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    numbers = range(int(match[1]), int(match[2]) + 1)
    return [name for number in numbers for name in _expand(f"{before}{number:0{len(match[1])}}{after}")]


def _num_samples(entry: BlendEntry) -> int:
    """Return the number of samples of a data set, as `energon prepare` has counted them.

    Raises:
        ConfigError: there are no such counts.
    """
    for name in (".info.json", ".info.yaml"):
        path = entry.root / META / name
        if path.is_file():
            plain: Any = parse_json(path.read_text()) if path.suffix == ".json" else read_yaml(path)
            counts = plain.get("shard_counts", {})
            if all(shard in counts for shard in entry.include):
                return sum(int(counts[shard]) for shard in entry.include)
    raise ConfigError(
        f"{entry.root / META} has no shard_counts of all its shards, so repetitions cannot become weights.\n"
        "  Run energon prepare again, or use blend with weights."
    )
