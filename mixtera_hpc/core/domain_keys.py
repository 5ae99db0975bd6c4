"""Domain keys: which values of which properties make a component of a mixture, as users write them.

`{language: en, source: [c4, "cc-*", null]}`: every property named must match, by any of its values. In a value `*` stands for
any text, unless the index has exactly that value; `{matches: "c4-(en|de)"}` is a regular expression over the whole value, like
`matches` in queries. `null` matches samples without a value. A sample with several values of a property matches by any one of
them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixtera_hpc.core.properties import as_text
from mixtera_hpc.core.value_pattern import match_values
from mixtera_hpc.errors import MixtureError, did_you_mean

__all__ = [
    "DomainKey",
    "KeyValue",
    "ValuePattern",
    "canonical_key",
    "domain_key_to_plain",
    "domain_name",
    "matching_codes",
    "parse_domain_key",
]


@dataclass(frozen=True, slots=True)
class ValuePattern:
    """The values that a regular expression matches as a whole."""

    pattern: str


KeyValue = str | None | ValuePattern
DomainKey = Mapping[str, tuple[KeyValue, ...]]
"""Property → the values that match; None matches null. An empty key matches everything."""


def parse_domain_key(plain: Mapping[str, Any]) -> DomainKey:
    """A key as YAML and JSON have it: one value, or a list of them; numbers and booleans are matched as text.

    Raises:
        MixtureError: a value is a mapping other than `{matches: pattern}`, or a list has none.
    """
    return {str(name): _values(str(name), value) for name, value in plain.items()}


def domain_key_to_plain(key: DomainKey) -> dict[str, Any]:
    """The inverse of `parse_domain_key`: a single value bare, several as a list."""
    plain = {name: [_plain(v) for v in values] for name, values in key.items()}
    return {name: values[0] if len(values) == 1 else values for name, values in plain.items()}


def domain_name(key: DomainKey) -> str:
    """A key as people read it: `language=en source=C4|CC`."""
    return " ".join(f"{name}={'|'.join(map(_text, values))}" for name, values in key.items()) or "all"


def matching_codes(name: str, value: str | ValuePattern, values: Sequence[str]) -> list[int]:
    """Positions in the dictionary `values` of property `name` that one entry of a key stands for.

    Raises:
        MixtureError: there is none, or the expression is not one that is allowed.
    """
    text = value.pattern if isinstance(value, ValuePattern) else value
    if isinstance(value, ValuePattern):
        try:
            codes, verb = match_values(text, values), "to match"
        except ValueError as error:
            raise MixtureError(f"A domain key's {name}: {error}") from None
    elif text in values or "*" not in text:
        codes, verb = [values.index(text)] if text in values else [], "="
    else:
        codes, verb = [c for c, known in enumerate(values) if _like(known, text.split("*"))], "like"
    if not codes:
        near = did_you_mean(text.replace("*", ""), list(values))
        raise MixtureError(f"A domain key wants {name} {verb} {text!r}, which no sample has.{near}")
    return codes


def _like(value: str, pieces: list[str]) -> bool:
    """Whether `value` is `pieces` with any text between them."""
    first, *middle, last = pieces
    if not value.startswith(first) or not value.endswith(last) or len(value) < len(first) + len(last):
        return False
    at, end = len(first), len(value) - len(last)
    for piece in middle:
        found = value.find(piece, at, end)
        if found < 0:
            return False
        at = found + len(piece)
    return True


def canonical_key(key: DomainKey) -> frozenset[tuple[str, frozenset[KeyValue]]]:
    """Equal for keys that say the same in another order."""
    return frozenset((name, frozenset(values)) for name, values in key.items())


def _values(name: str, value: Any) -> tuple[KeyValue, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    if not values:
        raise MixtureError(f"A domain key has no value for {name!r}. Give one, a list of them, or null.")
    return tuple(_value(name, v) for v in values)


def _value(name: str, value: Any) -> KeyValue:
    if isinstance(value, Mapping):
        if list(value) != ["matches"] or not isinstance(value["matches"], str):
            raise MixtureError(f"A domain key has {name} = {dict(value)!r}; write a value, or {{matches: 'c4-.*'}}.")
        return ValuePattern(value["matches"])
    if isinstance(value, list | tuple):
        raise MixtureError(f"A domain key has a list inside the list of {name!r}: {value!r}. Write one flat list.")
    return None if value is None else as_text(value)


def _plain(value: KeyValue) -> Any:
    return {"matches": value.pattern} if isinstance(value, ValuePattern) else value


def _text(value: KeyValue) -> str:
    if isinstance(value, ValuePattern):
        return f"~{value.pattern}"
    return "null" if value is None else value
