"""Properties that say where a row comes from: constant over a shard, taken from its path, for every format alike.

They are written where a dotted path into the row would stand, between two underscores, so that they cannot be mistaken for a
key of the row; a key of the row that happens to look so is shadowed only when it has one of these very names.

__path__           a/lang=en/x.jsonl.gz   the shard, relative to the data root
__name__           x.jsonl.gz             its file name
__stem__           x                      the same without the ending that tells the format
__parent__         lang=en                the folder it lies in; null at the root
__folder__         a/lang=en              all folders below the root; null at the root
__folder__.0       a                      one of them, from the root, or from the shard when negative (`__folder__.-1`)
__partition__.lang en                     the value of a folder named `lang=…`
__format__         jsonl.gz
"""

from pathlib import PurePosixPath

from mixtera_hpc.errors import ConfigError
from mixtera_hpc.formats.registry import SUFFIXES

__all__ = ["is_path_property", "path_property_value"]

_WHOLE = ("__path__", "__name__", "__stem__", "__parent__", "__folder__", "__format__")
_WITH_KEY = ("__folder__", "__partition__")


def is_path_property(path: str) -> bool:
    """Whether a property's path speaks of the shard and not of the row.

    Raises:
        ConfigError: it names an origin with a key it cannot have, or without the key it needs.
    """
    name, _, key = path.partition(".")
    if name not in (*_WHOLE, *_WITH_KEY):
        return False
    if path in _WHOLE or (name == "__partition__" and key) or (name == "__folder__" and _is_number(key)):
        return True
    wanted = {"__partition__": "__partition__.KEY", "__folder__": "__folder__.N, N a whole number"}
    raise ConfigError(f"{path!r} names nothing that a shard has; expected {wanted.get(name, name)}.")


def path_property_value(path: str, shard: str, format_name: str) -> str | None:
    """The value that `path` has for every row of `shard`; None where there is none.

    Args:
        shard: relative to the data root.
    """
    name, _, key = path.partition(".")
    place = PurePosixPath(shard)
    folders = place.parts[:-1]
    if name == "__partition__":
        return next((f.partition("=")[2] for f in reversed(folders) if f.partition("=")[0] == key and "=" in f), None)
    if name == "__folder__" and key:
        return folders[int(key)] if -len(folders) <= int(key) < len(folders) else None
    found = {
        "__path__": shard,
        "__name__": place.name,
        "__stem__": _stem(place.name),
        "__parent__": folders[-1] if folders else None,
        "__folder__": "/".join(folders) or None,
        "__format__": format_name,
    }
    return found[name]


def _is_number(key: str) -> bool:
    return key.removeprefix("-").isdecimal()


def _stem(name: str) -> str:
    ending = max((s for s in SUFFIXES if name.lower().endswith(s)), key=len, default="")
    return name[: len(name) - len(ending)] if ending else PurePosixPath(name).stem
