"""Domains: which samples belong to which component of a mixture, counted per block.

A sample belongs to the *first* domain, in written order, whose key it matches; samples that match none are left out. Over
categorical properties this is decided per combo; a predicate over numbers makes the samples of undecided blocks, and only
those, be looked at.
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
    """The answer to a query: domains, and what became of everything else."""

    table: DomainTable
    predicate: Predicate
    combo_domain: NDArray[np.int32]
    """Combo → domain, -1 for none; the predicate not applied. Shape (num_combos,)."""
    selected: tuple[int, int]
    """Samples and tokens that pass the predicate."""
    unassigned: tuple[int, int]
    """Samples and tokens that pass the predicate and match no key."""
    overlaps: tuple[tuple[int, int, int], ...]
    """(domain, later domain, samples): samples of the first that the later key matches as well."""
    pruning: PruningStatistics = field(default_factory=PruningStatistics)
    """What it took."""

    def domain_of(self, combos: ComboTable, columns: SampleColumns) -> NDArray[np.int32]:
        """The domain of every sample of `columns`, -1 for none; shape (rows,)."""
        domain = self.combo_domain[columns.combo]
        if self.predicate.text or self.predicate.numbers:
            entries = Entries.of_samples(combos, columns.combo, columns.numbers)
            domain = np.where(self.predicate.evaluate(entries).must_match, domain, NO_DOMAIN).astype(np.int32)
        return domain


def keys_for_group_by(names: Sequence[str], combos: ComboTable) -> list[DomainKey]:
    """One key for every combination of values of `names` that occurs; with no names, one key that matches everything.

    A multi-valued property contributes its values one by one.
    """
    _check_names(names, combos)
    if not names:
        return [{}]
    found = {
        tuple(choice)
        for combo in range(combos.num_combos)
        if combo != combos.bad
        for choice in itertools.product(*(combos.values(name, combo) or (None,) for name in names))
    }
    ordered = sorted(found, key=lambda values: tuple((v is None, v or "") for v in values))
    return [{name: (value,) for name, value in zip(names, values, strict=True)} for values in ordered]


def select(
    tables: IndexTables,
    predicate: Predicate,
    keys: Sequence[DomainKey],
    read_blocks: ReadBlocks,
) -> Selection:
    """Count rows and tokens of every domain in every block.

    Args:
        read_blocks: called only for blocks that zones and combos cannot decide.

    Raises:
        MixtureError: a key names an unknown property or value, or a property that is a number.
    """
    matches = np.stack([_matches(key, tables.combos) for key in keys])
    if tables.combos.bad >= 0:
        matches[:, tables.combos.bad] = False
    combo_domain = np.where(matches.any(axis=0), matches.argmax(axis=0), NO_DOMAIN).astype(np.int32)
    named = matches & np.array([len(key) > 0 for key in keys])[:, None]
    shared = named.sum(axis=0) > 1
    counter = DomainCounter(tables, predicate, combo_domain, read_blocks, per_combo=bool(shared.any()))
    table = counter.table(len(keys))
    rows, tokens = table.totals()
    left_rows, left_tokens = counter.unassigned.tolist()
    return Selection(
        table=table,
        predicate=predicate,
        combo_domain=combo_domain,
        selected=(int(rows.sum()) + left_rows, int(tokens.sum()) + left_tokens),
        unassigned=(left_rows, left_tokens),
        overlaps=_overlaps(counter.rows_of_combo, combo_domain, named),
        pruning=counter.pruning,
    )


def _overlaps(
    per_combo: NDArray[np.int64], combo_domain: NDArray[np.int32], named: NDArray[np.bool_]
) -> tuple[tuple[int, int, int], ...]:
    """Keys that share samples; a key that takes everything (not `named`) shares nothing."""
    found: dict[tuple[int, int], int] = {}
    for combo in np.flatnonzero((named.sum(axis=0) > 1) & (per_combo > 0)):
        first = combo_domain[combo]
        for other in np.flatnonzero(named[:, combo]) if named[first, combo] else ():
            if other != first:
                pair = (int(first), int(other))
                found[pair] = found.get(pair, 0) + int(per_combo[combo])
    return tuple((a, b, n) for (a, b), n in sorted(found.items()))


def _matches(key: DomainKey, combos: ComboTable) -> NDArray[np.bool_]:
    _check_names(list(key), combos)
    mask = np.ones(combos.num_combos, np.bool_)
    for name, values in key.items():
        hit = combos.any_of(
            name, [c for v in values if v is not None for c in matching_codes(name, v, combos.properties[name].values)]
        )
        mask &= (hit | combos.is_null(name)) if None in values else hit
    return mask


def _check_names(names: Sequence[str], combos: ComboTable) -> None:
    for name in names:
        if name not in combos.properties:
            raise MixtureError(
                f"A domain key names {name!r}, which is not a categorical property of the index."
                f"{did_you_mean(name, list(combos.properties))}"
            )
