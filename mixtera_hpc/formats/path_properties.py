"""Properties that come from a shard's path. They are constant over the shard, and every format has them.

In `data.properties` they stand where a dotted path into the row would stand, between double underscores, so that they
cannot be mistaken for a key of the row. A key of the row is hidden only if it has exactly one of these names.

__path__           a/lang=en/x.jsonl.gz   the shard, relative to the data root
__name__           x.jsonl.gz             its file name
__stem__           x                      the file name without the ending of its format
__parent__         lang=en                the folder that contains it; null at the root
__folder__         a/lang=en              all folders below the root; null at the root
__folder__.0       a                      one of these folders, from the root; negative numbers count from the shard
__partition__.lang en                     the value of a folder named `lang=…`
__format__         jsonl.gz
"""

from pathlib import PurePosixPath

from mixtera_hpc.errors import ConfigError
from mixtera_hpc.formats.registry import SUFFIXES

__all__ = ["is_path_property", "path_property_value"]

_WITHOUT_KEY = ("__path__", "__name__", "__stem__", "__parent__", "__folder__", "__format__")
_WITH_KEY = ("__folder__", "__partition__")
_USAGE = {"__partition__": "__partition__.KEY", "__folder__": "__folder__.N with a whole number N"}


def is_path_property(path: str) -> bool:
    """Return True if a property's path names a property of the shard's path instead of a key of the row.

    Raises:
        ConfigError: it has a key that it cannot have, or lacks the key it needs.
    """
    # `meta.__path__` and `__index_level_0__` are ordinary keys of a row.
    name, _, key = path.partition(".")
    if name not in (*_WITHOUT_KEY, *_WITH_KEY):
        return False
    if path in _WITHOUT_KEY:
        return True
    if name == "__partition__" and key:
        return True
    if name == "__folder__" and _is_integer(key):
        return True
    raise ConfigError(f"{path!r} is not a property of a shard's path; expected {_USAGE.get(name, name)}.")


def path_property_value(path: str, shard: str, format_name: str) -> str | None:
    """Return the value of a path property for all rows of a shard; None if the shard has no such value.

    Args:
        path: the path property, for example `__folder__.0`.
        shard: path relative to the data root.
        format_name: name of the shard's format.
    """
    name, _, key = path.partition(".")
    shard_path = PurePosixPath(shard)
    folders = shard_path.parts[:-1]
    if name == "__partition__":
        return _partition_value(folders, key)
    # A folder number outside the path is null, because shards may lie at different depths.
    if name == "__folder__" and key:
        return folders[int(key)] if -len(folders) <= int(key) < len(folders) else None

    values = {
        "__path__": shard,
        "__name__": shard_path.name,
        "__stem__": _stem(shard_path.name),
        "__parent__": folders[-1] if folders else None,
        "__folder__": "/".join(folders) or None,
        "__format__": format_name,
    }
    return values[name]


def _partition_value(folders: tuple[str, ...], key: str) -> str | None:
    """Return the value of the innermost folder named `key=value`."""
    # The value may contain further equal signs.
    for folder in reversed(folders):
        folder_key, equals, value = folder.partition("=")
        if equals and folder_key == key:
            return value
    return None


def _is_integer(key: str) -> bool:
    return key.removeprefix("-").isdecimal()


def _stem(name: str) -> str:
    """Remove the longest ending that names a format, or else the last suffix."""
    suffix = max((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), key=len, default="")
    return name[: -len(suffix)] if suffix else PurePosixPath(name).stem
