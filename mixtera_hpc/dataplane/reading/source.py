"""What every rank needs to know of the index, opened once by rank 0 and kept once per node.

Rank 0 opens the index, refuses a stale one, selects the domains and broadcasts: the tables into memory that the ranks of a node
share, everything small as JSON. The others never read a table from disk; they open the file when they first need the samples
of a block. Price: one open of the index per run plus one per rank, O(blocks) memory per node.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Communicator, bcast_bytes
from mixtera_hpc.config.check_data import holdout_problems
from mixtera_hpc.config.convert import raise_problems
from mixtera_hpc.config.domain_tree import domain_entries
from mixtera_hpc.config.schema import Config, MixtureConfig, QueryConfig
from mixtera_hpc.core.domain_keys import domain_key_to_plain, parse_domain_key
from mixtera_hpc.core.domains import DomainTable, Selection
from mixtera_hpc.core.holdout import add_holdout_hashes, restrict_to_split, shard_hash_keys
from mixtera_hpc.core.index_tables import BLOCK_COLUMNS, BlockTable, SampleColumns
from mixtera_hpc.core.order import ShuffleOrder
from mixtera_hpc.core.planner import Planner
from mixtera_hpc.core.properties import ComboTable, Kind, Property
from mixtera_hpc.core.query import Entries, Predicate, parse_predicate
from mixtera_hpc.core.sequence_grid import SequenceGrid
from mixtera_hpc.dataplane.mixing.context import ChunkTimeline, DomainSizes, MixtureContext
from mixtera_hpc.dataplane.mixing.from_config import make_mixer, max_epochs_per_domain
from mixtera_hpc.dataplane.mixing.mixers import Mixer
from mixtera_hpc.dataplane.reading.domain_streams import DomainStreams, StreamLayout
from mixtera_hpc.dataplane.reading.token_counts import check_token_counts
from mixtera_hpc.dataplane.stream_version import StreamVersion
from mixtera_hpc.index.read.joined import SampleSource, open_configured, open_samples, sample_sources
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.read.selection import select_domains
from mixtera_hpc.index.read.verify import check_fresh
from mixtera_hpc.tokens.tokenizer import Tokenizer, load_vocabulary

__all__ = ["Source", "count_samples", "open_source"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """The small part, as it is broadcast."""

    index_fingerprint: str
    samples: list[SampleSource]
    data_root: str
    text: str | None
    shard_paths: list[str]
    shard_formats: list[str]
    properties: list[tuple[str, str, list[str]]]
    """Name, kind and dictionary."""
    names: list[str]
    """Of the domains."""
    keys: list[dict[str, Any]]
    """Of the domains, as written."""
    where: str
    kept: str
    """`where` without what is dropped; empty when nothing is."""
    domain_sizes: list[int]
    """Items of one epoch of every domain, dropped ones included: what the mixture was wished over."""


COLUMNS_KEPT_BYTES = 128 << 20
"""Sample columns that a reading thread keeps, as they are stored: every domain comes back to blocks that it shares."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The selected data of one run; the same on every rank."""

    config: Config
    facts: _Facts
    layout: StreamLayout
    blocks: BlockTable
    """Without zones."""
    combos: ComboTable
    selection: Selection
    grid: SequenceGrid
    tokenizer: Tokenizer | None
    mixture_context: MixtureContext
    """What mixtures are made over."""
    planner: Planner
    kept: Predicate | None
    """What is left of the selection; None when nothing is dropped."""
    stream_version: StreamVersion
    holdout_keys: NDArray[np.uint64] | None
    """A word for every shard, where samples are held out; see `core.holdout`."""
    arrays: Mapping[str, NDArray[Any]]
    """The large part, as it was shared."""

    def __reduce__(self) -> Any:
        """Pickle as what it was assembled from; a tokenizer is loaded again."""
        return _again, (self.config, self.facts, dict(self.arrays), self.stream_version)

    @property
    def num_domains(self) -> int:
        return self.layout.table.num_domains

    @property
    def weights(self) -> NDArray[np.float64]:
        """The weights a run begins with; shape (K,)."""
        weights = self.mixer(learn=False).weights_of(0)
        return np.zeros(self.num_domains) if weights is None else weights

    def mixer(self, *, learn: bool = True) -> Mixer:
        """What decides the weights of every chunk; see `make_mixer`."""
        return make_mixer(self.config.mixture, self.mixture_context, learn=learn)

    @property
    def names(self) -> list[str]:
        """What each domain is called."""
        return self.facts.names

    def at_version(self, era: StreamVersion) -> "Source":
        """The same data as a later era of a run counts it."""
        timeline = replace(self.mixture_context.timeline, items=era.items)
        return replace(
            self,
            stream_version=era,
            mixture_context=replace(self.mixture_context, timeline=timeline),
            planner=replace(self.planner, capacity=_capacity(self, era)),
        )

    def span(self, domain: int, first: int, count: int) -> tuple[int, int]:
        """Items [start, stop) of `domain`'s stream that `count` sequences from sequence `first` on cover."""
        start, stop = self.grid.span(first, count)
        origin = int(self.stream_version.origins[domain])
        return origin + start, origin + stop

    def make_block_reader(self) -> Callable[[NDArray[np.int32]], SampleColumns]:
        """Reads the samples of some blocks, one block after the other."""
        samples = open_samples(self.facts.samples, COLUMNS_KEPT_BYTES)
        first, rows, keys = self.blocks.first_sample, self.blocks.rows, self.holdout_keys
        numbers = self.selection.predicate.numbers | (self.kept.numbers if self.kept else frozenset())
        only = {"combo", "length", *(["tokens"] if self.layout.in_tokens else []), *(f"numbers/{n}" for n in numbers)}

        def read_blocks(chosen: NDArray[np.int32]) -> SampleColumns:
            columns = samples.read_many(first[chosen].tolist(), rows[chosen].tolist(), only)
            return columns if keys is None else add_holdout_hashes(columns, keys, self.blocks, chosen)

        return read_blocks

    def domain_of(self, columns: SampleColumns) -> NDArray[np.int32]:
        """The domain of every sample, dropped or not; -1 for none."""
        return self.selection.domain_of(self.combos, columns)

    def is_not_dropped(self, columns: SampleColumns) -> NDArray[np.bool_]:
        """Which samples are not dropped."""
        if self.kept is None:
            return np.ones(len(columns.combo), np.bool_)
        return self.kept.evaluate(Entries.of_samples(self.combos, columns.combo, columns.numbers)).must_match

    def streams(self) -> DomainStreams:
        """A view of the streams for one reading thread."""
        kept = self.is_not_dropped if self.kept else None
        return DomainStreams(self.layout, self.blocks.rows, self.make_block_reader(), self.domain_of, kept)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a state or a journal to belong to this run."""
        plane = self.config.dataplane
        return {
            "index": self.facts.index_fingerprint,
            "tokenizer": self.tokenizer.fingerprint if self.tokenizer else None,
            "where": self.facts.where,
            "drop": list(self.config.query.drop),
            "holdout": _holdout(self.config.query),
            "domains": self.facts.names,
            "unit": self.config.mixture.unit,
            "on_exhausted": self.config.mixture.on_exhausted,
            "max_epochs": _epoch_limits(self.config.mixture),
            "seq_len": plane.seq_len,
            "overlap_one_token": plane.overlap_one_token,
            "add_eos": plane.add_eos,
            "global_batch_size": plane.global_batch_size,
            "chunk_steps": plane.chunk_steps,
            "feedback_lag": plane.feedback_lag,
            "seed": plane.seed,
            "shuffle": plane.shuffle,
            "shuffle_window": plane.shuffle_window,
        }


def _holdout(query: QueryConfig) -> list[Any] | None:
    return [query.split, query.holdout.fraction, query.holdout.seed] if query.holdout.fraction else None


def _epoch_limits(mixture: MixtureConfig) -> float | list[float | None] | None:
    """The limit of all domains, or each one's where some have their own."""
    own = [leaf.domain.max_epochs for leaf in domain_entries(mixture)]
    return mixture.max_epochs if all(e is None for e in own) else [mixture.max_epochs if e is None else e for e in own]


def open_source(config: Config, comm: Communicator, *, check: bool = True) -> Source:
    """Open the index and share it. **Collective.**

    Args:
        check: refuse an index whose shards have changed on disk.

    Raises:
        ConfigError: held-out samples are wished for, and nothing is held out.
        PropertyIndexError: it is missing, damaged, stale, or was built with another tokenizer or without one.
        MixtureError: a domain key matches nothing, a wished domain is empty, or all wished ones are dropped.
    """
    raise_problems(holdout_problems(config.query))
    tokenizer = load_vocabulary(config.dataplane)
    facts: _Facts | None = None
    arrays: dict[str, NDArray[Any]] = {}
    if comm.rank == 0:
        index = open_configured(config)
        try:
            facts, arrays = _gather(config, index, tokenizer, check)
        finally:
            index.close()
    known = msgspec.json.decode(bcast_bytes(comm, msgspec.json.encode(facts) if facts else None), type=_Facts)
    return _assemble(config, known, _share(comm, arrays), tokenizer)


def count_samples(config: Config) -> int:
    """Samples of all domains together, without those dropped; opens the index and nothing else.

    Raises:
        ConfigError: `query.where` or `query.drop` does not parse, or names what the index does not have.
    """
    with open_configured(config) as index:
        rows, _ = select_domains(_with_where(config, _kept_text(config)), index).selection.table.totals()
    return int(rows.sum())


def _gather(
    config: Config, index: PropertyIndex, tokenizer: Tokenizer | None, check: bool
) -> tuple[_Facts, dict[str, NDArray[Any]]]:
    """Rank 0's part: what there is to share."""
    if check:
        check_fresh(index)
    check_token_counts(config, index, tokenizer)
    chosen = select_domains(config, index)
    tables, table = index.tables, chosen.selection.table
    kept = _kept_text(config)
    stock = _layout(config, table).epoch_items()
    if config.query.drop:
        table = _left_in(table, select_domains(_with_where(config, kept), index).selection.table, len(tables.blocks))
    facts = _Facts(
        index_fingerprint=index.fingerprint,
        samples=sample_sources(index),
        data_root=str(index.data_root),
        text=index.text,
        shard_paths=index.shard_paths(),
        shard_formats=list(tables.shards.format),
        properties=[(p.name, p.kind.value, list(p.values)) for p in tables.properties.values()],
        names=list(chosen.names),
        keys=[domain_key_to_plain(key) for key in chosen.keys],
        where=chosen.selection.predicate.text,
        kept=kept if config.query.drop else "",
        domain_sizes=stock.tolist(),
    )
    arrays = {f"blocks/{name}": getattr(tables.blocks, name) for name in BLOCK_COLUMNS}
    arrays |= {f"table/{f.name}": getattr(table, f.name) for f in fields(table)}
    arrays["combo_domain"] = chosen.selection.combo_domain
    if config.query.holdout.fraction:
        arrays["holdout_keys"] = shard_hash_keys(tables.shards.path, config.query.holdout.seed).view(np.int64)
    for name in tables.combos.properties:
        arrays[f"combos/indptr/{name}"] = tables.combos.indptr[name]
        arrays[f"combos/codes/{name}"] = tables.combos.codes[name]
    return facts, arrays


def _kept_text(config: Config) -> str:
    """`query.where` without what `query.drop` names."""
    where = (config.query.where or "").strip()
    return " and ".join([f"({where})"] * bool(where) + [f"not ({expression})" for expression in config.query.drop])


def _with_where(config: Config, where: str) -> Config:
    return replace(config, query=replace(config.query, where=where))


def _left_in(table: DomainTable, kept: DomainTable, num_blocks: int) -> DomainTable:
    """`table` with every entry, but only the rows and tokens that `kept` counts: the order of blocks stays as it was."""

    def place(entries: DomainTable) -> NDArray[np.int64]:
        domain = np.repeat(np.arange(entries.num_domains), np.diff(entries.indptr))
        return domain * num_blocks + entries.block

    rows, tokens = np.zeros_like(table.rows), np.zeros_like(table.tokens)
    at = np.searchsorted(place(table), place(kept))
    rows[at], tokens[at] = kept.rows, kept.tokens
    return replace(table, rows=rows, tokens=tokens)


def _capacity(source: Source, era: StreamVersion) -> NDArray[np.int64]:
    limits = max_epochs_per_domain(source.config.mixture, source.num_domains)
    return source.grid.capacity(source.layout.epoch_items(), limits, era.origins)


def _share(comm: Communicator, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Every array of rank 0 on every rank, once per node. **Collective.**"""
    names = msgspec.json.decode(bcast_bytes(comm, msgspec.json.encode(list(arrays)) if comm.rank == 0 else None))
    return {name: comm.Allocate_shared(arrays.get(name)) for name in names}


def _assemble(config: Config, facts: _Facts, arrays: dict[str, NDArray[Any]], tokenizer: Tokenizer | None) -> Source:
    table = DomainTable(**{f.name: arrays[f"table/{f.name}"] for f in fields(DomainTable)})
    plane, mixture = config.dataplane, config.mixture
    layout = _layout(config, table)
    grid = SequenceGrid.of_unit(layout.in_tokens, plane.seq_len, plane.overlap_one_token)
    sizes = layout.epoch_items()
    source = Source(
        config=config,
        facts=facts,
        layout=layout,
        blocks=BlockTable(**{name: arrays[f"blocks/{name}"] for name in BLOCK_COLUMNS}, zones={}),
        combos=_combos(facts, arrays),
        selection=_selection(config, facts, arrays, table),
        grid=grid,
        tokenizer=tokenizer,
        mixture_context=_ground(config, facts, grid, sizes > 0),
        planner=Planner(
            capacity=grid.capacity(sizes, max_epochs_per_domain(mixture, len(sizes))),
            global_batch_size=plane.global_batch_size,
            chunk_steps=plane.chunk_steps,
            on_exhausted=mixture.on_exhausted,
        ),
        kept=_predicate(config, facts, facts.kept) if facts.kept else None,
        stream_version=StreamVersion.start(len(facts.names)),
        holdout_keys=arrays["holdout_keys"].view(np.uint64) if config.query.holdout.fraction else None,
        arrays=arrays,
    )
    if config.query.split == "train":
        source.mixer(learn=False)  # A mixture that cannot be served is refused here, before anything starts.
    return source


def _again(config: Config, facts: _Facts, arrays: dict[str, NDArray[Any]], era: StreamVersion) -> Source:
    return _assemble(config, facts, arrays, load_vocabulary(config.dataplane)).at_version(era)


def _layout(config: Config, table: DomainTable) -> StreamLayout:
    plane, in_tokens = config.dataplane, config.mixture.unit == "tokens"
    return StreamLayout(
        table=table,
        order=ShuffleOrder(seed=plane.seed, shuffle=plane.shuffle, window=plane.shuffle_window),
        num_specials=int(plane.add_eos) if in_tokens else 0,
        in_tokens=in_tokens,
    )


def _ground(config: Config, facts: _Facts, grid: SequenceGrid, left: NDArray[np.bool_]) -> MixtureContext:
    plane = config.dataplane
    budget = config.training.num_steps * plane.global_batch_size * grid.stride
    predicted = max(grid.length - 1, 1)  # Of a sequence; also without overlap, where its first token is not predicted.
    keys = tuple(parse_domain_key(key) for key in facts.keys)
    return MixtureContext(
        domain_sizes=DomainSizes(keys=keys, sizes=np.array(facts.domain_sizes, np.int64), budget=budget),
        names=tuple(facts.names),
        has_samples=left,
        timeline=ChunkTimeline(chunk_steps=plane.chunk_steps, items_per_step=plane.global_batch_size * predicted),
        feedback_lag=plane.feedback_lag,
    )


def _properties(facts: _Facts) -> dict[str, Property]:
    return {name: Property(name=name, kind=Kind(kind), values=tuple(values)) for name, kind, values in facts.properties}


def _combos(facts: _Facts, arrays: dict[str, NDArray[Any]]) -> ComboTable:
    categorical = {n: p for n, p in _properties(facts).items() if p.kind is not Kind.NUMBER}
    return ComboTable(
        num_combos=len(arrays["combo_domain"]),
        properties=categorical,
        indptr={name: arrays[f"combos/indptr/{name}"] for name in categorical},
        codes={name: arrays[f"combos/codes/{name}"] for name in categorical},
    )


def _predicate(config: Config, facts: _Facts, text: str) -> Predicate:
    predicate, holdout = parse_predicate(text, _properties(facts)), config.query.holdout
    return restrict_to_split(predicate, holdout.fraction, config.query.split) if holdout.fraction else predicate


def _selection(config: Config, facts: _Facts, arrays: dict[str, NDArray[Any]], table: DomainTable) -> Selection:
    return Selection(
        table=table,
        predicate=_predicate(config, facts, facts.where),
        combo_domain=arrays["combo_domain"],
        selected=(0, 0),
        unassigned=(0, 0),
        overlaps=(),
    )
