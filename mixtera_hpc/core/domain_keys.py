"""Domain keys: the property values that define a component of a mixture, as users write them.

Example: `{language: en, source: [c4, "cc-*", null]}`. A sample must match every property of the key, by any of its
values.

- `*` in a value stands for any text, unless the index has exactly that value.
- `{matches: "c4-(en|de)"}` is a regular expression for the whole value, like `matches` in queries.
- `null` matches samples without a value.
- For a number, `{min: 0.5}`, `{min: 0.3, below: 0.7}` and `{max: 1}` are ranges. `min` and `max` belong to the range,
  `below` does not.

A sample with several values of a property matches by any one of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mixtera_hpc.core.properties import as_text
from mixtera_hpc.core.value_pattern import match_values
from mixtera_hpc.errors import MixtureError, did_you_mean

__all__ = [
    "DomainKey",
    "KeyValue",
    "NumberRange",
    "ValuePattern",
    "canonical_key",
    "domain_key_to_plain",
    "domain_name",
    "matching_codes",
    "parse_domain_key",
    "ranges_of_bounds",
]

_RANGE_KEYS = frozenset({"min", "max", "below"})


@dataclass(frozen=True, slots=True)
class ValuePattern:
    """The values that a regular expression matches as a whole."""

    pattern: str


@dataclass(frozen=True, slots=True)
class NumberRange:
    """The numbers from `low` on, up to `high`."""

    low: float = -math.inf
    high: float = math.inf
    closed: bool = True
    """True if `high` belongs to the range."""

    @property
    def cuts(self) -> tuple[float, float]:
        """Return the range as the bounds of a half-open interval [low, high) of float64 numbers."""
        return self.low, math.nextafter(self.high, math.inf) if self.closed else self.high

    def __str__(self) -> str:
        ends_closed = self.closed and math.isfinite(self.high)
        return f"[{_short(self.low)},{_short(self.high)}{']' if ends_closed else ')'}"


KeyValue = str | None | ValuePattern | NumberRange
DomainKey = Mapping[str, tuple[KeyValue, ...]]
"""Property → the values that match; None matches null. An empty key matches everything."""


def parse_domain_key(plain: Mapping[str, Any]) -> DomainKey:
    """Build a key from YAML or JSON: each property has one value or a list; numbers and booleans are matched as text.

    Raises:
        MixtureError: a value is a mapping that is neither a pattern nor a range, or a list is empty or nested.
    """
    return {str(name): _parse_values(str(name), value) for name, value in plain.items()}


def domain_key_to_plain(key: DomainKey) -> dict[str, Any]:
    """Return `key` as YAML or JSON, such that `parse_domain_key` reads it back; a single value is not put in a list."""
    plain = {name: [_value_to_plain(v) for v in values] for name, values in key.items()}
    return {name: values[0] if len(values) == 1 else values for name, values in plain.items()}


def domain_name(key: DomainKey) -> str:
    """Return a readable name, such as `language=en source=C4|CC`; an empty key is `all`."""
    return " ".join(f"{name}={'|'.join(map(_value_to_text, values))}" for name, values in key.items()) or "all"


def matching_codes(name: str, value: str | ValuePattern, codes_of: Mapping[str, int]) -> list[int]:
    """Return the codes of property `name` that one value of a key matches.

    Args:
        name: the property, for messages.
        value: an exact value, a value with `*`, or a pattern.
        codes_of: the dictionary of the property, in its order: value → code. An exact value takes one look-up, any
            other one a pass over all values.

    Raises:
        MixtureError: nothing matches, or the regular expression is not allowed.
    """
    # `relation` and `text` describe the value in the message below.
    if isinstance(value, ValuePattern):
        text = value.pattern
        relation = "matching"
        try:
            codes = match_values(text, list(codes_of))
        except ValueError as error:
            raise MixtureError(f"A domain key's {name}: {error}") from None
    elif value in codes_of or "*" not in value:  # An exact value wins over the wildcard that it also is.
        text = value
        relation = "="
        codes = [codes_of[value]] if value in codes_of else []
    else:
        text = value
        relation = "like"
        codes = [code for candidate, code in codes_of.items() if _matches_wildcard(candidate, value.split("*"))]
    if not codes:
        near = did_you_mean(text.replace("*", ""), list(codes_of))
        raise MixtureError(
            f"A domain key names {name} {relation} {text!r}, but no sample matches.{near}{_unquoted_hint(text)}"
        )
    return codes


def _unquoted_hint(text: str) -> str:
    """Return a hint for a value that YAML may have made of another text; empty for any other."""
    if text in ("true", "false"):
        return "\n  YAML reads yes, on, no and off without quotes as true and false. Put the value in quotes: 'no'."
    try:
        float(text)
    except ValueError:
        return ""
    return (
        "\n  If it stands in YAML: 01, 1e5 and 12:30 without quotes are numbers there. Put the value in quotes: '01'."
    )


def _matches_wildcard(value: str, literals: list[str]) -> bool:
    """Return True if `value` is `literals` with any text between them."""
    first, *middle, last = literals
    if not value.startswith(first) or not value.endswith(last) or len(value) < len(first) + len(last):
        return False

    # Taking the leftmost place of each literal leaves the most room for the next ones.
    start = len(first)
    end = len(value) - len(last)
    for literal in middle:
        position = value.find(literal, start, end)
        if position < 0:
            return False
        start = position + len(literal)
    return True


def canonical_key(key: DomainKey) -> frozenset[tuple[str, frozenset[KeyValue]]]:
    """Return a value that is equal for keys that differ only in the order of properties or values."""
    # Values are alternatives: their order and repetition have no meaning.
    return frozenset((name, frozenset(values)) for name, values in key.items())


def _parse_values(name: str, value: Any) -> tuple[KeyValue, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    if not values:
        raise MixtureError(f"A domain key has no value for {name!r}. Give one, a list of them, or null.")
    return tuple(_parse_value(name, v) for v in values)


def _parse_value(name: str, value: Any) -> KeyValue:
    if isinstance(value, Mapping):
        if not _RANGE_KEYS.isdisjoint(value):
            return _parse_range(name, value)
        if list(value) != ["matches"] or not isinstance(value["matches"], str):
            raise MixtureError(
                f"A domain key has {name} = {dict(value)!r}; write a value, {{matches: 'c4-.*'}}, or for a number "
                "{min: 0.3, below: 0.7}."
            )
        return ValuePattern(value["matches"])
    if isinstance(value, list | tuple):
        raise MixtureError(f"A domain key has a list inside the list of {name!r}: {value!r}. Write one flat list.")
    # YAML reads `true` and `2020` as a boolean and a number, but the dictionary holds text.
    return None if value is None else as_text(value)


def _parse_range(name: str, plain: Mapping[str, Any]) -> NumberRange:
    if unknown := sorted(set(map(str, plain)) - _RANGE_KEYS):
        raise MixtureError(f"A domain key's range of {name} has {unknown[0]!r}; it takes min, and max or below.")
    if {"max", "below"} <= set(plain):
        raise MixtureError(f"A domain key's range of {name} has max and below. Give one: only max is in the range.")
    for value in plain.values():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise MixtureError(f"A domain key's range of {name} has {value!r}, expected a finite number.")
    number_range = NumberRange(
        low=float(plain.get("min", -math.inf)),
        high=float(plain.get("max", plain.get("below", math.inf))),
        closed="below" not in plain,
    )
    low, high = number_range.cuts
    if low >= high:
        raise MixtureError(f"A domain key's range of {name} is {dict(plain)!r}, which holds no number.")
    return number_range


def ranges_of_bounds(bounds: Sequence[float]) -> list[NumberRange]:
    """Return the intervals [a, b) between ascending bounds; the last one includes its end."""
    pairs = list(pairwise(map(float, bounds)))
    return [NumberRange(low, high, closed=i == len(pairs) - 1) for i, (low, high) in enumerate(pairs)]


def _value_to_plain(value: KeyValue) -> Any:
    if isinstance(value, NumberRange):
        plain = {"min": value.low, "max" if value.closed else "below": value.high}
        return {name: bound for name, bound in plain.items() if math.isfinite(bound)}
    return {"matches": value.pattern} if isinstance(value, ValuePattern) else value


def _short(number: float) -> str:
    """Return the shortest text of a float that reads back as the same number: 1 for 1.0."""
    return repr(number).removesuffix(".0")


def _value_to_text(value: KeyValue) -> str:
    if isinstance(value, ValuePattern):
        return f"~{value.pattern}"  # ~ marks a pattern, which may look like an exact value.
    if isinstance(value, NumberRange):
        return str(value)
    return "null" if value is None else value
