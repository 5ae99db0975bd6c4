"""Generate a `msgspec.Struct` from dotted paths, so that decoding a row touches only the keys that are needed.

The decoder skips every other key without building objects, and it checks the types. What a type cannot express is
checked afterwards (`RowType.problems`): a text at a dotted path, and a path that is read both as a number and as a
category. `row_paths` has the meaning of dotted paths.
"""

import re
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.formats.base import Column, PropertyField, ScanSpec
from mixtera_hpc.formats.batching.row_paths import path_forms
from mixtera_hpc.formats.category_codes import encode_categories

__all__ = ["RowType"]

Scalar = bool | int | float | str
# Every property may be null. A single scalar is a set of categories with one element.
_TYPES: dict[frozenset[Kind], Any] = {
    frozenset({Kind.CATEGORY}): Scalar | None,
    frozenset({Kind.CATEGORIES}): tuple[Scalar | None, ...] | Scalar | None,
    frozenset({Kind.NUMBER}): float | None,
    # A property and its buckets, for example. Values that are no numbers are found after decoding.
    frozenset({Kind.NUMBER, Kind.CATEGORY}): Scalar | None,
    frozenset({Kind.NUMBER, Kind.CATEGORIES}): tuple[Scalar | None, ...] | Scalar | None,
}
# Stands for the document's type in a `PathTree`.
_TEXT = "text"
# What a row may have in place of an object with the wanted keys.
_NO_OBJECT = bool | int | float | str | list[Any] | None

# The decoder looks for the bytes of a key as they are, without JSON's escapes.
_REFUSED_IN_KEYS = re.compile(r'["\\\x00-\x1f]')

# Key → kinds of a value, `_TEXT`, or another tree.
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
            _add_path(tree, field.path, frozenset({field.kind}), f"data.properties.{field.name}")
        self.struct = _define_struct("Row", tree, is_top=True)
        self._spec = spec
        self._text = _PathReader(spec.text) if spec.text is not None else None
        self._readers = {field.path: _PathReader(field.path) for field in spec.properties}
        kinds: dict[str, set[Kind]] = {}
        for field in spec.properties:
            kinds.setdefault(field.path, set()).add(field.kind)
        self._mixed = [path for path, found in kinds.items() if Kind.NUMBER in found and len(found) > 1]

    def blank(self) -> Any:
        """Return a row with an empty document and without properties."""
        # Wrap the empty text in its parents, from the inside out.
        row: Any = ""
        for key in reversed(self._spec.text.split(".") if self._spec.text is not None else []):
            row = {key: row}
        return msgspec.convert(row or {}, self.struct)

    def problems(self, rows: Sequence[Any]) -> list[tuple[int, str]]:
        """Return (position, problem) for decoded rows that the type accepts but the spec does not."""
        found: list[tuple[int, str]] = []
        if self._text is not None and self._text.is_dotted:
            texts = self._text.texts(rows)
            # The count is one pass in C; nearly always there is nothing to find.
            if None in texts:
                found += [(i, f"no text at {self._spec.text!r}") for i, text in enumerate(texts) if text is None]
        for path in self._mixed:
            values = self._readers[path].values(rows)
            found += [(i, _number_problem(value, path)) for i, value in enumerate(values) if not _is_number(value)]
        return sorted(found)

    def path_forms(self) -> dict[str, tuple[int, ...]]:
        """Return the forms of every dotted path that had values in the rows so far: positions in `path_forms`."""
        readers = dict(self._readers)
        if self._spec.text is not None and self._text is not None:
            readers[self._spec.text] = self._text
        return {path: tuple(sorted(reader.forms_with_values)) for path, reader in readers.items() if reader.is_dotted}

    def documents(self, rows: Sequence[Any]) -> list[str]:
        """Return the text of every row.

        Raises:
            ConfigError: rows have no text.
            ValueError: a row has no text at a dotted path.
        """
        if self._text is None:
            raise ConfigError("Texts are needed, but data.text is null. Set it, or set mixture.unit=samples.")
        texts = self._text.texts(rows)
        if self._text.is_dotted and None in texts:
            raise ValueError(f"row {texts.index(None)} has no text at {self._spec.text!r}")
        return texts

    def columns(self, rows: Sequence[Any]) -> dict[str, Column]:
        """Return the properties of the rows, by name."""
        return {field.name: _column(field, self._readers[field.path].values(rows)) for field in self._spec.properties}


def _column(field: PropertyField, values: list[Any]) -> Column:
    if field.kind is Kind.NUMBER:
        return np.array(values, np.float64)
    return encode_categories(values)


def _is_number(value: Any) -> bool:
    """Return True for null and for a number that a float can hold."""
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            float(value)
        except OverflowError:
            return False
        return True
    return value is None or isinstance(value, float)


def _number_problem(value: Any, path: str) -> str:
    return f"Expected `float | null`, got `{type(value).__name__}` - at `$.{path}`, which a number property reads"


class _PathReader:
    """Takes the value at a dotted path out of decoded rows, and remembers which forms of the path had values."""

    def __init__(self, path: str) -> None:
        forms = path_forms(path)
        self.is_dotted = len(forms) > 1
        self._forms = [[_attribute(key) for key in keys] for keys in forms]
        # attrgetter follows a chain of attributes in C, which is faster than a Python loop per row.
        self._getters = [attrgetter(".".join(attributes)) for attributes in self._forms]
        self.forms_with_values: set[int] = set()

    def values(self, rows: Sequence[Any]) -> list[Any]:
        """Return the value of every row; None where there is none."""
        last = len(self._forms) - 1
        values = self._follow(last, rows, None)
        if not self.is_dotted:
            return values
        # After the first rows with a value, no further ones are looked at.
        if last not in self.forms_with_values and any(value not in (None, UNSET) for value in values):
            self.forms_with_values.add(last)
        # The forms with a dot in a key win, and hardly ever exist: a count in C shows it.
        for number in reversed(range(last)):
            preferred = self._follow(number, rows, UNSET)
            if preferred.count(UNSET) < len(preferred):
                self.forms_with_values.add(number)
                values = [old if new is UNSET else new for new, old in zip(preferred, values, strict=True)]
        return values

    def texts(self, rows: Sequence[Any]) -> list[Any]:
        """Return the text of every row; None where there is none."""
        values = self.values(rows)
        return [None if value is UNSET else value for value in values] if self.is_dotted else values

    def _follow(self, number: int, rows: Sequence[Any], missing: Any) -> list[Any]:
        """Return the value of one form in every row; `missing` where a parent is no object."""
        try:
            return list(map(self._getters[number], rows))
        except AttributeError:
            # A parent is no object in some row: go down one key at a time.
            values = list(rows)
            for name in self._forms[number]:
                values = [getattr(value, name, missing) for value in values]
            return values


def _attribute(key: str) -> str:
    """Return a valid attribute name for any key: the letter k and the key's bytes in hexadecimal."""
    return "k" + key.encode("utf-8", "surrogatepass").hex()


def _add_path(tree: PathTree, path: str, leaf: Any, config_key: str) -> None:
    """Add every form of a path to the tree.

    Raises:
        ConfigError: the path is malformed, or contradicts one that is in the tree already.
    """
    if not all(path.split(".")):
        raise ConfigError(f"{config_key} is {path!r}; expected keys with dots between them, e.g. meta.language.")
    for *parents, last in path_forms(path):
        subtree = tree
        # Go down to the last parent, creating trees on the way.
        for key in parents:
            subtree = subtree.setdefault(key, {})
            if not isinstance(subtree, dict):
                parent = path.rpartition(".")[0]
                raise ConfigError(f"{config_key} looks inside {parent!r}, which another path reads as a value.")
        merged = _merge_leaves(subtree.setdefault(last, leaf), leaf)
        if merged is None:
            raise ConfigError(
                f"{config_key} reads {path!r} as another kind than a second path does. Use one kind for both."
            )
        subtree[last] = merged


def _merge_leaves(old: Any, new: Any) -> Any:
    """Return what two paths to one value ask for together; None if they contradict each other."""
    if old == new:
        return old
    if isinstance(old, frozenset) and isinstance(new, frozenset) and old | new in _TYPES:
        return old | new
    return None


def _define_struct(name: str, tree: PathTree, *, is_top: bool = False) -> type[msgspec.Struct]:
    """Define the struct of a tree. Only a text at the top level is required; all other keys may be missing.

    Raises:
        ConfigError: a key has characters that the decoder does not accept.
    """
    members: list[Any] = []
    for key in filter(_REFUSED_IN_KEYS.search, tree):
        raise ConfigError(
            f"The key {key!r} of rows cannot be read: keys in data.text and data.properties must be without quotation "
            "marks, backslashes and control characters.\n  Rename the key in the data, or read it with data.parser."
        )
    for key, value in tree.items():
        if value is _TEXT and is_top and "." not in key:
            members.append((_attribute(key), str))
        elif value is _TEXT:
            members.append((_attribute(key), str | UnsetType, UNSET))
        elif isinstance(value, dict):
            members.append((_attribute(key), _define_struct(key, value) | _NO_OBJECT, None))
        elif "." in key:
            # A key with dots in it wins if it exists, even if it is null.
            members.append((_attribute(key), _TYPES[value] | UnsetType, UNSET))
        else:
            members.append((_attribute(key), _TYPES[value], None))
    # Struct attributes must be identifiers, keys of a row need not be: the decoder translates.
    rename = {_attribute(key): key for key in tree}
    # Rows hold no reference cycles, so they need not be tracked by the garbage collector.
    return msgspec.defstruct(name, members, rename=rename, gc=False, kw_only=True)
