"""Apply the query and the domains of a configuration to an index."""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.mixture.domain_tree import (
    display_name,
    domain_entries,
    domain_fractions,
    group_names,
    group_ranges,
)
from mixtera_hpc.config.schema import Config, HoldoutConfig
from mixtera_hpc.core.domain_assignment import DomainAssignment
from mixtera_hpc.core.domain_keys import DomainKey, domain_name
from mixtera_hpc.core.domains import LimitDomains, Selection, keys_for_group_by, select
from mixtera_hpc.core.holdout import (
    Split,
    add_holdout_hashes,
    add_holdout_zones,
    restrict_to_fractions,
    restrict_to_split,
    shard_hash_keys,
)
from mixtera_hpc.core.index_tables import BlockTable, IndexTables, SampleColumns
from mixtera_hpc.core.query.parse import parse_predicate
from mixtera_hpc.core.query.predicate import Entries, Predicate
from mixtera_hpc.errors import ConfigError, MixtureError, did_you_mean, list_names
from mixtera_hpc.index.read.document_filter import (
    DOCUMENT_NUMBER,
    NamedDocuments,
    add_document_numbers,
    add_document_zones,
)
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.read.sample_sizes import add_size_numbers

__all__ = [
    "SampleTest",
    "SelectedDomains",
    "SelectionCost",
    "check_fractions",
    "check_split",
    "sample_test",
    "select_domains",
]

logger = logging.getLogger("mixtera_hpc")

MAX_NAMES = 5
"""Domain names listed in a message."""

BlockRead = Callable[[NDArray[np.int32]], SampleColumns]
"""Reads the samples of the given blocks."""
SampleTest = Callable[[int], NDArray[np.bool_]]
"""Says which samples of a block are wanted; shape (rows of the block,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedDomains:
    """The domains of a mixture. The domain_id is the position in every list."""

    selection: Selection
    keys: tuple[DomainKey, ...]
    names: tuple[str, ...]
    """The keys as readable text."""
    cost: "SelectionCost"


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionCost:
    """Cost of evaluating a query."""

    bytes_read: int
    """Bytes of sample columns, decompressed."""
    parse_s: float
    """Parsing the query and matching the domain keys against the dictionaries."""
    read_s: float
    """Reading sample columns."""
    count_s: float
    """The rest: evaluating block tables and the samples that were read."""


class _TimedReader:
    """Reads the columns that a query needs, and measures how long that takes."""

    def __init__(self, index: PropertyIndex, only: Collection[str]) -> None:
        self._index = index
        self._only = only
        self.seconds = 0.0

    def read(self, blocks: NDArray[np.int32]) -> SampleColumns:
        began = time.perf_counter()
        columns = self._index.read_blocks(blocks, self._only)
        self.seconds += time.perf_counter() - began
        return columns


def check_split(config: Config, split: Split) -> None:
    """Refuse the side "validation" of a holdout that holds nothing out.

    Raises:
        ConfigError: `query.holdout.fraction` is 0.
    """
    if split == "validation" and not config.query.holdout.fraction:
        raise ConfigError(
            "The held-out samples are requested, but nothing is held out.\n  Set query.holdout.fraction, e.g. to 0.01. "
            "A run keeps the value that it was started with."
        )


def select_domains(
    config: Config, index: PropertyIndex, split: Split = "train", *, limited: bool = True
) -> SelectedDomains:
    """Select the samples of `query`, and count them per domain of `mixture.domains` or `mixture.group_by`.

    Without domains, all samples form one.

    Args:
        config: the keys `query` and `mixture` count.
        index: an open index.
        split: side of the holdout whose samples are counted.
        limited: True counts only the fraction of each domain that a run uses, False counts all of its samples.

    Raises:
        ConfigError: `query.where` does not parse or names what the index does not have, or nothing is held out.
        MixtureError: a domain key names what the index does not have.
    """
    check_split(config, split)
    began = time.perf_counter()
    # The reader counts over its whole life.
    bytes_before = index.samples.bytes_read
    tables = add_size_numbers(index.tables)
    keys = _domain_keys(config, tables)
    named = NamedDocuments(index.shard_paths(), tables.blocks)
    predicate = parse_predicate(config.query.where, tables.properties, named.compile)
    # Only these columns are read.
    in_keys = {name for key in keys for name in key if name in tables.blocks.zones}
    reader = _TimedReader(index, {"combo", "tokens", *(f"numbers/{name}" for name in predicate.numbers | in_keys)})
    read: BlockRead = reader.read
    if DOCUMENT_NUMBER in predicate.numbers:
        tables = add_document_zones(tables)
        read = _with_document_numbers(read, tables.blocks)
    holdout = config.query.holdout
    fractions = domain_fractions(config.mixture, len(keys)) if split == "train" and limited else None
    if holdout.fraction or fractions is not None:
        tables, read = _with_hashes(tables, read, holdout.seed)
    if holdout.fraction:
        predicate = restrict_to_split(predicate, holdout.fraction, split)

    # Blocks that the histogram or the zones decide are not read at all.
    parsed = time.perf_counter()
    selection = select(tables, predicate, keys, read, _limit(fractions, holdout))
    cost = SelectionCost(
        bytes_read=index.samples.bytes_read - bytes_before,
        parse_s=parsed - began,
        read_s=reader.seconds,
        count_s=time.perf_counter() - parsed - reader.seconds,
    )
    names = tuple(map(display_name if len(keys) > 1 else domain_name, keys))
    return SelectedDomains(selection=selection, keys=tuple(keys), names=names, cost=cost)


def check_fractions(config: Config, index: PropertyIndex, selected: SelectedDomains) -> None:
    """Refuse a fraction that leaves a written domain without samples, and warn of other domains.

    Price: one more count, if a domain has none.

    Args:
        config: the configuration that `selected` was selected with.
        index: an open index.
        selected: the training samples.

    Raises:
        MixtureError: a domain of `mixture.domains` has samples, but its fraction holds none of them.
    """
    fractions = domain_fractions(config.mixture, len(selected.keys))
    rows, _ = selected.selection.table.totals()
    if fractions is None or rows.all():
        return
    all_rows, _ = select_domains(config, index, limited=False).selection.table.totals()
    empty = np.flatnonzero((rows == 0) & (all_rows > 0)).tolist()
    if not empty:
        return
    names = list_names([selected.names[domain] for domain in empty], MAX_NAMES)
    text = (
        f"The fraction {fractions[empty[0]]:g} holds none of the {int(all_rows[empty].sum()):,} training samples of "
        f"{names}.\n  Raise mixture.fraction, or the fraction of these domains."
    )
    if domain_entries(config.mixture):
        raise MixtureError(text)
    # A property may have values with very few samples.
    logger.warning("%s They are not served.", text)


def sample_test(where: str | None, index: PropertyIndex) -> SampleTest:
    """Return a function from a block to those of its samples that a query selects and that can be read.

    Raises:
        ConfigError: the query does not parse or names what the index does not have.
    """
    tables = add_size_numbers(index.tables)
    named = NamedDocuments(index.shard_paths(), tables.blocks)
    predicate = parse_predicate(where, tables.properties, named.compile)
    reader = _TimedReader(index, {"combo", *(f"numbers/{name}" for name in predicate.numbers)})
    read: BlockRead = reader.read
    if DOCUMENT_NUMBER in predicate.numbers:
        read = _with_document_numbers(read, tables.blocks)

    def is_wanted(block: int) -> NDArray[np.bool_]:
        columns = read(np.array([block], np.int32))
        entries = Entries.of_samples(tables.combos, columns.combo, columns.numbers)
        wanted: NDArray[np.bool_] = predicate.evaluate(entries).must_match & (columns.combo != tables.combos.bad)
        return wanted

    return is_wanted


def _with_hashes(tables: IndexTables, read: BlockRead, seed: int) -> tuple[IndexTables, BlockRead]:
    """Return tables and a reader in which the hash of every sample is one more number."""
    hash_keys = shard_hash_keys(tables.shards.path, seed)

    def read_with_hashes(chosen: NDArray[np.int32]) -> SampleColumns:
        return add_holdout_hashes(read(chosen), hash_keys, tables.blocks, chosen)

    return add_holdout_zones(tables), read_with_hashes


def _limit(fractions: Sequence[float] | None, holdout: HoldoutConfig) -> LimitDomains:
    """Return the function that limits every domain to its fraction."""

    def limit(predicate: Predicate, assignment: DomainAssignment) -> Predicate:
        if fractions is None:
            return predicate
        return restrict_to_fractions(predicate, assignment, fractions, holdout.fraction)

    return limit


def _with_document_numbers(read: BlockRead, blocks: BlockTable) -> BlockRead:
    """Return a function that reads like `read` and adds the number of every document."""

    def read_with_numbers(chosen: NDArray[np.int32]) -> SampleColumns:
        return add_document_numbers(read(chosen), blocks, chosen)

    return read_with_numbers


def _domain_keys(config: Config, tables: IndexTables) -> list[DomainKey]:
    entries = domain_entries(config.mixture)
    if entries:
        return [entry.key for entry in entries]
    mixture = config.mixture
    names = group_names(mixture.group_by)
    ranges = group_ranges(mixture.group_by)
    _check_numbers(ranges, tables)
    keys = keys_for_group_by(names, tables.combos, ranges)
    if not keys:
        raise MixtureError(f"mixture.group_by is {mixture.group_by}, but no sample has any of these properties.")
    return [*keys, {}] if mixture.remainder is not None else keys


def _check_numbers(names: Collection[str], tables: IndexTables) -> None:
    """Refuse buckets of anything but a number property."""
    for name in names:
        if name not in tables.blocks.zones:
            near = did_you_mean(name, list(tables.blocks.zones))
            raise MixtureError(f"mixture.group_by has buckets of {name!r}, which is not a number of the index.{near}")
