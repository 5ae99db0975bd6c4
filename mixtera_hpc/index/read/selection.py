"""A configuration's query and domains, asked of an index."""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.mixture.domain_tree import display_name, domain_entries
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.domain_keys import DomainKey, domain_name
from mixtera_hpc.core.domains import Selection, keys_for_group_by, select
from mixtera_hpc.core.holdout import Split, add_holdout_hashes, add_holdout_zones, restrict_to_split, shard_hash_keys
from mixtera_hpc.core.index_tables import SampleColumns
from mixtera_hpc.core.query import parse_predicate
from mixtera_hpc.errors import ConfigError, MixtureError
from mixtera_hpc.index.read.open import PropertyIndex

__all__ = ["SelectedDomains", "SelectionCost", "check_split", "select_domains"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedDomains:
    """The domains of a mixture; domain_id is the position in every list."""

    selection: Selection
    keys: tuple[DomainKey, ...]
    names: tuple[str, ...]
    """The keys as text, for people."""
    cost: "SelectionCost"


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionCost:
    """What answering a query took."""

    bytes_read: int
    """Of sample columns, decompressed."""
    parse_s: float
    """Query and keys, over the dictionaries."""
    read_s: float
    """Reading sample columns."""
    count_s: float
    """Everything else: the block tables, and looking at the samples that were read."""


def check_split(config: Config, split: Split) -> None:
    """Refuse the side "validation" of a holdout that holds nothing out.

    Raises:
        ConfigError: `query.holdout.fraction` is 0.
    """
    if split == "validation" and not config.query.holdout.fraction:
        raise ConfigError(
            "The held-out samples are requested, but nothing is held out.\n  Set query.holdout.fraction, e.g. to 0.01."
        )


def select_domains(config: Config, index: PropertyIndex, split: Split = "train") -> SelectedDomains:
    """Count the domains that `mixture.domains` or `mixture.group_by` name, or one domain of everything.

    Args:
        split: side of the holdout whose samples are counted.

    Raises:
        ConfigError: `query.where` does not parse or names what the index does not have, or nothing is held out.
        MixtureError: a domain key names what the index does not have.
    """
    check_split(config, split)
    began = time.perf_counter()
    keys = _keys(config, index)
    predicate = parse_predicate(config.query.where, index.tables.properties)
    only = {"combo", "tokens", *(f"numbers/{name}" for name in predicate.numbers)}
    tables, holdout = index.tables, config.query.holdout
    if holdout.fraction:
        tables, keys_of_shards = add_holdout_zones(tables), shard_hash_keys(tables.shards.path, holdout.seed)
        predicate = restrict_to_split(predicate, holdout.fraction, split)
    bytes_before, read_s, parsed = index.samples.bytes_read, 0.0, time.perf_counter()

    def read(blocks: NDArray[np.int32]) -> SampleColumns:
        nonlocal read_s
        start = time.perf_counter()
        columns = index.read_blocks(blocks, only)
        read_s += time.perf_counter() - start
        return add_holdout_hashes(columns, keys_of_shards, tables.blocks, blocks) if holdout.fraction else columns

    selection = select(tables, predicate, keys, read)
    names = tuple(map(display_name if len(keys) > 1 else domain_name, keys))
    cost = SelectionCost(
        bytes_read=index.samples.bytes_read - bytes_before,
        parse_s=parsed - began,
        read_s=read_s,
        count_s=time.perf_counter() - parsed - read_s,
    )
    return SelectedDomains(selection=selection, keys=tuple(keys), names=names, cost=cost)


def _keys(config: Config, index: PropertyIndex) -> list[DomainKey]:
    if found := domain_entries(config.mixture):
        return [leaf.key for leaf in found]
    keys = keys_for_group_by(config.mixture.group_by, index.tables.combos)
    if not keys:
        raise MixtureError(f"mixture.group_by is {config.mixture.group_by}, but no sample has any of these properties.")
    return keys
