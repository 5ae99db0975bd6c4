"""Data about the index of a run on all ranks: a small description, and tables that each node stores once.

Rank 0 opens the index, selects the domains and shares the result. The other ranks never read a table from disk. Price:
one open of the index per run, one broadcast of JSON, and O(blocks) memory per node.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Communicator, bcast_bytes
from mixtera_hpc.config.mixture.domain_tree import domain_fractions
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.domain_keys import domain_key_to_plain
from mixtera_hpc.core.holdout import shard_hash_keys
from mixtera_hpc.core.index_tables import BLOCK_COLUMNS, BlockTable, DomainTable, IndexTables
from mixtera_hpc.core.properties import ComboTable, Kind, Property
from mixtera_hpc.dataplane.reading.lane_count import default_lanes
from mixtera_hpc.dataplane.reading.stream_layout import ShardFacts, StreamLayout
from mixtera_hpc.dataplane.reading.token_counts import check_token_counts, encoding_digest
from mixtera_hpc.dataplane.reading.unchanged.shard_guard import no_shard_states, shard_states
from mixtera_hpc.dataplane.sample_subset import SampleSubset
from mixtera_hpc.formats.chat_rows import is_chat
from mixtera_hpc.formats.decoded_sizes import expansion_of
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.read.sample_reader import SampleSource
from mixtera_hpc.index.read.sample_sizes import add_size_numbers
from mixtera_hpc.index.read.selection import SelectedDomains, check_fractions, select_domains
from mixtera_hpc.index.read.verify import check_fresh
from mixtera_hpc.index.row_store.row_files import StoredRowBlocks, configured_row_stores
from mixtera_hpc.index.token_store.store_files import StoredRows, configured_stores
from mixtera_hpc.tokens.tokenizer import Tokenizer

__all__ = ["IndexDescription", "SharedTables", "read_shared_index", "select_subset", "share_index"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexDescription:
    """The small part of the index, broadcast as JSON."""

    fingerprints: list[str]
    """The fingerprint of each index that is read, in the order of `index.paths`."""
    encoding: str
    """The `encoding_digest` of rank 0's tokenizer."""
    sample_sources: list[SampleSource]
    """The files that hold the per-sample columns."""
    data_root: str
    roots: list[str]
    """The folders of the data sets."""
    shard_paths: list[str]
    """Relative to `data_root`."""
    shard_formats: list[str]
    shard_expansion: list[float]
    """Decoded bytes per byte that the index counts in the blocks of each shard."""
    shard_texts: list[str | None]
    """Place of the document's text in a row; None where a sample is the whole row."""
    properties: list[Property]
    """In the order in which `SharedTables.pack` writes their columns."""
    domain_names: list[str]
    domain_keys: list[dict[str, Any]]
    """The keys of the domains, as YAML has them."""
    number_cuts: dict[str, list[float]]
    """Number property → the bounds of the buckets that decide the domain of a sample."""
    counting: str
    """A text about what was read to count the domains; empty if the tables of the index were enough."""
    where: str
    """`query.where`."""
    drop: list[str]
    """Expressions whose samples are dropped."""
    where_after_drops: str
    """`query.where` without the dropped samples."""
    token_stores: list[StoredRows]
    """Token stores that documents are served from."""
    row_stores: list[StoredRowBlocks]
    """Row stores that rows of compressed files are served from."""
    domain_items: list[int]
    """Items of one epoch of every domain, dropped samples included: mixture weights refer to these sizes."""
    default_lanes: int
    """The number of lanes if the configuration sets none; see `lane_count`."""

    def shard_facts(self) -> ShardFacts:
        """Return what the streams depend on."""
        return _shard_facts(self.shard_texts, self.shard_formats, self.shard_expansion)

    def root_of(self, shard: str) -> Path:
        """Return the folder of the data set that a shard belongs to, given one of `shard_paths`."""
        path = os.path.join(self.data_root, shard)  # noqa: PTH118 - pathlib is slow, and this is called per sample.
        # The longest roots come first: one data set may lie inside another.
        return Path(next((root for root in self.roots if path.startswith(f"{root}/")), self.data_root))


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedTables:
    """The large part of the index, in memory that the ranks of a node share."""

    blocks: BlockTable
    """Without zones."""
    domains: DomainTable
    """Rows and tokens that each domain still has in its blocks after drops."""
    combos: ComboTable
    """Without the number of the combo of damaged rows: no domain contains it."""
    assigned: NDArray[np.int32]
    """Domain of every combo and bucket, -1 for none (see `core.domain_assignment`); shape (num_combos, num_buckets)."""
    shard_states: NDArray[np.int64]
    """The states that shards are compared with, see `unchanged.shard_guard`; no entries if they are not compared."""
    holdout_keys: NDArray[np.uint64] | None
    """One hash key per shard when samples are held out or domains are limited to a fraction (see `core.holdout`), else
    None; shape (num_shards,)."""

    def pack(self) -> list[NDArray[Any]]:
        """Return all arrays in the order that `unpack` expects; nothing is copied."""
        arrays: list[NDArray[Any]] = [getattr(self.blocks, name) for name in BLOCK_COLUMNS]
        arrays += [getattr(self.domains, field.name) for field in fields(DomainTable)]
        arrays += [self.assigned, self.shard_states]
        for name in self.combos.properties:
            arrays += [self.combos.indptr[name], self.combos.codes[name]]
        if self.holdout_keys is not None:
            arrays.append(self.holdout_keys)
        return arrays

    @classmethod
    def unpack(cls, arrays: Sequence[NDArray[Any]], properties: Iterable[Property]) -> "SharedTables":
        """Restore what `pack` returned.

        Args:
            properties: all properties of the index, in the order of `IndexDescription.properties`.
        """
        remaining = iter(arrays)
        blocks = BlockTable(**{name: next(remaining) for name in BLOCK_COLUMNS}, zones={})
        domains = DomainTable(**{field.name: next(remaining) for field in fields(DomainTable)})
        # The order below is the order of `pack`.
        assigned = next(remaining)
        states = next(remaining)

        categorical = _categorical(properties)
        columns = {name: (next(remaining), next(remaining)) for name in categorical}
        combos = ComboTable(
            num_combos=len(assigned),
            properties=categorical,
            indptr={name: indptr for name, (indptr, _) in columns.items()},
            codes={name: codes for name, (_, codes) in columns.items()},
        )

        return cls(
            blocks=blocks,
            domains=domains,
            combos=combos,
            assigned=assigned,
            shard_states=states,
            holdout_keys=next(remaining, None),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _IndexHeader:
    """The message that precedes the tables."""

    description: IndexDescription
    num_arrays: int


def share_index(
    comm: Communicator, index: tuple[IndexDescription, SharedTables] | None
) -> tuple[IndexDescription, SharedTables]:
    """Return rank 0's `index` on every rank; the others give None. **Collective.**"""
    packed: list[NDArray[Any]] = []
    header: bytes | None = None
    if index is not None:
        description, tables = index
        # Names and sizes of the arrays follow from the description and from this order: no keys are sent.
        packed = tables.pack()
        header = msgspec.json.encode(_IndexHeader(description=description, num_arrays=len(packed)))

    # Allocating shared memory is collective, so every rank must know how many arrays follow.
    received = msgspec.json.decode(bcast_bytes(comm, header), type=_IndexHeader)
    if index is None:
        arrays = [comm.Allocate_shared(None) for _ in range(received.num_arrays)]
    else:
        arrays = [comm.Allocate_shared(array) for array in packed]
    return received.description, SharedTables.unpack(arrays, received.description.properties)


def read_shared_index(
    config: Config, index: PropertyIndex, subset: SampleSubset, tokenizer: Tokenizer | None, *, check: bool
) -> tuple[IndexDescription, SharedTables]:
    """Select the domains of `config` in an open index; rank 0 only.

    Args:
        check: refuse an index whose shards have changed on disk, and shards that change while they are read.

    Raises:
        PropertyIndexError: the index is stale, or was built with another tokenizer or without one.
        MixtureError: a domain key matches nothing.
    """
    # A stale index points at wrong bytes.
    if check:
        check_fresh(index)
    check_token_counts(config, index, tokenizer)

    # Domains, their names and their weights refer to the data without drops: a drop must not renumber them.
    chosen = select_domains(config, index, subset.split)
    if subset.split == "train":
        check_fractions(config, index, chosen)
    tables = index.tables
    full_table = chosen.selection.table
    domains = full_table
    if subset.drop:
        remaining = select_subset(config, index, subset).selection.table
        domains = _with_counts_of(full_table, remaining, len(tables.blocks))

    holdout = config.query.holdout
    is_hashed = holdout.fraction > 0 or domain_fractions(config.mixture, len(chosen.keys)) is not None
    shared = SharedTables(
        # Zones prune blocks of a query; the selection is made.
        blocks=replace(tables.blocks, zones={}),
        domains=domains,
        combos=replace(tables.combos, properties=_categorical(tables.properties.values())),
        assigned=chosen.selection.assignment.domain,
        shard_states=shard_states(tables.shards) if check else no_shard_states(),
        holdout_keys=shard_hash_keys(tables.shards.path, holdout.seed) if is_hashed else None,
    )
    return _describe(config, index, subset, chosen, tokenizer), shared


def _describe(
    config: Config, index: PropertyIndex, subset: SampleSubset, chosen: SelectedDomains, tokenizer: Tokenizer | None
) -> IndexDescription:
    """Return the small part of what ranks share."""
    tables = index.tables
    selection = chosen.selection
    expansion = _shard_expansion(tables)
    shards = _shard_facts(index.shard_texts(), tables.shards.format, expansion)
    layout = StreamLayout.of_config(config, selection.table, tables.blocks, shards, tokenizer)
    return IndexDescription(
        fingerprints=index.fingerprints,
        encoding=encoding_digest(tokenizer),
        sample_sources=index.sample_sources(),
        data_root=str(index.data_root),
        roots=sorted({str(root.absolute()) for root in index.roots.values()}, key=len, reverse=True),
        shard_paths=index.shard_paths(),
        shard_formats=list(tables.shards.format),
        shard_expansion=expansion,
        shard_texts=index.shard_texts(),
        properties=list(add_size_numbers(tables).properties.values()),
        domain_names=list(chosen.names),
        domain_keys=[domain_key_to_plain(key) for key in chosen.keys],
        number_cuts={name: list(cuts) for name, cuts in selection.assignment.grid.cuts.items()},
        counting=_describe_counting(index, chosen),
        where=selection.predicate.text,
        drop=list(subset.drop),
        token_stores=configured_stores(config, index),
        row_stores=configured_row_stores(config, index),
        where_after_drops=subset.restrict(config.query.where),
        domain_items=layout.epoch_items().tolist(),
        default_lanes=default_lanes(config.dataplane, layout, tables.shards.format),
    )


def _shard_expansion(tables: IndexTables) -> list[float]:
    """Return the decoded bytes per byte of every shard; see `formats.decoded_sizes`."""
    shards = tables.shards
    block_bytes = np.bincount(tables.blocks.shard, tables.blocks.length, minlength=len(shards.format))
    sizes = zip(shards.format, block_bytes.tolist(), shards.size_bytes.tolist(), strict=True)
    return [expansion_of(*shard) for shard in sizes]


def _shard_facts(texts: Sequence[str | None], formats: Sequence[str], expansion: Sequence[float]) -> ShardFacts:
    # Shards of token ids in a data set of conversations have no messages.
    pairs = zip(texts, formats, strict=True)
    chat = [is_chat(text) and not load_format(name).holds_tokens for text, name in pairs]
    return ShardFacts(expansion=np.array(expansion, np.float64), is_chat=np.array(chat, np.bool_))


def _describe_counting(index: PropertyIndex, chosen: SelectedDomains) -> str:
    """Say how many samples were read to count the domains by their numbers."""
    selection = chosen.selection
    if not selection.assignment.numbers:
        return ""
    seconds = chosen.cost.read_s + chosen.cost.count_s
    return (
        f"Counting domains by {', '.join(sorted(selection.assignment.numbers))} read "
        f"{selection.pruning.scanned_samples:,} of {index.tables.num_samples:,} samples "
        f"({chosen.cost.bytes_read / 1e6:.3g} MB, {seconds:.2g} s); every start of a run pays this."
    )


def select_subset(config: Config, index: PropertyIndex, subset: SampleSubset) -> SelectedDomains:
    """Select the domains of `config` among the samples of `subset`.

    Raises:
        ConfigError: `query.where` or a drop does not parse, or names what the index does not have.
        MixtureError: a domain key names what the index does not have.
    """
    query = replace(config.query, where=subset.restrict(config.query.where))
    return select_domains(replace(config, query=query), index, subset.split)


def _with_counts_of(table: DomainTable, remaining: DomainTable, num_blocks: int) -> DomainTable:
    """Return `table` with all its entries, but with the rows and tokens of `remaining`.

    The entries stay, because the order of a domain's blocks depends on how many there are.
    """

    def entry_key(entries: DomainTable) -> NDArray[np.int64]:
        # One ascending integer per (domain, block).
        domain = np.repeat(np.arange(entries.num_domains), np.diff(entries.indptr))
        return domain * num_blocks + entries.block

    # Blocks of which nothing remains keep an entry with 0 rows.
    rows = np.zeros_like(table.rows)
    tokens = np.zeros_like(table.tokens)
    positions = np.searchsorted(entry_key(table), entry_key(remaining))
    rows[positions] = remaining.rows
    tokens[positions] = remaining.tokens
    return replace(table, rows=rows, tokens=tokens)


def _categorical(properties: Iterable[Property]) -> dict[str, Property]:
    """Return the properties that combos have values of, by name."""
    return {prop.name: prop for prop in properties if prop.kind is not Kind.NUMBER}
