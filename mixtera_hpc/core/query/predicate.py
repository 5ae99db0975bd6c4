"""Predicates: tests of many entries at once, of which one evaluator serves blocks and samples.

An *entry* has one combo and, for every number, a range [low, high]:

- A (block, combo) cell of the histogram has the zones of its block as ranges.
- A sample has low == high.

The result is a pair of masks. `may_match` is False if no sample of the entry matches. `must_match` is True if all of
them match. For samples the two are equal. Only cells where they differ need their samples to be read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.properties import ComboTable

__all__ = ["Entries", "Evaluate", "MatchMask", "Predicate"]


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


@dataclass(frozen=True, slots=True)
class Predicate:
    """A parsed expression."""

    text: str
    evaluate: Evaluate
    numbers: frozenset[str]
    """The number properties that it compares; if empty, combos alone decide."""
