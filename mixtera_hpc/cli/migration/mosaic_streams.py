"""MosaicML Streaming: folders of MDS shards, or a YAML file with `streams`.

`proportion` is a share of the samples, `repeat` and `choose` a number of them: weights count samples.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixtera_hpc.cli.migration.blend import Blend, BlendEntry, check_weight, merge_entries, parse_weighted_words
from mixtera_hpc.config.files.json_text import parse_json
from mixtera_hpc.config.yaml_files import read_yaml
from mixtera_hpc.errors import ConfigError

__all__ = ["read_mosaic_streams"]

_PLACES = (("streams",), ("dataset", "streams"), ("train_loader", "dataset", "streams"), ("train_dataset", "streams"))
"""Key paths under which a training config may have its streams."""
_ABSOLUTE = ("repeat", "choose")


def read_mosaic_streams(sources: Sequence[str]) -> Blend:
    """Read a YAML file with `streams`, or folders of shards with or without weights before them.

    Raises:
        ConfigError: the file has no streams, or a folder is not one of MDS shards.
    """
    if len(sources) == 1 and Path(sources[0]).is_file():
        entries = _read_file(Path(sources[0]))
    else:
        pairs = parse_weighted_words(sources)
        entries = [_entry(Path(folder).name, Path(folder), weight) for weight, folder in pairs]
    return Blend(entries=merge_entries(entries), unit="samples", counts="samples")


def _read_file(path: Path) -> list[BlendEntry]:
    plain = read_yaml(path)
    streams = next((found for place in _PLACES if (found := _at(plain, place))), None)
    if isinstance(streams, list):
        streams = {Path(_local_folder(path, "", stream)).name: stream for stream in streams}
    if not isinstance(streams, Mapping):
        raise ConfigError(
            f"{path} has no streams.\n  Give a YAML file with streams: NAME: {{local: FOLDER, proportion: 0.5}}, or "
            "the folders themselves."
        )
    used = {key for stream in streams.values() for key in ("proportion", *_ABSOLUTE) if _get(stream, key) is not None}
    if "proportion" in used and len(used) > 1:
        raise ConfigError(
            f"{path} has streams with proportion and others with {' and '.join(sorted(used - {'proportion'}))}, which "
            "Streaming refuses too.\n  Use one of them for all streams."
        )
    return [_stream_entry(path, str(name), stream, used) for name, stream in streams.items()]


def _stream_entry(path: Path, name: str, stream: Any, used: set[str]) -> BlendEntry:
    folder = _local_folder(path, name, stream)
    given = [key for key in ("proportion", *_ABSOLUTE) if _get(stream, key) is not None]
    if len(given) > 1 or ("proportion" in used and not given):
        raise ConfigError(
            f"{path}: stream {name!r} has {' and '.join(given) or 'no proportion'}; every stream needs exactly one "
            "where others have a proportion.\n  Correct the file."
        )
    if not used:
        return _entry(name, folder, None)
    entry = _entry(name, folder, None)
    if given == ["proportion"] or given == ["choose"]:
        weight = check_weight(stream[given[0]], name)
    else:
        # A stream without any of them is seen once per epoch, like repeat: 1.
        weight = check_weight(stream.get("repeat", 1), name) * _num_samples(folder)
    return BlendEntry(name=name, root=entry.root, include=entry.include, weight=weight, text_columns=entry.text_columns)


def _local_folder(path: Path, name: str, stream: Any) -> Path:
    """Return the folder of a stream's shards: `local`, or a `remote` that is a folder too.

    Raises:
        ConfigError: there is none.
    """
    split = _get(stream, "split") or ""
    for key in ("local", "remote"):
        folder = _get(stream, key)
        if isinstance(folder, str) and "://" not in folder and (Path(folder) / split).is_dir():
            return Path(folder) / split
    raise ConfigError(
        f"{path}: stream {name!r} has local={_get(stream, 'local')!r} and remote={_get(stream, 'remote')!r}, and none "
        "of them is a folder here.\n  Copy the shards to a folder, and give it as local."
    )


def _entry(name: str, folder: Path, weight: float | None) -> BlendEntry:
    folder = folder.absolute()
    columns: dict[str, str] = {}
    for shard in _index(folder)["shards"]:
        columns |= dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
    texts = tuple(name for name, encoding in columns.items() if encoding == "str")
    return BlendEntry(name=name, root=folder, include=("**/*.{mds,mds.zstd}",), weight=weight, text_columns=texts)


def _num_samples(folder: Path) -> int:
    return sum(int(shard["samples"]) for shard in _index(folder)["shards"])


def _index(folder: Path) -> Any:
    """Return the content of a folder's `index.json`."""
    path = folder / "index.json"
    try:
        plain = parse_json(path.read_text())
        formats = {shard["format"] for shard in plain["shards"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not the index of a folder of MDS shards ({error}).\n  Give the folder that contains it."
        ) from None
    if formats != {"mds"}:
        raise ConfigError(
            f"{path} lists shards of format {', '.join(sorted(map(str, formats))) or 'none'}, not mds.\n"
            "  Files of JSON lines can be data sets of their own; see docs/your_data.md."
        )
    return plain


def _at(plain: Any, place: tuple[str, ...]) -> Any:
    for key in place:
        plain = _get(plain, key)
    return plain


def _get(plain: Any, key: str) -> Any:
    return plain.get(key) if isinstance(plain, Mapping) else None
