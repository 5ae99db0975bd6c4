"""A configuration's query and domains, asked of an index."""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.domain_tree import DomainSizes, display_name, domain_bounds, domain_entries, initial_weights
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.domain_keys import DomainKey, domain_name
from mixtera_hpc.core.domains import Selection, keys_for_group_by, select
from mixtera_hpc.core.holdout import add_holdout_hashes, add_holdout_zones, restrict_to_split, shard_hash_keys
from mixtera_hpc.core.index_tables import SampleColumns
from mixtera_hpc.core.mixing.bounds import project_to_bounds
from mixtera_hpc.core.query import parse_predicate
from mixtera_hpc.core.sequence_grid import SequenceGrid
from mixtera_hpc.errors import MixtureError
from mixtera_hpc.index.read.open import PropertyIndex

__all__ = ["SelectedDomains", "SelectionCost", "mixture_weights", "select_domains"]


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


def select_domains(config: Config, index: PropertyIndex) -> SelectedDomains:
    """The domains that `mixture.domains` or `mixture.group_by` name, or one of everything, counted in the index.

    Raises:
        ConfigError: `query.where` does not parse, or names what the index does not have.
        MixtureError: a domain key does.
    """
    began = time.perf_counter()
    keys = _keys(config, index)
    predicate = parse_predicate(config.query.where, index.tables.properties)
    only = {"combo", "tokens", *(f"numbers/{name}" for name in predicate.numbers)}
    tables, holdout = index.tables, config.query.holdout
    if holdout.fraction:
        tables, keys_of_shards = add_holdout_zones(tables), shard_hash_keys(tables.shards.path, holdout.seed)
        predicate = restrict_to_split(predicate, holdout.fraction, config.query.split)
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


def mixture_weights(config: Config, chosen: SelectedDomains, has_tokens: bool) -> NDArray[np.float64] | None:
    """The weights the mixture begins with, shape (num_domains,); None when nobody knows.

    Natural weights are shares of what the mixture counts, without special tokens; where that is tokens and the index has not
    counted them, or nothing is selected, there are none. A run refuses weights on empty domains; this is there to show them.
    """
    rows, tokens = chosen.selection.table.totals()
    in_tokens, plane = config.mixture.unit == "tokens", config.dataplane
    sizes = np.where(has_tokens, tokens, 0) if in_tokens else rows
    items = SequenceGrid.of_unit(in_tokens, plane.seq_len, plane.overlap_one_token).stride * plane.global_batch_size
    stock = DomainSizes(keys=chosen.keys, sizes=sizes, budget=items * config.training.num_steps)
    try:
        weights = initial_weights(config.mixture, config.mixture, stock)
    except MixtureError:
        if sizes.any():
            raise
        return None
    limits = domain_bounds(config.mixture, stock) if sizes.any() else None
    return weights if limits is None else project_to_bounds(weights, *limits)


def _keys(config: Config, index: PropertyIndex) -> list[DomainKey]:
    if found := domain_entries(config.mixture):
        return [leaf.key for leaf in found]
    keys = keys_for_group_by(config.mixture.group_by, index.tables.combos)
    if not keys:
        raise MixtureError(f"mixture.group_by is {config.mixture.group_by}, but no sample has any of these properties.")
    return keys
