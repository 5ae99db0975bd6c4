"""Domains: decide which samples belong to which component of a mixture, and count them per block.

A sample belongs to the *first* domain, in configured order, whose key it matches. Samples that match no key are
unassigned. Categorical properties are decided once per combo. If the query or a key compares numbers, the samples of
the blocks that stay undecided are read, and no others.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.combos.combo_index import ComboIndex, WantedCodes
from mixtera_hpc.core.domain_assignment import NO_DOMAIN, BucketGrid, DomainAssignment
from mixtera_hpc.core.domain_counts import count_domains
from mixtera_hpc.core.domain_keys import DomainKey, KeyValue, NumberRange, ValuePattern, matching_codes
from mixtera_hpc.core.index_tables import DomainTable, IndexTables, SampleColumns
from mixtera_hpc.core.properties import ComboTable, Kind, Property
from mixtera_hpc.core.query.cell_selection import CellSelector, PruningStatistics, ReadSampleColumns
from mixtera_hpc.core.query.predicate import Entries, Predicate
from mixtera_hpc.errors import MixtureError, did_you_mean

__all__ = ["DomainKey", "DomainRule", "DomainTable", "LimitDomains", "Selection", "keys_for_group_by", "select"]

LimitDomains = Callable[[Predicate, DomainAssignment], Predicate]
"""A function that returns a predicate which selects fewer samples of some domains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainRule:
    """The rule by which samples are selected and belong to domains."""

    predicate: Predicate
    assignment: DomainAssignment
    """The domain of every sample, whether or not the predicate selects it."""

    def domain_of(self, combos: ComboTable, columns: SampleColumns) -> NDArray[np.int32]:
        """Return the domain of every sample of `columns`, -1 for none; shape (rows,)."""
        # An empty predicate selects everything.
        domain = self.assignment.domain_of(columns.combo, columns.numbers)
        if self.predicate.text or self.predicate.numbers:
            entries = Entries.of_samples(combos, columns.combo, columns.numbers)
            domain = np.where(self.predicate.evaluate(entries).must_match, domain, NO_DOMAIN).astype(np.int32)
        return domain


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection(DomainRule):
    """The result of a query: the rule, the samples that it selects by domain, and statistics of the rest."""

    table: DomainTable
    selected: tuple[int, int]
    """Samples and tokens that the predicate selects."""
    unassigned: tuple[int, int]
    """Samples and tokens that the predicate selects and that match no key."""
    overlaps: tuple[tuple[int, int, int], ...]
    """(domain, later domain, samples): samples of the first domain that match the later key as well."""
    pruning: PruningStatistics = field(default_factory=PruningStatistics)
    """Blocks by the way they were decided."""


def keys_for_group_by(
    names: Sequence[str], combos: ComboTable, ranges: Mapping[str, Sequence[NumberRange]] | None = None
) -> list[DomainKey]:
    """Return one key for every combination of values of the properties `names` that occurs.

    A property with several values per sample contributes each value by itself. Without names, the result is one key
    that matches everything.

    Args:
        names: categorical properties, and the numbers of `ranges`, in the order of the keys.
        combos: the combinations of values of the index.
        ranges: number property → the ranges that it contributes, whether or not they occur.
    """
    ranges = ranges or {}
    numbers = [name for name in names if name in ranges]
    keys = []
    for category in _keys_of_categories([name for name in names if name not in ranges], combos):
        for chosen in itertools.product(*(ranges[name] for name in numbers)):
            of_numbers = {name: (value,) for name, value in zip(numbers, chosen, strict=True)}
            key: DomainKey = {name: of_numbers.get(name) or category[name] for name in names}
            keys.append(key)
    return keys


def _keys_of_categories(names: Sequence[str], combos: ComboTable) -> list[DomainKey]:
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
    read_samples: ReadSampleColumns,
    limit: LimitDomains = lambda predicate, assignment: predicate,
) -> Selection:
    """Count the rows and tokens of every domain in every block.

    Args:
        tables: the index.
        predicate: selects the samples.
        keys: one per domain, in the order that decides between them.
        read_samples: called for the blocks that combos and zones do not decide.
        limit: applied once the domain of every sample is known.

    Raises:
        MixtureError: a key names an unknown property or value, or a range of a category.
    """
    grid = BucketGrid.of_keys(keys, _number_names(tables.properties))
    combo_index = ComboIndex(tables.combos)
    matches = [_match(key, tables, combo_index, grid) for key in keys]
    assignment = _assign(grid, matches, tables.combos.num_combos)
    predicate = limit(predicate, assignment)

    # An empty key takes the rest by intention, so it does not count as an overlap.
    is_named = [len(key) > 0 for key in keys]
    classes = _classes_by_named_keys(assignment, matches, is_named)
    selector = CellSelector(tables, predicate, grid, assignment.domain if classes is None else classes, read_samples)
    counts = count_domains(selector.ranges(), assignment, len(keys), per_bucket=classes is not None)
    rows, tokens = counts.table.totals()
    unassigned_rows, unassigned_tokens = counts.unassigned
    return Selection(
        table=counts.table,
        predicate=predicate,
        assignment=assignment,
        selected=(int(rows.sum()) + unassigned_rows, int(tokens.sum()) + unassigned_tokens),
        unassigned=counts.unassigned,
        overlaps=() if classes is None else _overlaps(counts.rows_of_bucket, assignment, matches, is_named),
        pruning=selector.pruning,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _KeyMatch:
    """The combinations that a domain key matches: a combo and a bucket that both match."""

    combos: NDArray[np.intp]
    """Ascending numbers of combos."""
    buckets: NDArray[np.intp]
    """Ascending numbers of combinations of buckets."""

    @property
    def cells(self) -> tuple[NDArray[np.intp], ...]:
        """Return the index of what matches, for an array of shape (num_combos, num_buckets)."""
        return self.combos[:, None], self.buckets[None, :]


def _assign(grid: BucketGrid, matches: Sequence[_KeyMatch], num_combos: int) -> DomainAssignment:
    """Give every combo and bucket to the first key that it matches."""
    domain = np.full((num_combos, grid.num_buckets), NO_DOMAIN, np.int32)
    # From the last key to the first one, so that the first one wins.
    for number in reversed(range(len(matches))):
        domain[matches[number].cells] = number
    return DomainAssignment(grid=grid, domain=domain)


def _classes_by_named_keys(
    assignment: DomainAssignment, matches: Sequence[_KeyMatch], is_named: Sequence[bool]
) -> NDArray[np.int32] | None:
    """Enumerate the sets of keys that a combo and bucket can match; None if no two named keys match the same.

    Args:
        assignment: its domain is part of the class, because keys without names have no part in the set.
    """
    num_matches = np.zeros(assignment.domain.shape, np.int32)
    for match, named in zip(matches, is_named, strict=True):
        num_matches[match.cells] += named
    if num_matches.max(initial=0) < 2:
        return None

    classes = (assignment.domain - NO_DOMAIN).astype(np.int64)
    # Without ranges there is one bucket, so that the classes of buckets do not matter.
    for match in matches if assignment.grid.cuts else []:
        classes *= 2
        classes[match.cells] += 1
        # Renumber densely: the numbers would grow with every key.
        occurs = np.bincount(classes.reshape(-1)) > 0
        classes = (np.cumsum(occurs) - 1)[classes]
    return classes.astype(np.int32)


def _overlaps(
    rows_of_bucket: NDArray[np.int64],
    assignment: DomainAssignment,
    matches: Sequence[_KeyMatch],
    is_named: Sequence[bool],
) -> tuple[tuple[int, int, int], ...]:
    """Return (domain, later domain, shared samples) for every pair of named keys that share samples."""
    shared: dict[tuple[int, int], int] = {}
    for later, match in enumerate(matches):
        if not is_named[later]:
            continue
        # The samples belong to their first key. Every later key that matches shares all of them.
        firsts = assignment.domain[match.cells].reshape(-1)
        rows = rows_of_bucket[match.cells].reshape(-1)
        # Few domains share samples with this key: no array of all domains for each of them.
        distinct, number = np.unique(firsts, return_inverse=True)
        samples = np.bincount(number, rows, len(distinct)).astype(np.int64)
        for first, count in zip(distinct.tolist(), samples.tolist(), strict=True):
            if count and first < later and is_named[first]:
                shared[first, later] = count
    return tuple((domain, later, samples) for (domain, later), samples in sorted(shared.items()))


def _match(key: DomainKey, tables: IndexTables, combo_index: ComboIndex, grid: BucketGrid) -> _KeyMatch:
    """Return what `key` matches: any of its values in every property, and its ranges."""
    wanted = []
    for name, values in key.items():
        if _check_name(name, values, tables.properties):
            continue
        codes_of = combo_index.codes_of(name)
        texts = [value for value in values if isinstance(value, str | ValuePattern)]
        codes = [code for value in texts for code in matching_codes(name, value, codes_of)]
        wanted.append(WantedCodes(name=name, codes=codes, null=None in values))
    return _KeyMatch(combos=combo_index.matching(wanted), buckets=np.flatnonzero(grid.buckets_matching(key)))


def _number_names(properties: Mapping[str, Property]) -> list[str]:
    return [name for name, prop in properties.items() if prop.kind is Kind.NUMBER]


def _check_name(name: str, values: Sequence[KeyValue], properties: Mapping[str, Property]) -> bool:
    """Return whether a property of a key is a number.

    Raises:
        MixtureError: it is not a property of the index, or has values of the wrong kind.
    """
    has_ranges = any(isinstance(value, NumberRange) for value in values)
    only_ranges = all(value is None or isinstance(value, NumberRange) for value in values)
    is_number = name in properties and properties[name].kind is Kind.NUMBER
    if is_number and not only_ranges:
        raise MixtureError(
            f"A domain key names {name!r}, which is not a categorical property of the index but a number.\n"
            f"  Write a range: {name}: {{min: 0.3, below: 0.7}}."
        )
    if name in properties and not is_number and has_ranges:
        raise MixtureError(
            f"A domain key has a range of {name!r}, which is a {properties[name].kind} of the index, not a number."
        )
    if name not in properties:
        what = "number" if has_ranges else "categorical"
        raise MixtureError(
            f"A domain key names {name!r}, which is not a {what} property of the index."
            f"{did_you_mean(name, list(properties))}"
        )
    return is_number


def _check_names(names: Sequence[str], combos: ComboTable) -> None:
    """Raise MixtureError if one of `names` is not a categorical property of the index."""
    for name in names:
        if name not in combos.properties:
            raise MixtureError(
                f"A domain key names {name!r}, which is not a categorical property of the index."
                f"{did_you_mean(name, list(combos.properties))}"
            )
