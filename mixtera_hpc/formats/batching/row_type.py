"""Generate a `msgspec.Struct` from dotted paths, so that decoding a row touches only the keys that are needed.

The decoder skips every other key without building objects, and it checks the types: decoded rows need no further
checks.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np

from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.formats.base import Column, ScanSpec
from mixtera_hpc.formats.category_codes import encode_categories

__all__ = ["RowType"]

Scalar = bool | int | float | str
# Every property may be null. A single scalar is a set of categories with one element.
_TYPES: dict[Kind, Any] = {
    Kind.CATEGORY: Scalar | None,
    Kind.CATEGORIES: tuple[Scalar | None, ...] | Scalar | None,
    Kind.NUMBER: float | None,
}
# Type of the document. No property has it, so it also marks the path to the document in a `PathTree`.
_TEXT = str

# Key → type of a value, or another tree.
PathTree = dict[str, Any]


class RowType:
    """The generated type of a row, and how to take columns out of decoded rows.

    Raises:
        ConfigError: two paths contradict each other.
    """

    def __init__(self, spec: ScanSpec) -> None:
        tree: PathTree = {}
        if spec.text is not None:
            _add_path(tree, spec.text, _TEXT, "data.text")
        for field in spec.properties:
            _add_path(tree, field.path, _TYPES[field.kind], f"data.properties.{field.name}")
        self.struct = _define_struct("Row", tree)
        self._spec = spec
        # attrgetter follows a dotted path in C, which is faster than a Python loop per row.
        self._get_text = attrgetter(_attributes(spec.text)) if spec.text is not None else None

    def blank(self) -> Any:
        """Return a row with an empty document and without properties."""
        # Wrap the empty text in its parents, from the inside out.
        row: Any = ""
        for key in reversed(self._spec.text.split(".") if self._spec.text is not None else []):
            row = {key: row}
        return msgspec.convert(row or {}, self.struct)

    def documents(self, rows: Sequence[Any]) -> list[str]:
        """Return the text of every row.

        Raises:
            ConfigError: rows have no text.
        """
        if self._get_text is None:
            raise ConfigError("Texts are needed, but data.text is null. Set it, or set mixture.unit=samples.")
        return list(map(self._get_text, rows))

    def columns(self, rows: Sequence[Any]) -> dict[str, Column]:
        """Return the properties of the rows, by name."""
        columns: dict[str, Column] = {}
        for field in self._spec.properties:
            values = _values_at(rows, _attributes(field.path))
            if field.kind is Kind.NUMBER:
                columns[field.name] = np.array(values, np.float64)
            else:
                columns[field.name] = encode_categories(values)
        return columns


def _values_at(rows: Sequence[Any], attributes: str) -> list[Any]:
    """Return the value at a path in every row; None where a parent is null."""
    try:
        return list(map(attrgetter(attributes), rows))
    except AttributeError:
        # A parent is None in some row: go down one key at a time.
        values = list(rows)
        for name in attributes.split("."):
            values = [None if value is None else getattr(value, name) for value in values]
        return values


def _attributes(path: str) -> str:
    """Convert a dotted path of keys to a dotted path of struct attributes."""
    return ".".join(_attribute(key) for key in path.split("."))


def _attribute(key: str) -> str:
    """Return a valid attribute name for any key: the letter k and the key's bytes in hexadecimal."""
    return "k" + key.encode("utf-8", "surrogatepass").hex()


def _add_path(tree: PathTree, path: str, value_type: Any, config_key: str) -> None:
    """Add a path to the tree.

    Raises:
        ConfigError: the path is malformed, or contradicts one that is in the tree already.
    """
    *parents, last = path.split(".")
    if not all(parents) or not last:
        raise ConfigError(f"{config_key} is {path!r}; expected keys with dots between them, e.g. meta.language.")

    # Go down to the last parent, creating trees on the way.
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            parent = path.rpartition(".")[0]
            raise ConfigError(f"{config_key} looks inside {parent!r}, which another path reads as a value.")

    # Two properties may read the same path, if they agree about its kind.
    if tree.setdefault(last, value_type) != value_type:
        raise ConfigError(
            f"{config_key} reads {path!r} as another kind than a second path does. Use one kind for both."
        )


def _define_struct(name: str, tree: PathTree) -> type[msgspec.Struct]:
    """Define the struct of a tree. Keys on the way to the document are required, all others may be missing or null."""
    members: list[Any] = []
    for key, value in tree.items():
        member_type: Any = _define_struct(key, value) if isinstance(value, dict) else value
        if _leads_to_text(value):
            members.append((_attribute(key), member_type))
        else:
            members.append((_attribute(key), member_type | None, None))
    # Struct attributes must be identifiers, keys of a row need not be: the decoder translates.
    rename = {_attribute(key): key for key in tree}
    # Rows hold no reference cycles, so they need not be tracked by the garbage collector.
    return msgspec.defstruct(name, members, rename=rename, gc=False, kw_only=True)


def _leads_to_text(value: Any) -> bool:
    """Return True for the document's type and for a tree that contains it."""
    if isinstance(value, dict):
        return any(map(_leads_to_text, value.values()))
    return value is _TEXT
