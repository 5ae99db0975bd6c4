"""`ComboIndex`: the combos of every value, so that matching many domain keys takes no pass over all combos for each.

Price: one sort of the codes of every property that keys name, then for each key the combos of its rarest value.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.properties import ComboTable

__all__ = ["ComboIndex", "WantedCodes"]

Combos = NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedCodes:
    """The values of one property, of which a combo must have one."""

    name: str
    codes: Sequence[int]
    null: bool
    """True if a combo without a value matches too."""


@dataclass(frozen=True, slots=True)
class _CombosByCode:
    """The combos of one property, ordered by code."""

    combos: Combos
    """The combos of every code, ascending within a code."""
    indptr: NDArray[np.int64]
    """Code c has the combos `combos[indptr[c]:indptr[c + 1]]`; shape (num_codes + 1,)."""
    nulls: Combos
    """Combos without a value."""

    def count(self, wanted: WantedCodes) -> int:
        """Return how many combos match; a combo with several of the values counts for each."""
        counts = [int(self.indptr[code + 1] - self.indptr[code]) for code in wanted.codes]
        return sum(counts) + (len(self.nulls) if wanted.null else 0)

    def matching(self, wanted: WantedCodes) -> Combos:
        """Return the combos with any of the wanted codes, ascending."""
        parts = [self.combos[self.indptr[code] : self.indptr[code + 1]] for code in wanted.codes]
        if wanted.null:
            parts.append(self.nulls)
        # A combo may have several values.
        return parts[0] if len(parts) == 1 else np.unique(np.concatenate([np.zeros(0, np.intp), *parts]))


class ComboIndex:
    """An index from values to combos."""

    def __init__(self, combos: ComboTable) -> None:
        """Compute nothing yet."""
        self._table = combos
        self._by_code: dict[str, _CombosByCode] = {}
        self._codes_of: dict[str, dict[str, int]] = {}

    def codes_of(self, name: str) -> dict[str, int]:
        """Return value → code of property `name`, in the order of its dictionary."""
        if name not in self._codes_of:
            values = self._table.properties[name].values
            self._codes_of[name] = {value: code for code, value in enumerate(values)}
        return self._codes_of[name]

    def matching(self, wanted: Sequence[WantedCodes]) -> Combos:
        """Return the combos that have one of the wanted values in every property, ascending.

        The combo of unreadable rows never matches.
        """
        if not wanted:
            every = np.arange(self._table.num_combos)
            return self._readable(every)
        # The property with the fewest combos first: the others are looked at for these combos only.
        first, *others = sorted(wanted, key=lambda one: self._combos_by_code(one.name).count(one))
        combos = self._combos_by_code(first.name).matching(first)
        for one in others:
            combos = combos[self._has_any(combos, one)]
        return self._readable(combos)

    def _readable(self, combos: Combos) -> Combos:
        readable: Combos = combos[combos != self._table.bad]
        return readable

    def _has_any(self, combos: Combos, wanted: WantedCodes) -> NDArray[np.bool_]:
        """Return which of some combos have one of the wanted values; shape of `combos`."""
        starts = self._table.indptr[wanted.name][combos]
        counts = self._table.indptr[wanted.name][combos + 1] - starts
        owner = np.repeat(np.arange(len(combos)), counts)
        # Positions of the codes of each combo, which are neighbours.
        positions = np.arange(len(owner)) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
        codes = self._table.codes[wanted.name][positions]
        num_wanted = np.bincount(owner[np.isin(codes, np.array(wanted.codes, np.int32))], minlength=len(combos))
        matches: NDArray[np.bool_] = num_wanted > 0
        return matches | (counts == 0) if wanted.null else matches

    def _combos_by_code(self, name: str) -> _CombosByCode:
        if name not in self._by_code:
            table = self._table
            num_values = np.diff(table.indptr[name])
            combo_of_code = np.repeat(np.arange(table.num_combos), num_values)
            codes = table.codes[name]
            # A stable sort keeps the combos of a code ascending.
            combos = combo_of_code[np.argsort(codes, kind="stable")]
            counts = np.bincount(codes, minlength=len(table.properties[name].values))
            self._by_code[name] = _CombosByCode(
                combos=combos,
                indptr=np.append(0, np.cumsum(counts)),
                nulls=np.flatnonzero(num_values == 0),
            )
        return self._by_code[name]
