"""Dotted paths → a generated `msgspec.Struct`, so that decoding a row touches only what is needed.

The decoder skips every other key without building objects for it, and checks types on the way: what comes out needs no
second look.
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
_TYPES: dict[Kind, Any] = {
    Kind.CATEGORY: Scalar | None,
    Kind.CATEGORIES: tuple[Scalar | None, ...] | Scalar | None,
    Kind.NUMBER: float | None,
}
_TEXT = str

Tree = dict[str, Any]
"""Key → a leaf's type, or another tree."""


class RowType:
    """The generated type of a row and how to take columns out of its instances."""

    def __init__(self, fields: ScanSpec) -> None:
        tree: Tree = {}
        if fields.text is not None:
            _add(tree, fields.text, _TEXT, "data.text")
        for field in fields.properties:
            _add(tree, field.path, _TYPES[field.kind], f"data.properties.{field.name}")
        self.struct = _struct("Row", tree)
        self._fields = fields
        self._text = attrgetter(_attributes(fields.text)) if fields.text is not None else None

    def blank(self) -> Any:
        """A row without properties, whose document is empty."""
        row: Any = ""
        for key in reversed(self._fields.text.split(".") if self._fields.text is not None else []):
            row = {key: row}
        return msgspec.convert(row or {}, self.struct)

    def documents(self, rows: Sequence[Any]) -> list[str]:
        """The text of every row.

        Raises:
            ConfigError: rows have none.
        """
        if self._text is None:
            raise ConfigError("Texts were asked for, but data.text is null. Set it, or set mixture.unit=samples.")
        return list(map(self._text, rows))

    def columns(self, rows: Sequence[Any]) -> dict[str, Column]:
        """The properties of the rows, by name."""
        found: dict[str, Column] = {}
        for field in self._fields.properties:
            values = _values(rows, _attributes(field.path))
            found[field.name] = np.array(values, np.float64) if field.kind is Kind.NUMBER else encode_categories(values)
        return found


def _values(rows: Sequence[Any], attributes: str) -> list[Any]:
    """The value at a path in every row; None below a parent that is null."""
    try:
        return list(map(attrgetter(attributes), rows))
    except AttributeError:
        values = list(rows)
        for name in attributes.split("."):
            values = [None if v is None else getattr(v, name) for v in values]
        return values


def _attributes(path: str) -> str:
    """A key may be any text, an attribute may not: every attribute has a letter before it and no other character."""
    return ".".join(_attribute(key) for key in path.split("."))


def _attribute(key: str) -> str:
    return "k" + key.encode("utf-8", "surrogatepass").hex()


def _add(tree: Tree, path: str, leaf: Any, name: str) -> None:
    *parents, last = path.split(".")
    if not all(parents) or not last:
        raise ConfigError(f"{name} is {path!r}, expected keys with dots between them, e.g. meta.language.")
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{name} looks inside {path.rpartition('.')[0]!r}, which another path takes as a value.")
    if tree.setdefault(last, leaf) != leaf:
        raise ConfigError(f"{name} reads {path!r} as something else than another path does. Give both the same kind.")


def _struct(name: str, tree: Tree) -> type[msgspec.Struct]:
    """Keys that lead to the document are required, all others may be missing or null."""
    members: list[Any] = []
    for key, value in tree.items():
        required = value is _TEXT or (isinstance(value, dict) and _leads_to_text(value))
        hint: Any = _struct(key, value) if isinstance(value, dict) else value
        members.append((_attribute(key), hint) if required else (_attribute(key), hint | None, None))
    rename = {_attribute(key): key for key in tree}
    return msgspec.defstruct(name, members, rename=rename, gc=False, kw_only=True)


def _leads_to_text(tree: Tree) -> bool:
    return any(v is _TEXT or (isinstance(v, dict) and _leads_to_text(v)) for v in tree.values())
