"""Boolean expressions over properties, parsed with `ast` into a small whitelist and evaluated with numpy (not `eval`).

One evaluator serves blocks and samples. It works on *entries*. An entry has one combo and, for every number, a range
[low, high]:

- A (block, combo) cell of the histogram has the zones of its block as ranges.
- A sample has low == high.

The result is a pair of masks. `may_match` is False if no sample of the entry matches. `must_match` is True if all of
them match. For samples the two are equal. Only cells where they differ need their samples to be read.

Null is a value. It equals only `None`, differs from everything else, and fails every ordering comparison and every
pattern.
"""

import ast
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.properties import ComboTable, Kind, Property, as_text
from mixtera_hpc.core.value_pattern import match_values
from mixtera_hpc.errors import ConfigError, did_you_mean

__all__ = ["Entries", "Evaluate", "MatchMask", "Predicate", "parse_predicate"]

MAX_DEPTH = 100
"""Levels of nested and, or and not. Deeper expressions could exceed Python's recursion limit when evaluated."""
_PARSE_LOCK = threading.Lock()
"""CPython 3.11 adds up the depth of all threads' syntax trees, so parsing in two at once may raise SystemError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """The n entries that a predicate is evaluated on; every array has shape (n,)."""

    combos: ComboTable
    combo: NDArray[np.integer[Any]]
    low: Mapping[str, NDArray[np.float64]]
    """Name of the number property → smallest value of each entry; NaN if all values of the entry are null."""
    high: Mapping[str, NDArray[np.float64]]
    has_null: Mapping[str, NDArray[np.bool_]]

    @classmethod
    def of_samples(
        cls, combos: ComboTable, combo: NDArray[np.integer[Any]], numbers: Mapping[str, NDArray[np.float64]]
    ) -> "Entries":
        """Return one entry per sample; null numbers are NaN."""
        nulls = {name: np.isnan(values) for name, values in numbers.items()}
        return cls(combos=combos, combo=combo, low=numbers, high=numbers, has_null=nulls)


@dataclass(frozen=True, slots=True)
class MatchMask:
    """The result of a predicate for n entries; shape (n,) each."""

    may_match: NDArray[np.bool_]
    """False if no sample of the entry matches."""
    must_match: NDArray[np.bool_]
    """True if every sample of the entry matches."""

    def __and__(self, other: "MatchMask") -> "MatchMask":
        return MatchMask(self.may_match & other.may_match, self.must_match & other.must_match)

    def __or__(self, other: "MatchMask") -> "MatchMask":
        return MatchMask(self.may_match | other.may_match, self.must_match | other.must_match)

    def __invert__(self) -> "MatchMask":
        # If all samples match, none matches the negation. If none may match, all match it.
        return MatchMask(~self.must_match, ~self.may_match)


Evaluate = Callable[[Entries], MatchMask]
NameDocuments = Callable[[list[ast.expr]], tuple[Evaluate, frozenset[str]]]


@dataclass(frozen=True, slots=True)
class Predicate:
    """A parsed expression."""

    text: str
    evaluate: Evaluate
    numbers: frozenset[str]
    """The number properties that it compares; if empty, combos alone decide."""


class _Node(NamedTuple):
    """A compiled part of an expression."""

    evaluate: Evaluate
    numbers: frozenset[str]


def parse_predicate(
    text: str | None, properties: Mapping[str, Property], documents: NameDocuments | None = None
) -> Predicate:
    """Compile `text`; None or an empty text selects everything. `documents` compiles calls that name documents.

    Raises:
        ConfigError: `text` does not parse, uses something outside the query language, or names an unknown property or
            value.
    """
    # YAML folds long queries into lines; Python's grammar would end the expression there.
    text = (text or "").replace("\n", " ").strip()
    if not text:
        return Predicate("", lambda e: _constant(e, True), frozenset())
    try:
        with _PARSE_LOCK:
            tree = ast.parse(text, mode="eval")
        node = _Compiler(text, properties, documents).compile(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        # ast.parse raises ValueError for null bytes and MemoryError for too many nested brackets.
        column = f" at column {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
        raise ConfigError(
            f"query.where does not parse{column}: {text[:200]!r}.\n"
            "  Write e.g. language in ['en', 'de'] and quality >= 0.7."
        ) from None
    return Predicate(text, node.evaluate, node.numbers)


def _constant(entries: Entries, value: bool) -> MatchMask:
    mask = np.full(len(entries.combo), value)
    return MatchMask(mask, mask)


class _Compiler:
    """Walk a syntax tree and turn every node into a function from entries to masks."""

    def __init__(self, text: str, properties: Mapping[str, Property], documents: NameDocuments | None) -> None:
        self._text = text
        self._documents = documents
        self._properties = properties

    def compile(self, tree: ast.expr, depth: int = 0) -> _Node:
        """Compile one node of the tree.

        Raises:
            ConfigError: the node is not part of the query language.
            RecursionError: and, or and not are nested more than `MAX_DEPTH` levels deep.
        """
        if depth > MAX_DEPTH:
            raise RecursionError
        match tree:
            case ast.BoolOp(op=ast.And(), values=values):
                return _combine([self.compile(v, depth + 1) for v in values], MatchMask.__and__)
            case ast.BoolOp(op=ast.Or(), values=values):
                return _combine([self.compile(v, depth + 1) for v in values], MatchMask.__or__)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return _negate(self.compile(operand, depth + 1))
            case ast.Compare(left=left, ops=ops, comparators=rights):
                # a < b < c means a < b and b < c.
                operands = [left, *rights]
                pairs = [self._compare(operands[i], op, operands[i + 1]) for i, op in enumerate(ops)]
                return _combine(pairs, MatchMask.__and__)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return self._call(name, arguments)
            case ast.Constant(value=bool() as value):
                return _Node(lambda e: _constant(e, value), frozenset())
        raise self._not_in_language(tree)

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> _Node:
        """Compile one comparison of a property with a literal, in either order."""
        if isinstance(left, ast.Name):
            prop = self._property(left.id)
            value = self._literal(right)
        elif isinstance(right, ast.Name) and type(op) in _MIRRORED:  # 0.5 < quality
            prop = self._property(right.id)
            value = self._literal(left)
            op = _MIRRORED[type(op)]()
        elif isinstance(right, ast.Name) and isinstance(op, ast.In | ast.NotIn):  # 'en' in languages
            return self._contains(self._property(right.id), self._literal(left), isinstance(op, ast.NotIn))
        else:
            raise self._not_in_language(left)

        # `is None` is accepted as a synonym of `== None`.
        if isinstance(op, ast.Is | ast.IsNot):
            if value is not None:
                raise ConfigError(f"query.where: 'is' compares with None only; write {prop.name} == {value!r}.")
            op = ast.Eq() if isinstance(op, ast.Is) else ast.NotEq()
        if prop.kind is Kind.NUMBER:
            return self._number(prop, op, value)
        return self._category(prop, op, value)

    def _call(self, name: str, arguments: list[ast.expr]) -> _Node:
        if name == "documents" and self._documents is not None:
            return _Node(*self._documents(arguments))
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
        return _has_code(prop, codes)

    def _contains(self, prop: Property, value: Any, negate: bool) -> _Node:
        """Compile `value in prop`, which is for properties with several values per sample."""
        if prop.kind is Kind.NUMBER:
            raise ConfigError(f"query.where: {prop.name!r} is a number; write {prop.name} == {value!r}.")
        if prop.kind is not Kind.CATEGORIES:
            raise ConfigError(
                f"query.where: {prop.name!r} has one value per sample; write {prop.name} == {value!r}, "
                f"or {prop.name} in [...], or for a part of it matches({prop.name}, '.*{value}.*')."
            )
        return self._is_member(prop, [value], negate)

    def _category(self, prop: Property, op: ast.cmpop, value: Any) -> _Node:
        """Compile ==, !=, in [...] and not in [...] for a categorical property."""
        if prop.kind is Kind.CATEGORIES and value is not None:
            first = value[0] if isinstance(value, list) and value else value
            raise ConfigError(
                f"query.where: {prop.name!r} has several values per sample; write {first!r} in {prop.name}."
            )
        match op:
            case ast.Eq() | ast.NotEq() if not isinstance(value, list):
                return self._is_member(prop, [value], isinstance(op, ast.NotEq))
            case ast.In() | ast.NotIn() if isinstance(value, list):
                return self._is_member(prop, value, isinstance(op, ast.NotIn))
        raise ConfigError(f"query.where: {prop.name!r} is a category, which has no order; use ==, != or in [...].")

    def _is_member(self, prop: Property, values: list[Any], negate: bool) -> _Node:
        codes = [self._code(prop, v) for v in values if v is not None]
        return _has_code(prop, codes, or_null=None in values, negate=negate)

    def _number(self, prop: Property, op: ast.cmpop, value: Any) -> _Node:
        """Compile a comparison of a number property."""
        # `in` is a disjunction of equalities; an empty list matches nothing.
        numbers = frozenset({prop.name})
        if isinstance(op, ast.In | ast.NotIn):
            values = value if isinstance(value, list) else [value]
            nothing = _Node(lambda e: _constant(e, False), numbers)
            node = _combine([nothing, *(self._number(prop, ast.Eq(), v) for v in values)], MatchMask.__or__)
            return _negate(node) if isinstance(op, ast.NotIn) else node

        if value is None:
            if not isinstance(op, ast.Eq | ast.NotEq):
                raise ConfigError(f"query.where: {prop.name!r} can only be == or != None.")
            node = _Node(_null_test(prop.name), numbers)
        # A bool is an int in Python, but not a number of the query language.
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"query.where: {prop.name!r} is a number and cannot be compared with {value!r}.")
        else:
            # != has no separate case: it is evaluated as == and negated, so that nulls differ from every number.
            node = _Node(_range_test(prop.name, op, _to_float(value)), numbers)
        return _negate(node) if isinstance(op, ast.NotEq) else node

    def _property(self, name: str) -> Property:
        if name not in self._properties:
            near = did_you_mean(name, list(self._properties))
            raise ConfigError(f"query.where names {name!r}, which is not a property of the index.{near}")
        return self._properties[name]

    def _code(self, prop: Property, value: Any) -> int:
        """Return the code of `value` in the dictionary of `prop`."""
        if isinstance(value, list):
            raise ConfigError(f"query.where: {value!r} is a list where one value of {prop.name!r} is expected.")
        text = as_text(value)
        # Refuse a value that no sample has: it is far more often a typo than a query for nothing.
        if text not in prop.values:
            near = did_you_mean(text, prop.values)
            raise ConfigError(f"query.where: no sample has {prop.name} = {value!r}.{near}")
        return prop.values.index(text)

    def _literal(self, tree: ast.expr) -> Any:
        """Return the value of a text, a number, None, or a list of them."""
        # The grammar has no negative literals: -1 is a minus applied to 1.
        match tree:
            case ast.Constant(value=str() | int() | float() | None as value):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)) if not isinstance(
                value, bool
            ):
                return -value
            case ast.List(elts=elements) | ast.Tuple(elts=elements) | ast.Set(elts=elements):
                return [self._literal(e) for e in elements]
        raise self._not_in_language(tree)

    def _not_in_language(self, tree: ast.AST) -> ConfigError:
        source = ast.get_source_segment(self._text, tree) or type(tree).__name__
        return ConfigError(
            f"query.where: {source!r} is not part of the query language.\n"
            "  Use property names, text, numbers, lists, None, and: "
            "and or not == != < <= > >= in not in is matches(name, 'pattern')."
        )


_MIRRORED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.Gt,
    ast.LtE: ast.GtE,
    ast.Gt: ast.Lt,
    ast.GtE: ast.LtE,
    ast.Eq: ast.Eq,
    ast.NotEq: ast.NotEq,
}
"""Operator for the operands in the other order: 1 < x is x > 1."""


def _combine(nodes: list[_Node], operator: Callable[[MatchMask, MatchMask], MatchMask]) -> _Node:
    """Return a node that combines the masks of `nodes` from left to right."""

    def evaluate(entries: Entries) -> MatchMask:
        mask = nodes[0].evaluate(entries)
        for node in nodes[1:]:
            mask = operator(mask, node.evaluate(entries))
        return mask

    return _Node(evaluate, frozenset().union(*(node.numbers for node in nodes)))


def _negate(node: _Node) -> _Node:
    evaluate = node.evaluate
    return _Node(lambda e: ~evaluate(e), node.numbers)


def _has_code(prop: Property, codes: list[int], *, or_null: bool = False, negate: bool = False) -> _Node:
    """Return a node for entries with one of `codes`, or with null if `or_null`."""
    # The combos of the last call and their result: a query evaluates the same combos again for every block.
    cache: list[tuple[ComboTable, NDArray[np.bool_]]] = []

    def matching_combos(combos: ComboTable) -> NDArray[np.bool_]:
        if not cache or cache[-1][0] is not combos:
            matches = combos.any_of(prop.name, codes)
            if or_null:
                matches = matches | combos.is_null(prop.name)
            cache[:] = [(combos, matches ^ negate)]
        return cache[-1][1]

    def evaluate(entries: Entries) -> MatchMask:
        # A combo is the same for all samples of an entry, so the result is certain.
        mask = matching_combos(entries.combos)[entries.combo]
        return MatchMask(mask, mask)

    return _Node(evaluate, frozenset())


def _to_float(value: float) -> float:
    """Convert a number; an integer beyond the range of float64 becomes infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _null_test(name: str) -> Evaluate:
    """Return a test for null. All values of an entry are null exactly if its bounds are NaN."""
    return lambda e: MatchMask(e.has_null[name], np.isnan(e.low[name]))


def _range_test(name: str, op: ast.cmpop, value: float) -> Evaluate:
    """Return a test for `<`, `<=`, `>`, `>=` or `==` with `value`.

    Bounds of NaN, where all values are null, compare false, as nulls must.
    """

    def evaluate(entries: Entries) -> MatchMask:
        low = entries.low[name]
        high = entries.high[name]
        match op:
            case ast.Lt():
                may_match = low < value
                must_match = high < value
            case ast.LtE():
                may_match = low <= value
                must_match = high <= value
            case ast.Gt():
                may_match = high > value
                must_match = low > value
            case ast.GtE():
                may_match = high >= value
                must_match = low >= value
            case _:  # ==
                may_match = (low <= value) & (high >= value)
                must_match = (low == value) & (high == value)

        # The bounds ignore nulls, and a null sample does not match.
        return MatchMask(may_match, must_match & ~entries.has_null[name])

    return evaluate
