"""Boolean expressions over properties: parsed with `ast` into a small whitelist, evaluated with numpy, never `eval`'d.

One evaluator serves blocks and samples. It works on *entries*: things that have one combo and a range [low, high] for every
number. For a (block, combo) cell of the histogram the range is the block's zone; for a sample low == high. The result is
two masks: `may_match` (some sample of the entry may match) and `must_match` (all of them do); for samples they are equal. Cells where
they differ are the only ones whose samples have to be looked at.

Null is a value: it equals only `None`, differs from everything else, and fails every ordering comparison and pattern.
"""

import ast
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.properties import ComboTable, Kind, Property, as_text
from mixtera_hpc.core.value_pattern import match_values
from mixtera_hpc.errors import ConfigError, did_you_mean

__all__ = ["Entries", "MatchMask", "Predicate", "parse_predicate"]

MAX_DEPTH = 100
"""Of nested and, or, not: deeper than anyone writes, shallow enough to be evaluated."""
_ONE_AT_A_TIME = threading.Lock()
"""CPython 3.11 counts the depth of all threads' syntax trees together: parsing in two at once can end in a SystemError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """What a predicate is evaluated on; n entries."""

    combos: ComboTable
    combo: NDArray[np.integer[Any]]
    """Shape (n,)."""
    low: Mapping[str, NDArray[np.float64]]
    high: Mapping[str, NDArray[np.float64]]
    has_null: Mapping[str, NDArray[np.bool_]]

    @classmethod
    def of_samples(
        cls, combos: ComboTable, combo: NDArray[np.integer[Any]], numbers: Mapping[str, NDArray[np.float64]]
    ) -> "Entries":
        """Entries that are single samples; null numbers are NaN."""
        nulls = {name: np.isnan(values) for name, values in numbers.items()}
        return cls(combos=combos, combo=combo, low=numbers, high=numbers, has_null=nulls)


@dataclass(frozen=True, slots=True)
class MatchMask:
    """`may_match`: some sample of the entry may match. `must_match`: every one does. Shape (n,) each."""

    may_match: NDArray[np.bool_]
    must_match: NDArray[np.bool_]

    def __and__(self, other: "MatchMask") -> "MatchMask":
        return MatchMask(self.may_match & other.may_match, self.must_match & other.must_match)

    def __or__(self, other: "MatchMask") -> "MatchMask":
        return MatchMask(self.may_match | other.may_match, self.must_match | other.must_match)

    def __invert__(self) -> "MatchMask":
        return MatchMask(~self.must_match, ~self.may_match)


@dataclass(frozen=True, slots=True)
class Predicate:
    """A parsed expression."""

    text: str
    evaluate: Callable[[Entries], MatchMask]
    numbers: frozenset[str]
    """The number properties it looks at; empty means that combos alone decide."""


_Node = tuple[Callable[[Entries], MatchMask], frozenset[str]]


def parse_predicate(text: str | None, properties: Mapping[str, Property]) -> Predicate:
    """Compile `text`; None selects everything.

    Raises:
        ConfigError: it does not parse, uses something outside the language, or names an unknown property or value.
    """
    text = (text or "").replace("\n", " ").strip()
    if not text:
        return Predicate("", lambda e: _constant(e, True), frozenset())
    try:
        with _ONE_AT_A_TIME:
            tree = ast.parse(text, mode="eval")
        evaluate, numbers = _Parser(text, properties).node(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f" at column {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
        raise ConfigError(
            f"query.where does not parse{where}: {text[:200]!r}.\n  Write e.g. language in ['en', 'de'] and quality >= 0.7."
        ) from None
    return Predicate(text, evaluate, numbers)


def _constant(entries: Entries, value: bool) -> MatchMask:
    mask = np.full(len(entries.combo), value)
    return MatchMask(mask, mask)


class _Parser:
    """Walks the syntax tree; every node becomes a function Entries → Mask and the numbers it reads."""

    def __init__(self, text: str, properties: Mapping[str, Property]) -> None:
        self.text = text
        self.properties = properties

    def node(self, tree: ast.expr, depth: int = 0) -> _Node:
        if depth > MAX_DEPTH:
            raise RecursionError
        match tree:
            case ast.BoolOp(op=ast.And(), values=values):
                return self._join([self.node(v, depth + 1) for v in values], MatchMask.__and__)
            case ast.BoolOp(op=ast.Or(), values=values):
                return self._join([self.node(v, depth + 1) for v in values], MatchMask.__or__)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                inner, numbers = self.node(operand, depth + 1)
                return (lambda e: ~inner(e)), numbers
            case ast.Compare(left=left, ops=ops, comparators=rights):
                operands = [left, *rights]
                pairs = [self._compare(operands[i], op, operands[i + 1]) for i, op in enumerate(ops)]
                return self._join(pairs, MatchMask.__and__)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return self._call(name, arguments)
            case ast.Constant(value=bool() as value):
                return (lambda e: _constant(e, value)), frozenset()
        raise self._refuse(tree)

    @staticmethod
    def _join(nodes: list[_Node], combine: Callable[[MatchMask, MatchMask], MatchMask]) -> _Node:
        def evaluate(entries: Entries) -> MatchMask:
            mask = nodes[0][0](entries)
            for inner, _ in nodes[1:]:
                mask = combine(mask, inner(entries))
            return mask

        return evaluate, frozenset().union(*(numbers for _, numbers in nodes))

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> _Node:
        if isinstance(left, ast.Name):
            prop, value = self._property(left.id), self._literal(right)
        elif isinstance(right, ast.Name) and type(op) in _MIRRORED:
            prop, value, op = self._property(right.id), self._literal(left), _MIRRORED[type(op)]()
        elif isinstance(right, ast.Name) and isinstance(op, ast.In | ast.NotIn):
            return self._contains(self._property(right.id), self._literal(left), isinstance(op, ast.NotIn))
        else:
            raise self._refuse(left)
        if isinstance(op, ast.Is | ast.IsNot):
            if value is not None:
                raise ConfigError(f"query.where: 'is' compares with None only; write {prop.name} == {value!r}.")
            op = ast.Eq() if isinstance(op, ast.Is) else ast.NotEq()
        return self._number(prop, op, value) if prop.kind is Kind.NUMBER else self._category(prop, op, value)

    def _call(self, name: str, arguments: list[ast.expr]) -> _Node:
        if name != "matches":
            near = did_you_mean(name, ["matches"])
            raise ConfigError(
                f"query.where: {name!r} is not part of the query language; the only function is matches.{near}"
            )
        match arguments:
            case [ast.Name(id=prop), ast.Constant(value=str() as pattern)]:
                return self._matches(self._property(prop), pattern)
        raise ConfigError(
            "query.where: write matches(language, 'en|de'): a property, and a pattern for its whole value."
        )

    def _matches(self, prop: Property, pattern: str) -> _Node:
        if prop.kind is Kind.NUMBER:
            raise ConfigError(
                f"query.where: {prop.name!r} is a number, which has no pattern; compare it, as in 0 < {prop.name} <= 1."
            )
        try:
            codes = match_values(pattern, prop.values)
        except ValueError as error:
            raise ConfigError(f"query.where: {error}") from None
        if not codes:
            near = did_you_mean(pattern, prop.values)
            raise ConfigError(f"query.where: no value of {prop.name!r} matches {pattern!r} as a whole.{near}")
        return self._coded(prop, codes)

    def _contains(self, prop: Property, value: Any, negate: bool) -> _Node:
        if prop.kind is Kind.NUMBER:
            raise ConfigError(f"query.where: {prop.name!r} is a number; write {prop.name} == {value!r}.")
        if prop.kind is not Kind.CATEGORIES:
            raise ConfigError(
                f"query.where: {prop.name!r} has one value per sample; write {prop.name} == {value!r}, or {prop.name} in [...], "
                f"or for a part of it matches({prop.name}, '.*{value}.*')."
            )
        return self._member(prop, [value], negate)

    def _category(self, prop: Property, op: ast.cmpop, value: Any) -> _Node:
        if prop.kind is Kind.CATEGORIES and value is not None:
            raise ConfigError(
                f"query.where: {prop.name!r} has several values per sample; write {_one(value)!r} in {prop.name}."
            )
        match op:
            case ast.Eq() | ast.NotEq() if not isinstance(value, list):
                return self._member(prop, [value], isinstance(op, ast.NotEq))
            case ast.In() | ast.NotIn() if isinstance(value, list):
                return self._member(prop, value, isinstance(op, ast.NotIn))
        raise ConfigError(f"query.where: {prop.name!r} is a category, which has no order; use ==, != or in [...].")

    def _member(self, prop: Property, values: list[Any], negate: bool) -> _Node:
        codes = [self._code(prop, v) for v in values if v is not None]
        return self._coded(prop, codes, null=None in values, negate=negate)

    def _coded(self, prop: Property, codes: list[int], *, null: bool = False, negate: bool = False) -> _Node:
        """Entries with one of `codes`, or with null; decided per combo, once for all entries."""
        decided: list[tuple[ComboTable, NDArray[np.bool_]]] = []

        def decide(combos: ComboTable) -> NDArray[np.bool_]:
            if not decided or decided[-1][0] is not combos:
                hit = combos.any_of(prop.name, codes)
                decided[:] = [(combos, (hit | combos.is_null(prop.name) if null else hit) ^ negate)]
            return decided[-1][1]

        def evaluate(entries: Entries) -> MatchMask:
            mask = decide(entries.combos)[entries.combo]
            return MatchMask(mask, mask)

        return evaluate, frozenset()

    def _number(self, prop: Property, op: ast.cmpop, value: Any) -> _Node:
        if isinstance(op, ast.In | ast.NotIn):
            values = value if isinstance(value, list) else [value]
            node = self._join([self._number(prop, ast.Eq(), v) for v in values], MatchMask.__or__) if values else None
            evaluate = node[0] if node else (lambda e: _constant(e, False))
            return ((lambda e: ~evaluate(e)) if isinstance(op, ast.NotIn) else evaluate), frozenset({prop.name})
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"query.where: {prop.name!r} is a number and cannot be compared with {value!r}.")
        compare = _null_test(prop.name) if value is None else _range_test(prop.name, op, _float(value))
        if value is None and not isinstance(op, ast.Eq | ast.NotEq):
            raise ConfigError(f"query.where: {prop.name!r} can only be == or != None.")
        if isinstance(op, ast.NotEq):
            return (lambda e: ~compare(e)), frozenset({prop.name})
        return compare, frozenset({prop.name})

    def _property(self, name: str) -> Property:
        if name not in self.properties:
            raise ConfigError(
                f"query.where names {name!r}, which is not a property of the index.{did_you_mean(name, list(self.properties))}"
            )
        return self.properties[name]

    def _code(self, prop: Property, value: Any) -> int:
        if isinstance(value, list):
            raise ConfigError(f"query.where: {value!r} is a list where one value of {prop.name!r} is expected.")
        text = as_text(value)
        if text not in prop.values:
            near = did_you_mean(text, prop.values)
            raise ConfigError(f"query.where: no sample has {prop.name} = {value!r}.{near}")
        return prop.values.index(text)

    def _literal(self, tree: ast.expr) -> Any:
        match tree:
            case ast.Constant(value=str() | int() | float() | None as value):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)) if not isinstance(
                value, bool
            ):
                return -value
            case ast.List(elts=elements) | ast.Tuple(elts=elements) | ast.Set(elts=elements):
                return [self._literal(e) for e in elements]
        raise self._refuse(tree)

    def _refuse(self, tree: ast.AST) -> ConfigError:
        piece = ast.get_source_segment(self.text, tree) or type(tree).__name__
        return ConfigError(
            f"query.where: {piece!r} is not part of the query language.\n"
            "  Use property names, text, numbers, lists, None, and: and or not == != < <= > >= in not in is matches(name, 'pattern')."
        )


_MIRRORED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.Gt,
    ast.LtE: ast.GtE,
    ast.Gt: ast.Lt,
    ast.GtE: ast.LtE,
    ast.Eq: ast.Eq,
    ast.NotEq: ast.NotEq,
}


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _null_test(name: str) -> Callable[[Entries], MatchMask]:
    return lambda e: MatchMask(e.has_null[name], np.isnan(e.low[name]))


def _range_test(name: str, op: ast.cmpop, value: float) -> Callable[[Entries], MatchMask]:
    """Ordering comparisons and ==; NaN bounds (all null) compare false, as they should."""

    def evaluate(entries: Entries) -> MatchMask:
        low, high = entries.low[name], entries.high[name]
        match op:
            case ast.Lt():
                can, must = low < value, high < value
            case ast.LtE():
                can, must = low <= value, high <= value
            case ast.Gt():
                can, must = high > value, low > value
            case ast.GtE():
                can, must = high >= value, low >= value
            case _:
                can, must = (low <= value) & (high >= value), (low == value) & (high == value)
        return MatchMask(can, must & ~entries.has_null[name])

    return evaluate
