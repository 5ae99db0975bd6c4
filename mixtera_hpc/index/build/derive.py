"""Add properties to an index that are functions of documents. Documents are read again; everything else is copied.

A unit is a run of neighbouring blocks of one shard. Its result contains what the index stores about these blocks, and
the new columns. So the merge is that of a build, and a killed derivation resumes like one. Blocks and rows keep their
order; combos are renumbered, since each may have split. Price: all documents are read once and the index is written
once. Every rank opens the index, which takes O(blocks) memory.
"""

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.config.schema import Config, DataConfig
from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import ConfigError, PropertyIndexError
from mixtera_hpc.formats.base import BlockRef, Column, PropertyField, ShardReader, null_column
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.seek_points import seek_folder_of
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.index.build.assemble import placed_records
from mixtera_hpc.index.build.extend_result import add_columns, concatenate_columns
from mixtera_hpc.index.build.index_job import IndexJob, ScanPlan, UnitRecords, follow_index_job, lead_index_job
from mixtera_hpc.index.build.merge import MergedTables, merge_results
from mixtera_hpc.index.build.publish import IndexFacts, PublishedIndex, publish_index
from mixtera_hpc.index.build.stored_blocks import StoredBlocks, block_ranges, combo_values
from mixtera_hpc.index.data_sets import DataSetFacts, data_set_key
from mixtera_hpc.index.read.configured import open_written
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.read.verify import check_fresh
from mixtera_hpc.index.scan.computed_properties import DocumentFunctions
from mixtera_hpc.index.scan.parallel_scan import ProgressCallback
from mixtera_hpc.index.scan.scan_result import Combo, ScanResult

__all__ = ["DeriveReport", "derive_properties"]

UNIT_BYTES = 64 << 20
BATCH_DOCUMENTS = 4096
"""Documents passed to a function at once, rounded up to whole blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeriveReport:
    """What a derivation did."""

    path: str
    fingerprint: str
    derived: tuple[str, ...]
    """The new properties."""
    samples: int
    combos: int
    bytes_read: int
    resumed_units: int
    """Units taken from the logs of an interrupted derivation."""
    units: int
    elapsed_s: float
    empty_properties: tuple[str, ...]
    """New properties that are null in every sample."""


def derive_properties(
    config: Config, comm: Communicator | None = None, progress: ProgressCallback | None = None, again: bool = False
) -> DeriveReport:
    """Add every property of `config.data.properties` that has a `function` and that the index lacks. **Collective.**

    Args:
        config: the keys `data` and `index` count.
        comm: the ranks that share the work; None for this process alone.
        progress: called on rank 0 while documents are read.
        again: recompute properties that the index has, with the functions as they are now.

    Raises:
        ConfigError: there is nothing to add, or a function cannot be imported.
        PropertyIndexError: there is no index, its shards have changed, or a property of that name is stored.
        DataError: a function did not return one value of its kind for each document.
    """
    comm = comm or Local()
    began_s = time.monotonic()
    with open_written(config, announce=comm.rank == 0) as index:
        functions = _functions_to_run(index, config.data, again)
        derivation = _Derivation(index, functions, combo_values(index.tables.combos), began_s)
        of_sets = [[name, own.fields, own.sources] for name, own in functions.items()]
        job = IndexJob(
            path=Path(config.index.path),
            depends_on=["derive", index.fingerprint, of_sets],
            threads=config.index.threads,
            scan=derivation.scan,
        )
        if comm.rank > 0:
            return follow_index_job(job, comm, DeriveReport)
        # Positions in changed shards would read other documents.
        check_fresh(index)
        return lead_index_job(job, _plan_units(index), comm, derivation.finish, progress)


def _functions_to_run(index: PropertyIndex, data: DataConfig, again: bool) -> dict[str, DocumentFunctions]:
    """Return, for every data set of the index, the functions whose properties are to be computed.

    Raises:
        ConfigError: there are none.
        PropertyIndexError: a property of that name is not computed by a function.
    """
    named = data.named_sets()
    # Without names, the keys are those of all data sets.
    configured = {dataset: DocumentFunctions.of(named.get(dataset, data)) for dataset in index.sets}
    names = set()
    for dataset, functions in configured.items():
        for function in functions.all:
            _check_not_read(index, dataset, function.field.name)
            if again or not _is_stored(index, dataset, function.field):
                names.add(function.field.name)
    if not names:
        problem = "data.properties names no function"
        if any(functions.all for functions in configured.values()):
            problem = "the index has all these properties already"
        raise ConfigError(
            f"There is nothing to derive: {problem}.\n  Add data.properties.NAME={{function: package.module.function, "
            "kind: category}, or recompute existing properties with --again."
        )
    # A column is replaced as a whole, so a property is computed in all data sets that have a function for it.
    return {
        dataset: DocumentFunctions(tuple(f for f in functions.all if f.field.name in names))
        for dataset, functions in configured.items()
    }


def _check_not_read(index: PropertyIndex, dataset: str, name: str) -> None:
    """Refuse to replace a property that a data set reads from its rows."""
    for facts in index.sets.values():
        source = facts.sources.get(name, "function:")
        if not source.startswith("function:"):
            raise PropertyIndexError(
                f"{index.path} has a property {name!r} already, from {source}.\n"
                f"  Give the new one another name than {data_set_key(dataset, f'properties.{name}')}."
            )


def _is_stored(index: PropertyIndex, dataset: str, field: PropertyField) -> bool:
    prop = index.tables.properties.get(field.name)
    if prop is None or prop.kind != field.kind:
        return False
    return index.sets[dataset].sources.get(field.name) == f"function:{field.path}"


def _plan_units(index: PropertyIndex) -> ScanPlan:
    """Cut the blocks into units of about 64 MiB, each within one shard.

    A unit is (position of the shard, first block, one past the last block).
    """
    blocks = index.tables.blocks
    units = []
    sizes = []
    # Ranges are limited in rows first, since a unit is loaded as a whole.
    for first, last in block_ranges(index, np.arange(len(blocks), dtype=np.int64)):
        cuts = _cuts(blocks.shard[first:last], blocks.length[first:last])
        for start, stop in itertools.pairwise(cuts):
            units.append((int(blocks.shard[first + start]), first + start, first + stop))
            sizes.append(int(blocks.length[first + start : first + stop].sum()))
    return ScanPlan(shards=[], units=units, sizes=sizes)


def _cuts(shard: NDArray[np.int32], length: NDArray[np.int64]) -> list[int]:
    """Return the bounds of the units among consecutive blocks: at every shard, and every `UNIT_BYTES` bytes."""
    # A cut wherever the running sum passes a multiple of UNIT_BYTES.
    ends = np.cumsum(length)
    is_cut = (shard[1:] != shard[:-1]) | (ends[1:] // UNIT_BYTES != ends[:-1] // UNIT_BYTES)
    return [0, *(np.flatnonzero(is_cut) + 1).tolist(), len(shard)]


@dataclass(frozen=True, slots=True)
class _Derivation:
    """What a derivation works with."""

    index: PropertyIndex
    functions: Mapping[str, DocumentFunctions]
    """By data set."""
    combos: list[Combo | None]
    """Of the index, by number."""
    began_s: float
    """When it began, by the monotonic clock."""

    def scan(self, plan: ScanPlan, unit: int) -> Iterator[ScanResult]:
        """Yield the only result of a unit: what the index stores about its blocks, and the new properties."""
        shard, first, last = plan.units[unit]
        result = StoredBlocks(self.index, self.combos, first, last).load()
        functions = self.functions[self.index.shard_datasets()[shard]]
        # Null where the data set has no function.
        columns = {field.name: null_column(field.kind, result.num_rows) for field in self.fields.values()}
        if functions.all:
            batches = self._compute_unit(shard, result, first)
            columns |= {
                field.name: concatenate_columns([batch[field.name] for batch in batches]) for field in functions.fields
            }
        yield add_columns(result, list(self.index.tables.combos.properties), columns)

    @property
    def fields(self) -> dict[str, PropertyField]:
        """Return the new properties of all data sets, by name."""
        return {field.name: field for functions in self.functions.values() for field in functions.fields}

    def _compute_unit(self, shard: int, result: ScanResult, first: int) -> list[Mapping[str, Column]]:
        """Return the new properties of a unit that begins with block `first`."""
        index = self.index
        functions = self.functions[index.shard_datasets()[shard]]
        path = index.data_root / index.shard_paths()[shard]
        # A cache per unit: neighbouring blocks share compressed frames.
        cache = BlockCache(seek_folders=[seek_folder_of(index.path)])
        reader = load_format(index.tables.shards.format[shard]).open(path, index.shard_texts()[shard], cache)
        try:
            return list(self._compute(functions, result, reader, first))
        finally:
            reader.close()

    def _compute(
        self, functions: DocumentFunctions, result: ScanResult, reader: ShardReader, first: int
    ) -> Iterator[Mapping[str, Column]]:
        """Yield the new properties of consecutive rows, computed from a few thousand documents at a time.

        Rows that cannot be read are passed to the functions as empty texts; the merge drops their values.
        """
        blocks = self.index.tables.blocks
        bad = result.combos.index(None) if None in result.combos else -1
        no_lengths = np.zeros(result.num_rows, np.int64)
        texts: list[str] = []
        row = 0
        for number, rows in enumerate(result.blocks["rows"].tolist()):
            own = slice(row, row + rows)
            readable = np.flatnonzero(result.samples["combo"][own] != bad)
            lengths = result.samples.get("length", no_lengths)[own]
            documents = reader.documents(BlockRef.of(blocks, first + number), lengths, readable)
            # Scatter the readable documents to their rows.
            block_texts = [""] * rows
            for position, text in zip(readable.tolist(), documents, strict=True):
                block_texts[position] = text
            texts += block_texts
            row += rows
            if len(texts) >= BATCH_DOCUMENTS:
                yield functions.columns(texts)
                texts = []
        yield functions.columns(texts)

    def finish(self, plan: ScanPlan, records: UnitRecords) -> DeriveReport:
        """Merge, write and publish on rank 0."""
        index = self.index
        fields = {
            prop.name: PropertyField(name=prop.name, path="", kind=Kind(prop.kind))
            for prop in index.tables.properties.values()
        }
        # With `again` a derived property replaces the stored one.
        fields |= self.fields
        sources = placed_records(plan, records)
        merged = merge_results([field for _, field in sorted(fields.items())], sources, (), index.chunk_rows)
        published = publish_index(index.path, self._facts(), index.tables.shards, merged, sources)
        return self._report(plan, merged, published)

    def _facts(self) -> IndexFacts:
        # No generations: every combo may have a new number, so no earlier state is a prefix of this one.
        index = self.index
        return IndexFacts(
            sets={name: self._facts_of_set(name) for name in index.sets},
            tokenizer=index.tokenizer_fingerprint,
            bad=tuple(index.bad),
        )

    def _facts_of_set(self, name: str) -> DataSetFacts:
        facts = self.index.sets[name]
        # What another data set derives is null here, also if this one had a function for it.
        sources = {prop: source for prop, source in facts.sources.items() if prop not in self.fields}
        sources |= {field.name: f"function:{field.path}" for field in self.functions[name].fields}
        root = str(self.index.roots[name].resolve())
        return replace(facts, root=root, sources=dict(sorted(sources.items())))

    def _report(self, plan: ScanPlan, merged: MergedTables, published: PublishedIndex) -> DeriveReport:
        derived = tuple(sorted(self.fields))
        return DeriveReport(
            path=str(self.index.path),
            fingerprint=published.fingerprint,
            derived=derived,
            samples=self.index.tables.num_samples,
            combos=merged.combos.num_combos,
            bytes_read=plan.missing_bytes,
            resumed_units=len(plan.done),
            units=len(plan.units),
            elapsed_s=time.monotonic() - self.began_s,
            empty_properties=tuple(name for name in published.empty_properties if name in derived),
        )
