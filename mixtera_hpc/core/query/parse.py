"""Parse boolean expressions over properties with `ast` into a small whitelist; nothing is given to `eval`."""

import ast
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

from mixtera_hpc.core.properties import Kind, Property, as_text
from mixtera_hpc.core.query.conditions import Condition, combine, compares, constant, has_code, is_null, negate
from mixtera_hpc.core.query.predicate import MatchMask, Predicate
from mixtera_hpc.core.value_pattern import match_values
from mixtera_hpc.errors import ConfigError, did_you_mean

__all__ = ["parse_predicate"]

MAX_DEPTH = 100
"""Levels of nested and, or and not. Deeper expressions could exceed Python's recursion limit when evaluated."""
_PARSE_LOCK = threading.Lock()
"""CPython 3.11 adds up the depth of all threads' syntax trees, so parsing in two at once may raise SystemError."""

CompileDocuments = Callable[[list[ast.expr]], Condition]
"""A function that compiles the arguments of `documents(…)`."""


def parse_predicate(
    text: str | None, properties: Mapping[str, Property], documents: CompileDocuments | None = None
) -> Predicate:
    """Compile `text`; None or an empty text selects everything. `documents` compiles calls that name documents.

    Raises:
        ConfigError: `text` does not parse, uses something outside the query language, or names an unknown property or
            value.
    """
    # YAML folds long queries into lines; Python's grammar would end the expression there.
    text = (text or "").replace("\n", " ").strip()
    if not text:
        return Predicate("", constant(True).evaluate, frozenset())
    try:
        with _PARSE_LOCK:
            tree = ast.parse(text, mode="eval")
        condition = _Compiler(text, properties, documents).compile(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        # ast.parse raises ValueError for null bytes and MemoryError for too many nested brackets.
        column = f" at column {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
        raise ConfigError(
            f"query.where does not parse{column}: {text[:200]!r}.\n"
            "  Write e.g. language in ['en', 'de'] and quality >= 0.7."
        ) from None
    return Predicate(text, condition.evaluate, condition.numbers)


class _Compiler:
    """Walk a syntax tree and turn every node into a function from entries to masks."""

    def __init__(self, text: str, properties: Mapping[str, Property], documents: CompileDocuments | None) -> None:
        self._text = text
        self._documents = documents
        self._properties = properties

    def compile(self, tree: ast.expr, depth: int = 0) -> Condition:
        """Compile one node of the tree.

        Raises:
            ConfigError: the node is not part of the query language.
            RecursionError: and, or and not are nested more than `MAX_DEPTH` levels deep.
        """
        if depth > MAX_DEPTH:
            raise RecursionError
        match tree:
            case ast.BoolOp(op=ast.And(), values=values):
                return combine([self.compile(v, depth + 1) for v in values], MatchMask.__and__)
            case ast.BoolOp(op=ast.Or(), values=values):
                return combine([self.compile(v, depth + 1) for v in values], MatchMask.__or__)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return negate(self.compile(operand, depth + 1))
            case ast.Compare(left=left, ops=ops, comparators=rights):
                # a < b < c means a < b and b < c.
                operands = [left, *rights]
                pairs = [self._compare(operands[i], op, operands[i + 1]) for i, op in enumerate(ops)]
                return combine(pairs, MatchMask.__and__)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return self._call(name, arguments)
            case ast.Constant(value=bool() as value):
                return constant(value)
        raise self._not_in_language(tree)

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Condition:
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

    def _call(self, name: str, arguments: list[ast.expr]) -> Condition:
        if name == "documents" and self._documents is not None:
            return self._documents(arguments)
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

    def _matches(self, prop: Property, pattern: str) -> Condition:
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
        return has_code(prop, codes)

    def _contains(self, prop: Property, value: Any, is_negated: bool) -> Condition:
        """Compile `value in prop`, which is for properties with several values per sample."""
        if prop.kind is Kind.NUMBER:
            raise ConfigError(f"query.where: {prop.name!r} is a number; write {prop.name} == {value!r}.")
        if prop.kind is not Kind.CATEGORIES:
            raise ConfigError(
                f"query.where: {prop.name!r} has one value per sample; write {prop.name} == {value!r}, "
                f"or {prop.name} in [...], or for a part of it matches({prop.name}, '.*{value}.*')."
            )
        return self._is_member(prop, [value], is_negated)

    def _category(self, prop: Property, op: ast.cmpop, value: Any) -> Condition:
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

    def _is_member(self, prop: Property, values: list[Any], is_negated: bool) -> Condition:
        codes = [self._code(prop, v) for v in values if v is not None]
        return has_code(prop, codes, or_null=None in values, is_negated=is_negated)

    def _number(self, prop: Property, op: ast.cmpop, value: Any) -> Condition:
        """Compile a comparison of a number property."""
        # `in` is a disjunction of equalities; an empty list matches nothing.
        if isinstance(op, ast.In | ast.NotIn):
            values = value if isinstance(value, list) else [value]
            nothing = constant(False, frozenset({prop.name}))
            condition = combine([nothing, *(self._number(prop, ast.Eq(), v) for v in values)], MatchMask.__or__)
            return negate(condition) if isinstance(op, ast.NotIn) else condition

        if value is None:
            if not isinstance(op, ast.Eq | ast.NotEq):
                raise ConfigError(f"query.where: {prop.name!r} can only be == or != None.")
            condition = is_null(prop.name)
        # A bool is an int in Python, but not a number of the query language.
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"query.where: {prop.name!r} is a number and cannot be compared with {value!r}.")
        else:
            # != has no separate case: it is evaluated as == and negated, so that nulls differ from every number.
            condition = compares(prop.name, op, _to_float(value))
        return negate(condition) if isinstance(op, ast.NotEq) else condition

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
            case ast.Name(id=name):
                raise ConfigError(
                    f"query.where: {name!r} stands where a value is expected. Put text in quotes: '{name}'."
                )
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


def _to_float(value: float) -> float:
    """Convert a number; an integer beyond the range of float64 becomes infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
