"""Domains: which samples belong to which component of a mixture, counted per block.

A sample belongs to the *first* domain, in written order, whose key it matches; samples that match none are left out. Over
categorical properties this is decided per combo; a predicate over numbers makes the samples of undecided blocks, and only
those, be looked at.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.keys import DomainKey, Matches
from mixtera_hpc.core.properties import ComboTable
from mixtera_hpc.core.query import Entries, Mask, Predicate
from mixtera_hpc.core.tables import IndexTables, SampleColumns
from mixtera_hpc.errors import MixtureError, did_you_mean

__all__ = ["DomainKey", "DomainTable", "Selection", "keys_by", "select"]

NO_DOMAIN = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainTable:
    """The blocks of every domain and what they hold of it.

    Entries of domain d are `indptr[d]:indptr[d + 1]`, blocks ascending; a block may belong to several domains.
    """

    indptr: NDArray[np.int64]
    """Shape (num_domains + 1,)."""
    block: NDArray[np.int32]
    rows: NDArray[np.int32]
    tokens: NDArray[np.int64]
    """Without special tokens."""

    @property
    def num_domains(self) -> int:
        return len(self.indptr) - 1

    def totals(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and tokens of every domain; shape (num_domains,) each."""
        domain = np.repeat(np.arange(self.num_domains), np.diff(self.indptr))
        rows, tokens = np.zeros(self.num_domains, np.int64), np.zeros(self.num_domains, np.int64)
        np.add.at(rows, domain, self.rows)
        np.add.at(tokens, domain, self.tokens)
        return rows, tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The answer to a query: domains, and what became of everything else."""

    table: DomainTable
    predicate: Predicate
    combo_domain: NDArray[np.int32]
    """Combo → domain, -1 for none; the predicate not applied. Shape (num_combos,)."""
    selected: tuple[int, int]
    """Samples and tokens that pass the predicate."""
    left_out: tuple[int, int]
    """Samples and tokens that pass the predicate and match no key."""
    overlaps: tuple[tuple[int, int, int], ...]
    """(domain, later domain, samples): samples of the first that the later key matches as well."""
    scanned_blocks: int
    """Blocks whose samples had to be looked at."""

    def domain_of(self, combos: ComboTable, columns: SampleColumns) -> NDArray[np.int32]:
        """The domain of every sample of `columns`, -1 for none; shape (rows,)."""
        domain = self.combo_domain[columns.combo]
        if self.predicate.text:
            entries = Entries.of_samples(combos, columns.combo, columns.numbers)
            domain = np.where(self.predicate.evaluate(entries).must, domain, NO_DOMAIN).astype(np.int32)
        return domain


def keys_by(names: Sequence[str], combos: ComboTable) -> list[DomainKey]:
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
    read_block: Callable[[int], SampleColumns],
) -> Selection:
    """Count rows and tokens of every domain in every block.

    Args:
        read_block: reads the samples of one block; called only for blocks that zones and combos cannot decide.

    Raises:
        MixtureError: a key names an unknown property or value, or a property that is a number.
    """
    matches = np.stack([_matches(key, tables.combos) for key in keys])
    if tables.combos.bad >= 0:
        matches[:, tables.combos.bad] = False
    combo_domain = np.where(matches.any(axis=0), matches.argmax(axis=0), NO_DOMAIN).astype(np.int32)
    cells, mask = _cells(tables, predicate)
    undecided = np.unique(cells.block[mask.can & ~mask.must])
    keep = mask.must & ~np.isin(cells.block, undecided) if len(undecided) else mask.must
    counts = _joined([cells.only(keep), *_scan(tables, predicate, undecided, read_block)])
    named = matches & np.array([len(key) > 0 for key in keys])[:, None]  # Everything else is no overlap.
    return _summarise(counts, combo_domain, named, predicate, len(undecided))


@dataclass(frozen=True, slots=True)
class _Counts:
    """Rows and tokens per (block, combo) cell, blocks ascending."""

    block: NDArray[np.int32]
    combo: NDArray[np.int32]
    rows: NDArray[np.int32]
    tokens: NDArray[np.int64]

    def only(self, keep: NDArray[np.bool_]) -> "_Counts":
        """Some of the cells; no copy when it is all of them."""
        if keep.all():
            return self
        return _Counts(self.block[keep], self.combo[keep], self.rows[keep], self.tokens[keep])


def _joined(parts: Sequence[_Counts]) -> _Counts:
    if len(parts) == 1:
        return parts[0]
    order = np.argsort(np.concatenate([part.block for part in parts]), kind="stable")
    return _Counts(*(np.concatenate([getattr(p, f.name) for p in parts])[order] for f in fields(_Counts)))


def _cells(tables: IndexTables, predicate: Predicate) -> tuple[_Counts, Mask]:
    """Every cell of the histogram, and what the predicate says of it without looking at samples."""
    histogram, zones = tables.histogram, tables.blocks.zones
    block = np.repeat(np.arange(len(tables.blocks), dtype=np.int32), np.diff(histogram.indptr))
    cells = _Counts(block, histogram.combo, histogram.rows, histogram.tokens)
    if predicate.numbers:
        low = {n: zones[n].low[block] for n in predicate.numbers}
        high = {n: zones[n].high[block] for n in predicate.numbers}
        nulls = {n: zones[n].has_null[block] for n in predicate.numbers}
        entries = Entries(combos=tables.combos, combo=histogram.combo, low=low, high=high, has_null=nulls)
        return cells, predicate.evaluate(entries)
    every = Entries.of_samples(tables.combos, np.arange(tables.combos.num_combos), {})
    per_combo = predicate.evaluate(every).must[histogram.combo]
    return cells, Mask(per_combo, per_combo)


def _scan(
    tables: IndexTables, predicate: Predicate, blocks: NDArray[np.int32], read_block: Callable[[int], SampleColumns]
) -> list[_Counts]:
    found = []
    for block in blocks:
        columns = read_block(int(block))
        hit = predicate.evaluate(Entries.of_samples(tables.combos, columns.combo, columns.numbers)).must
        hit &= columns.combo != tables.combos.bad
        combo, position = np.unique(columns.combo[hit], return_inverse=True)
        rows = np.bincount(position, minlength=len(combo)).astype(np.int32)
        tokens = np.zeros(len(combo), np.int64)
        np.add.at(tokens, position, columns.tokens[hit])
        found.append(_Counts(np.full(len(combo), block, np.int32), combo.astype(np.int32), rows, tokens))
    return found


def _summarise(
    counts: _Counts, combo_domain: NDArray[np.int32], matches: NDArray[np.bool_], predicate: Predicate, scanned: int
) -> Selection:
    domain = combo_domain[counts.combo]
    out = domain == NO_DOMAIN
    return Selection(
        table=_domain_table(counts, domain, len(matches)),
        predicate=predicate,
        combo_domain=combo_domain,
        selected=(int(counts.rows.sum(dtype=np.int64)), int(counts.tokens.sum())),
        left_out=(int(counts.rows[out].sum(dtype=np.int64)), int(counts.tokens[out].sum())),
        overlaps=_overlaps(counts, combo_domain, matches),
        scanned_blocks=scanned,
    )


def _domain_table(counts: _Counts, domain: NDArray[np.int32], num_domains: int) -> DomainTable:
    """Add up the cells of one (domain, block); cells are sorted by domain, then block."""
    narrow = domain.astype(np.int16) if num_domains < 1 << 15 else domain  # Stable sorts of 16 bits are radix sorts.
    order = np.argsort(narrow, kind="stable")[np.count_nonzero(domain == NO_DOMAIN) :]
    domain, block = domain[order], counts.block[order]
    first = np.flatnonzero(np.r_[True, (domain[1:] != domain[:-1]) | (block[1:] != block[:-1])][: len(order)])
    per_domain = np.bincount(domain[first], minlength=num_domains)
    return DomainTable(
        indptr=np.concatenate([[0], np.cumsum(per_domain)]).astype(np.int64),
        block=block[first],
        rows=_sum_runs(counts.rows[order], first),
        tokens=_sum_runs(counts.tokens[order], first),
    )


def _sum_runs(values: NDArray[Any], first: NDArray[np.int64]) -> NDArray[Any]:
    """Sums of consecutive runs that begin at `first`; a block's rows fit the type of its cells'."""
    return np.add.reduceat(values, first, dtype=values.dtype) if len(first) else values[:0]


def _overlaps(
    counts: _Counts, combo_domain: NDArray[np.int32], matches: NDArray[np.bool_]
) -> tuple[tuple[int, int, int], ...]:
    several = matches.sum(axis=0) > 1
    if not several.any():
        return ()
    per_combo = np.zeros(len(combo_domain), np.int64)
    np.add.at(per_combo, counts.combo, counts.rows)
    found: dict[tuple[int, int], int] = {}
    for combo in np.flatnonzero(several & (per_combo > 0)):
        first, *later = np.flatnonzero(matches[:, combo])
        for other in later:
            pair = (int(first), int(other))
            found[pair] = found.get(pair, 0) + int(per_combo[combo])
    return tuple((a, b, n) for (a, b), n in sorted(found.items()))


def _matches(key: DomainKey, combos: ComboTable) -> NDArray[np.bool_]:
    _check_names(list(key), combos)
    mask = np.ones(combos.num_combos, np.bool_)
    for name, values in key.items():
        hit = combos.any_of(name, [c for v in values if v is not None for c in _codes(name, v, combos)])
        mask &= (hit | combos.is_null(name)) if None in values else hit
    return mask


def _check_names(names: Sequence[str], combos: ComboTable) -> None:
    for name in names:
        if name not in combos.properties:
            raise MixtureError(
                f"A domain key names {name!r}, which is not a categorical property of the index."
                f"{did_you_mean(name, list(combos.properties))}"
            )


def _codes(name: str, value: str | Matches, combos: ComboTable) -> list[int]:
    """The values that one entry of a key stands for: itself, or what its pattern matches."""
    values = combos.properties[name].values
    if isinstance(value, str) and value in values:
        return [values.index(value)]
    pattern = Matches(value) if isinstance(value, str) and "*" in value else value
    if not isinstance(pattern, Matches):
        raise MixtureError(
            f"A domain key wants {name} = {value!r}, which no sample has.{did_you_mean(pattern, values)}"
        )
    if codes := pattern.among(values):
        return codes
    near = did_you_mean(pattern.pattern.replace("*", ""), values)
    raise MixtureError(f"A domain key wants {name} to match {pattern.pattern!r}, which no sample does.{near}")
