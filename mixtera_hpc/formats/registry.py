"""Select the format of a file by name, or by the ending of the file name."""

import importlib
from functools import cache
from pathlib import PurePath

from mixtera_hpc.errors import ConfigError, did_you_mean
from mixtera_hpc.formats.base import Format

__all__ = ["MDS_INDEX", "SIDECAR_SUFFIX", "SUFFIXES", "companion_of", "format_name_of", "load_format"]

# Format name → module and class. Loaded at the first use: importing pyarrow alone takes longer than `--help`.
_CLASSES = {
    "jsonl": "mixtera_hpc.formats.readers.jsonl:JsonlFormat",
    "jsonl.gz": "mixtera_hpc.formats.readers.jsonl_gz:JsonlGzFormat",
    "jsonl.zst": "mixtera_hpc.formats.readers.jsonl_zst:JsonlZstFormat",
    "jsonl.bz2": "mixtera_hpc.formats.readers.jsonl_bz2:JsonlBz2Format",
    "jsonl.xz": "mixtera_hpc.formats.readers.jsonl_xz:JsonlXzFormat",
    "json": "mixtera_hpc.formats.readers.json_array:JsonArrayFormat",
    "parquet": "mixtera_hpc.formats.readers.parquet:ParquetFormat",
    "arrow": "mixtera_hpc.formats.readers.arrow:ArrowFormat",
    "webdataset": "mixtera_hpc.formats.readers.webdataset:WebDatasetFormat",
    "megatron": "mixtera_hpc.formats.readers.megatron:MegatronFormat",
    "mds": "mixtera_hpc.formats.readers.mds:MdsFormat",
    "text": "mixtera_hpc.formats.readers.plain_text:PlainTextFormat",
}

SUFFIXES: dict[str, str] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".ndjson.gz": "jsonl.gz",
    ".json.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".jsonl.zstd": "jsonl.zst",
    ".ndjson.zst": "jsonl.zst",
    ".json.zst": "jsonl.zst",
    ".jsonl.bz2": "jsonl.bz2",
    ".ndjson.bz2": "jsonl.bz2",
    ".json.bz2": "jsonl.bz2",
    ".jsonl.xz": "jsonl.xz",
    ".ndjson.xz": "jsonl.xz",
    ".json.xz": "jsonl.xz",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".tar": "webdataset",
    ".bin": "megatron",
    ".mds": "mds",
    ".mds.zstd": "mds",
    ".txt": "text",
}
"""Ending of a file name, in lower case → format name."""

SIDECAR_SUFFIX = ".sidecar.jsonl"
"""Ending of files that contain the properties of another file's documents; they are not shards."""

MDS_INDEX = "index.json"
"""Name of the file that describes all MDS shards of its folder."""


def format_name_of(path: str) -> str | None:
    """Return the format name of a file. None if its ending is unknown, or if it is a sidecar."""
    # A sidecar ends like JSON lines, but is read together with the shard beside it.
    name = PurePath(path).name.lower()
    if name.endswith(SIDECAR_SUFFIX):
        return None
    return next((format_name for suffix, format_name in SUFFIXES.items() if name.endswith(suffix)), None)


def companion_of(path: str, data_format: str) -> str | None:
    """Return the shard that a file is read together with; None if the file is no such companion.

    The shard of a sidecar may have any ending, and the index of a folder of MDS shards has many: '' is returned.

    Args:
        path: the file.
        data_format: the value of `data.format`.
    """
    if data_format == "mds" and PurePath(path).name == MDS_INDEX:
        return ""
    if path.lower().endswith(SIDECAR_SUFFIX):
        return ""
    if path.lower().endswith(".idx"):
        return path[: -len(".idx")] + ".bin"
    return None


@cache
def load_format(name: str) -> Format:
    """Import and return the format `name`.

    Raises:
        ConfigError: no format has this name.
    """
    # `auto` is handled by the caller, but is a valid value of the key.
    if name not in _CLASSES:
        raise ConfigError(f"data.format is {name!r}, which is not a format.{did_you_mean(name, ['auto', *_CLASSES])}")
    module_name, _, class_name = _CLASSES[name].partition(":")
    loaded: Format = getattr(importlib.import_module(module_name), class_name)()
    return loaded
