"""Domains: decide which samples belong to which component of a mixture, and count them per block.

A sample belongs to the *first* domain, in configured order, whose key it matches. Samples that match no key are
unassigned. Categorical properties are decided once per combo. If the query compares numbers, the samples of the blocks
that stay undecided are read, and no others.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.domain_counts import NO_DOMAIN, DomainCounter, DomainTable, PruningStatistics, ReadBlocks
from mixtera_hpc.core.domain_keys import DomainKey, matching_codes
from mixtera_hpc.core.index_tables import IndexTables, SampleColumns
from mixtera_hpc.core.properties import ComboTable
from mixtera_hpc.core.query import Entries, Predicate
from mixtera_hpc.errors import MixtureError, did_you_mean

__all__ = ["DomainKey", "DomainTable", "Selection", "keys_for_group_by", "select"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The result of a query: the selected samples by domain, and statistics of the rest."""

    table: DomainTable
    predicate: Predicate
    combo_domain: NDArray[np.int32]
    """Domain of every combo, -1 for none, whether or not the predicate selects it. Shape (num_combos,)."""
    selected: tuple[int, int]
    """Samples and tokens that the predicate selects."""
    unassigned: tuple[int, int]
    """Samples and tokens that the predicate selects and that match no key."""
    overlaps: tuple[tuple[int, int, int], ...]
    """(domain, later domain, samples): samples of the first domain that match the later key as well."""
    pruning: PruningStatistics = field(default_factory=PruningStatistics)
    """How the blocks were decided."""

    def domain_of(self, combos: ComboTable, columns: SampleColumns) -> NDArray[np.int32]:
        """Return the domain of every sample of `columns`, -1 for none; shape (rows,)."""
        # An empty predicate selects everything, so combos alone decide.
        domain = self.combo_domain[columns.combo]
        if self.predicate.text or self.predicate.numbers:
            entries = Entries.of_samples(combos, columns.combo, columns.numbers)
            domain = np.where(self.predicate.evaluate(entries).must_match, domain, NO_DOMAIN).astype(np.int32)
        return domain


def keys_for_group_by(names: Sequence[str], combos: ComboTable) -> list[DomainKey]:
    """Return one key for every combination of values of the properties `names` that occurs.

    A property with several values per sample contributes each value by itself. Without names, the result is one key
    that matches everything.
    """
    _check_names(names, combos)
    if not names:
        return [{}]
    combinations: set[tuple[str | None, ...]] = set()
    for combo in range(combos.num_combos):
        if combo != combos.bad:
            combinations.update(itertools.product(*(combos.values(name, combo) or (None,) for name in names)))

    # Null sorts last.
    ordered = sorted(combinations, key=lambda values: tuple((v is None, v or "") for v in values))
    return [{name: (value,) for name, value in zip(names, values, strict=True)} for values in ordered]


def select(
    tables: IndexTables,
    predicate: Predicate,
    keys: Sequence[DomainKey],
    read_blocks: ReadBlocks,
) -> Selection:
    """Count the rows and tokens of every domain in every block.

    Args:
        tables: the index.
        predicate: selects the samples.
        keys: one per domain, in the order that decides between them.
        read_blocks: called for the blocks that combos and zones do not decide.

    Raises:
        MixtureError: a key names an unknown property or value, or a number property.
    """
    # Which keys match which combos; shape (num_domains, num_combos). The first key that matches wins.
    matches = np.stack([_matches(key, tables.combos) for key in keys])
    if tables.combos.bad >= 0:
        matches[:, tables.combos.bad] = False
    combo_domain = np.where(matches.any(axis=0), matches.argmax(axis=0), NO_DOMAIN).astype(np.int32)

    # An empty key takes the rest by intention, so it does not count as an overlap.
    is_named = np.array([len(key) > 0 for key in keys])
    named_matches = matches & is_named[:, None]
    has_overlaps = bool((named_matches.sum(axis=0) > 1).any())
    counts = DomainCounter(tables, predicate, combo_domain, read_blocks).count(len(keys), per_combo=has_overlaps)
    rows, tokens = counts.table.totals()
    unassigned_rows, unassigned_tokens = counts.unassigned
    return Selection(
        table=counts.table,
        predicate=predicate,
        combo_domain=combo_domain,
        selected=(int(rows.sum()) + unassigned_rows, int(tokens.sum()) + unassigned_tokens),
        unassigned=counts.unassigned,
        overlaps=_overlaps(counts.rows_of_combo, combo_domain, named_matches),
        pruning=counts.pruning,
    )


def _overlaps(
    rows_of_combo: NDArray[np.int64], combo_domain: NDArray[np.int32], named_matches: NDArray[np.bool_]
) -> tuple[tuple[int, int, int], ...]:
    """Return (domain, later domain, shared samples) for every pair of named keys that share samples."""
    shared: dict[tuple[int, int], int] = {}
    for combo in np.flatnonzero((named_matches.sum(axis=0) > 1) & (rows_of_combo > 0)):
        first = combo_domain[combo]
        if not named_matches[first, combo]:
            continue
        # The combo belongs to its first key. Every later key that matches shares all of its samples.
        for other in np.flatnonzero(named_matches[:, combo]):
            if other != first:
                pair = (int(first), int(other))
                shared[pair] = shared.get(pair, 0) + int(rows_of_combo[combo])
    return tuple((domain, later, samples) for (domain, later), samples in sorted(shared.items()))


def _matches(key: DomainKey, combos: ComboTable) -> NDArray[np.bool_]:
    """Return which combos match `key`; shape (num_combos,)."""
    _check_names(list(key), combos)
    mask = np.ones(combos.num_combos, np.bool_)
    for name, values in key.items():
        # Any value of the property may match, but every property must.
        dictionary = combos.properties[name].values
        codes = [code for v in values if v is not None for code in matching_codes(name, v, dictionary)]
        matches = combos.any_of(name, codes)
        if None in values:
            matches = matches | combos.is_null(name)
        mask &= matches
    return mask


def _check_names(names: Sequence[str], combos: ComboTable) -> None:
    """Raise MixtureError if one of `names` is not a categorical property of the index."""
    for name in names:
        if name not in combos.properties:
            raise MixtureError(
                f"A domain key names {name!r}, which is not a categorical property of the index."
                f"{did_you_mean(name, list(combos.properties))}"
            )
