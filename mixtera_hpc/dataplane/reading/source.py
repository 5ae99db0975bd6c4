"""`Source`: the selected data of a run, the same on every rank.

It knows how large each domain is, in which order its samples come, and which bytes hold them. Samples are read later,
and only by the ranks that serve them: a rank opens the index file when it first needs the samples of a block.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.config.batch_ramp import batch_schedule_of
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.domain_keys import parse_domain_key
from mixtera_hpc.core.index_tables import BlockTable
from mixtera_hpc.core.lanes import LaneOrder
from mixtera_hpc.core.planner import Planner
from mixtera_hpc.core.sequence_grid import SequenceGrid
from mixtera_hpc.dataplane.mixing.configured_weights import max_epochs_per_domain
from mixtera_hpc.dataplane.mixing.context import ChunkTimeline, DomainSizes, MixtureContext
from mixtera_hpc.dataplane.mixing.from_config import make_mixer
from mixtera_hpc.dataplane.mixing.mixers import Mixer
from mixtera_hpc.dataplane.reading.domain_streams import DomainStreams
from mixtera_hpc.dataplane.reading.lookup.selected_samples import SelectedSamples, select_samples
from mixtera_hpc.dataplane.reading.lookup.shared_windows import SharedWindows
from mixtera_hpc.dataplane.reading.packing.cost_check import check_sample_costs
from mixtera_hpc.dataplane.reading.packing.sequence_order import sequence_order
from mixtera_hpc.dataplane.reading.processes.reader_memory import ReaderMemory, share_reader_memory
from mixtera_hpc.dataplane.reading.shared_index import (
    IndexDescription,
    SharedTables,
    read_shared_index,
    share_index,
)
from mixtera_hpc.dataplane.reading.stream_layout import StreamLayout
from mixtera_hpc.dataplane.reading.token_counts import check_same_tokenizer
from mixtera_hpc.dataplane.resume.source_identity import source_identity
from mixtera_hpc.dataplane.resume.stream_version import StreamVersion
from mixtera_hpc.dataplane.sample_subset import TRAINING_SAMPLES, SampleSubset
from mixtera_hpc.index.read.configured import open_configured
from mixtera_hpc.index.read.selection import check_split
from mixtera_hpc.tokens.tokenizer import Tokenizer, load_vocabulary

__all__ = ["Source", "open_source"]


# Without slots: `cached_property` keeps its value in the dict of the instance.
@dataclass(frozen=True, kw_only=True)
class Source:
    """The selected data of one run. Make it with `open_source`."""

    config: Config
    index: IndexDescription
    tables: SharedTables
    layout: StreamLayout
    samples: SelectedSamples
    grid: SequenceGrid
    tokenizer: Tokenizer | None
    mixture_context: MixtureContext
    planner: Planner
    subset: SampleSubset
    """The side of the holdout that is served, and what was dropped."""
    stream_version: StreamVersion
    lanes: LaneOrder
    """Mapping between served sequences and sequences of the streams."""
    memory: ReaderMemory = field(default_factory=ReaderMemory)
    """Memory that the processes of this node share."""

    def __reduce__(self) -> Any:
        """Pickle the configuration and the tables, or where they are. The rest is computed again."""
        return _rebuild_source, (
            self.config,
            self.index,
            self.subset,
            self.memory.tables or self.tables.pack(),
            self.stream_version,
            replace(self.memory, tables=None),
        )

    @property
    def cache_bytes(self) -> int:
        """Memory for decoded rows in each process that reads."""
        return self.memory.cache_bytes_per_reader(self.config.data.cache_bytes)

    @property
    def blocks(self) -> BlockTable:
        """All blocks of the index, without zones."""
        return self.tables.blocks

    @property
    def num_domains(self) -> int:
        """Number of domains, K."""
        return self.layout.table.num_domains

    @property
    def names(self) -> list[str]:
        """Name of every domain, by domain_id."""
        return self.index.domain_names

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """The weights of chunk 0; shape (K,), read-only."""
        weights = self.mixer(learn=False).weights_of(0)
        if weights is None:
            return np.zeros(self.num_domains)
        weights = self.without_dropped_domains(weights).copy()
        weights.setflags(write=False)
        return weights

    def without_dropped_domains(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return `weights` with 0 for domains that have nothing left after drops; shape (K,).

        Without drops the weights stay: a domain without samples is then refused, not passed over.
        """
        if self.samples.drop_filter is None:
            return weights
        # The planner gives the share of a dropped domain to the others.
        return np.where(self.planner.capacity > 0, weights, 0.0)

    def mixer(self, *, learn: bool = True) -> Mixer:
        """Return a new mixer for the configured mixture; see `make_mixer`."""
        return make_mixer(self.config.mixture, self.mixture_context, learn=learn)

    def at_version(self, version: StreamVersion) -> "Source":
        """Return the same data with the steps and stream positions of another version of the run."""
        timeline = replace(self.mixture_context.timeline, items=version.items)
        # Streams that became shorter hold fewer sequences.
        limits = max_epochs_per_domain(self.config.mixture, self.num_domains)
        capacity = self.grid.capacity(self.layout.epoch_items(), limits, version.origins)
        return replace(
            self,
            stream_version=version,
            lanes=replace(self.lanes, origins=version.origins, begins=version.begins),
            mixture_context=replace(self.mixture_context, timeline=timeline),
            planner=replace(self.planner, capacity=capacity),
        )

    def with_lanes(self, lanes: int) -> "Source":
        """Return the same data, served from another number of lanes."""
        config = replace(self.config, dataplane=replace(self.config.dataplane, lanes=lanes))
        order = sequence_order(config.dataplane, self.grid, self.lanes.epoch_items, self.stream_version)
        return replace(self, config=config, lanes=order)

    def batch_size_of(self, step: int) -> int:
        """Return the sequences of training step `step`, over all ranks."""
        return self.planner.batch_schedule.size_at(self.stream_version.data_step(step))

    def span(self, domain: int, first: int, count: int) -> tuple[int, int]:
        """Return the items [start, stop) of `domain`'s stream that `count` sequences from sequence `first` on cover.

        Sequences are numbered along the stream; `lanes` says in which order they are served.
        """
        start, stop = self.grid.span(first, count)
        # After a drop, sequences are counted from another item of the shortened stream.
        origin = int(self.stream_version.origins[domain])
        return origin + start, origin + stop

    def left_over_tokens(self, cursors: NDArray[np.int64]) -> int:
        """Return the tokens of ended domains that fill no sequence, given the sequences before the end."""
        if not self.layout.in_tokens:
            return 0
        limits = max_epochs_per_domain(self.config.mixture, self.num_domains)
        ended = np.isfinite(limits) & (cursors >= self.planner.capacity)
        items = np.floor(self.layout.epoch_items()[ended] * limits[ended]).astype(np.int64)
        # The last sequence ends behind the start of the next one; a domain may be too small for a single one.
        behind = np.where(cursors[ended] > 0, self.grid.length - self.grid.stride, 0)
        served = self.stream_version.origins[ended] + cursors[ended] * self.grid.stride + behind
        return int((items - served).sum())

    def streams(self) -> DomainStreams:
        """Return a view of the streams for one reading thread."""
        samples = self.samples
        windows = self.memory.windows
        return DomainStreams(
            self.layout,
            samples.make_block_reader(),
            samples.domain_of,
            None if samples.drop_filter is None else samples.is_not_dropped,
            self.stream_version.served,
            None if windows is None else SharedWindows(windows.fd),
        )

    def identity(self) -> dict[str, Any]:
        """Return what must be equal for a state or a journal to belong to this run; fit for JSON."""
        return source_identity(self.config, self.index, self.subset, self.tokenizer)


def open_source(
    config: Config, comm: Communicator, *, subset: SampleSubset = TRAINING_SAMPLES, check: bool = True
) -> Source:
    """Open the index and share it. **Collective.**

    Args:
        subset: which of the selected samples are served. Rank 0 decides what is dropped.
        check: refuse an index whose shards have changed on disk, and shards that change while they are read.

    Raises:
        ConfigError: the side "validation" is requested, but nothing is held out.
        PropertyIndexError: the index is missing, damaged or stale, or was built with another tokenizer or without one.
        MixtureError: a domain key matches nothing, a domain with a weight has no samples, or all of them are dropped.
    """
    check_split(config, subset.split)
    # Every rank loads the tokenizer: it is needed to tokenize, and cannot be shared as an array.
    tokenizer = load_vocabulary(config.dataplane)
    own: tuple[IndexDescription, SharedTables] | None = None
    if comm.rank == 0:
        # Closed again at once: every rank opens it for itself when it reads samples.
        with open_configured(config) as index:
            own = read_shared_index(config, index, subset, tokenizer, check=check)
            check_sample_costs(config, index, subset)

    description, tables = share_index(comm, own)
    # Only rank 0 has read the records of the run.
    subset = replace(subset, drop=tuple(description.drop))
    source = _make_source(config, description, subset, tables, tokenizer)
    # Without the check, a command only looks rows up, and no batch is served.
    if check:
        source = replace(source, memory=share_reader_memory(comm, config, description, tables))
    if subset.split == "train":
        source.mixer(learn=False)  # Refuses a mixture that cannot be served before anything starts.
    return source


def _rebuild_source(
    config: Config,
    index: IndexDescription,
    subset: SampleSubset,
    arrays: list[NDArray[Any]],
    version: StreamVersion,
    memory: ReaderMemory,
) -> Source:
    """Restore a pickled source, in another process."""
    tables = SharedTables.unpack(arrays, index.properties)
    source = _make_source(config, index, subset, tables, load_vocabulary(config.dataplane))
    return replace(source.at_version(version), memory=memory)


def _make_source(
    config: Config, index: IndexDescription, subset: SampleSubset, tables: SharedTables, tokenizer: Tokenizer | None
) -> Source:
    """Compute what follows from the configuration and the shared index: cheap, so every rank and worker does it."""
    plane = config.dataplane
    check_same_tokenizer(config, index.encoding, tokenizer)
    layout = StreamLayout.of_config(config, tables.domains, tables.blocks, index.shard_facts(), tokenizer)
    if plane.lanes is None:
        plane = replace(plane, lanes=index.default_lanes)
    grid = SequenceGrid.of_unit(layout.in_tokens, plane.seq_len, plane.overlap_one_token)
    epoch_items = layout.epoch_items()
    version = StreamVersion.start(len(epoch_items))
    return Source(
        config=replace(config, dataplane=plane),
        index=index,
        tables=tables,
        layout=layout,
        samples=select_samples(config, index, tables, subset, in_tokens=layout.in_tokens),
        grid=grid,
        tokenizer=tokenizer,
        mixture_context=_mixture_context(config, index, grid, epoch_items > 0),
        planner=Planner(
            capacity=grid.capacity(epoch_items, max_epochs_per_domain(config.mixture, len(epoch_items))),
            batch_schedule=batch_schedule_of(plane),
            chunk_steps=plane.chunk_steps,
            on_exhausted=config.mixture.on_exhausted,
            last_batch=plane.last_batch,
        ),
        subset=subset,
        stream_version=version,
        lanes=sequence_order(plane, grid, epoch_items, version),
    )


def _mixture_context(
    config: Config, index: IndexDescription, grid: SequenceGrid, has_samples: NDArray[np.bool_]
) -> MixtureContext:
    plane = config.dataplane
    # The model predicts all tokens of a sequence but the first, with and without overlap. A sample counts as one item.
    predicted_items = max(grid.length - 1, 1)
    sizes = DomainSizes(
        keys=tuple(parse_domain_key(key) for key in index.domain_keys),
        sizes=np.array(index.domain_items, np.int64),
        budget=batch_schedule_of(plane).sequences_before(config.training.num_steps) * grid.stride,
    )
    return MixtureContext(
        domain_sizes=sizes,
        names=tuple(index.domain_names),
        has_samples=has_samples,
        timeline=ChunkTimeline(
            chunk_steps=plane.chunk_steps,
            batch_schedule=batch_schedule_of(plane),
            items_per_sequence=predicted_items,
        ),
        feedback_lag=plane.feedback_lag,
    )
