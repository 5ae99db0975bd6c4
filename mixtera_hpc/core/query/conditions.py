"""Conditions: the compiled parts of an expression, which are combined to the predicate of the whole expression.

Null is a value. It equals only `None`, differs from everything else, and fails every ordering comparison and every
pattern.
"""

import ast
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.properties import ComboTable, Property
from mixtera_hpc.core.query.predicate import Entries, Evaluate, MatchMask

__all__ = ["Condition", "combine", "compares", "constant", "has_code", "is_null", "negate"]


class Condition(NamedTuple):
    """A compiled part of an expression."""

    evaluate: Evaluate
    numbers: frozenset[str] = frozenset()
    """The number properties that it compares; if empty, combos alone decide."""


def constant(value: bool, numbers: frozenset[str] = frozenset()) -> Condition:
    """Return a condition that is the same for all entries."""

    def evaluate(entries: Entries) -> MatchMask:
        mask = np.full(len(entries.combo), value)
        return MatchMask(mask, mask)

    return Condition(evaluate, numbers)


def combine(conditions: Sequence[Condition], operator: Callable[[MatchMask, MatchMask], MatchMask]) -> Condition:
    """Return a condition that combines the masks of `conditions` from left to right."""

    def evaluate(entries: Entries) -> MatchMask:
        mask = conditions[0].evaluate(entries)
        for condition in conditions[1:]:
            mask = operator(mask, condition.evaluate(entries))
        return mask

    return Condition(evaluate, frozenset().union(*(condition.numbers for condition in conditions)))


def negate(condition: Condition) -> Condition:
    """Return a condition for the entries that do not match."""
    return Condition(lambda entries: ~condition.evaluate(entries), condition.numbers)


def has_code(prop: Property, codes: list[int], *, or_null: bool = False, is_negated: bool = False) -> Condition:
    """Return a condition for entries with one of `codes`, or with null if `or_null`."""
    # The combos of the last call and their result: a query evaluates the same combos again for every block.
    cache: list[tuple[ComboTable, NDArray[np.bool_]]] = []

    def matching_combos(combos: ComboTable) -> NDArray[np.bool_]:
        if not cache or cache[-1][0] is not combos:
            matches = combos.any_of(prop.name, codes)
            if or_null:
                matches = matches | combos.is_null(prop.name)
            cache[:] = [(combos, matches ^ is_negated)]
        return cache[-1][1]

    def evaluate(entries: Entries) -> MatchMask:
        # A combo is the same for all samples of an entry, so the result is certain.
        mask = matching_combos(entries.combos)[entries.combo]
        return MatchMask(mask, mask)

    return Condition(evaluate)


def is_null(name: str) -> Condition:
    """Return a condition for null in a number property. All values of an entry are null if its bounds are NaN."""

    def evaluate(entries: Entries) -> MatchMask:
        return MatchMask(entries.has_null[name], np.isnan(entries.low[name]))

    return Condition(evaluate, frozenset({name}))


def compares(name: str, op: ast.cmpop, value: float) -> Condition:
    """Return a condition for `<`, `<=`, `>`, `>=` or `==` of a number property with `value`.

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

    return Condition(evaluate, frozenset({name}))
