"""Add properties to an index: from paths in the rows, from functions, and from the buckets of a number.

Shards are read again where the new properties need them; tokens are not counted again, and everything else is copied.
The merge is that of a build, and a killed derivation resumes like one. Blocks and rows keep their order; combos are
renumbered, since each may have split. Price: all rows are decoded once (buckets need none) and the index is written
once. Every rank opens the index, which takes O(blocks) memory.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.config.schema import Config, DataSetKeys
from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import ConfigError, PropertyIndexError
from mixtera_hpc.formats.base import PropertyField, ScanUnit
from mixtera_hpc.formats.chat_rows import stored_template
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.index.build.assemble import placed_records, sources_of
from mixtera_hpc.index.build.build import check_bucket_numbers, scan_of_set
from mixtera_hpc.index.build.derive_scan import NewProperties, extend_blocks, extend_unit
from mixtera_hpc.index.build.index_job import IndexJob, ScanPlan, UnitRecords, follow_index_job, lead_index_job
from mixtera_hpc.index.build.merge import MergedTables, merge_results
from mixtera_hpc.index.build.publish import IndexFacts, PublishedIndex, publish_index
from mixtera_hpc.index.build.stored_blocks import block_ranges, combo_values
from mixtera_hpc.index.build.stores.derived_stores import keep_stores
from mixtera_hpc.index.chat_check import check_chat_template
from mixtera_hpc.index.data_sets import DataSetFacts, data_set_key
from mixtera_hpc.index.read.configured import open_written
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.read.verify import check_fresh
from mixtera_hpc.index.scan.parallel_scan import ProgressCallback
from mixtera_hpc.index.scan.scan_result import Combo, ScanResult
from mixtera_hpc.index.scan.unit_scan import DataSetScan
from mixtera_hpc.tokens.chat_template import ChatTemplate
from mixtera_hpc.tokens.tokenizer import load_vocabulary

__all__ = ["DeriveReport", "derive_properties"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeriveReport:
    """Results of a derivation."""

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
    """Add every property of `config.data.properties` that the index lacks. **Collective.**

    Args:
        config: the keys `data` and `index` count.
        comm: the ranks that share the work; None for this process alone.
        progress: called on rank 0 while shards are read.
        again: recompute properties of functions that the index has, with the functions as they are now, and replace
            properties that are read from another path.

    Raises:
        ConfigError: there is nothing to add, or a function cannot be imported.
        PropertyIndexError: there is no index, its shards have changed, or a property of that name is stored.
        DataError: a row has no value of a property's kind, or a function did not return one value for each.
    """
    comm = comm or Local()
    began_s = time.monotonic()
    with open_written(config, announce=comm.rank == 0) as index:
        new = _new_properties(config, index, again)
        derivation = _Derivation(index, new, combo_values(index.tables.combos), began_s)
        of_sets = [
            [name, own.scan.spec, own.scan.computed.identity, own.nulls, own.skips_bad] for name, own in new.items()
        ]
        job = IndexJob(
            path=Path(config.index.path),
            depends_on=["derive", index.fingerprint, of_sets],
            threads=config.index.threads,
            scan=derivation.scan,
        )
        if comm.rank > 0:
            return follow_index_job(job, comm, DeriveReport)
        # Positions in changed shards would be those of other rows.
        check_fresh(index)
        report = lead_index_job(job, derivation.plan(), comm, derivation.finish, progress)
        keep_stores(config, index.path, index.fingerprint, report.fingerprint)
        return report


def _new_properties(config: Config, index: PropertyIndex, again: bool) -> dict[str, NewProperties]:
    """Return what is added to the samples of each data set of the index.

    Raises:
        ConfigError: there is nothing to add.
        PropertyIndexError: the index reads a property of that name from its rows.
    """
    named = config.data.named_sets()
    # Without names, the keys are those of all data sets.
    configured = {dataset: named.get(dataset, config.data) for dataset in index.sets}
    scans = {dataset: _scan_of_new(config, index, dataset, keys, again) for dataset, keys in configured.items()}
    check_bucket_numbers(scans, index.tables.blocks.zones, has_tokens=index.tables.has_tokens)
    fields = {f.name: f for scan in scans.values() for f in (*scan.spec.properties, *scan.computed.fields)}
    if not fields:
        problem = "data.properties names no function, path or buckets that the index does not have"
        if any(spec.function for keys in configured.values() for spec in keys.properties.values()):
            problem = "the index has all these properties already"
        raise ConfigError(
            f"There is nothing to derive: {problem}.\n  Add data.properties.NAME={{function: package.module.function, "
            "kind: category}, a path, or buckets of a number; or recompute existing properties with --again."
        )
    return {
        dataset: NewProperties(
            scan=scan,
            nulls=_null_fields(index, scan, fields),
            skips_bad=configured[dataset].on_bad_sample == "skip",
        )
        for dataset, scan in scans.items()
    }


def _scan_of_new(config: Config, index: PropertyIndex, dataset: str, keys: DataSetKeys, again: bool) -> DataSetScan:
    """Return how the properties that a data set lacks are read and computed."""
    given = scan_of_set(config, keys, None)
    sources = sources_of(given)
    kinds = {field.name: field.kind for field in (*given.spec.properties, *given.computed.fields)}
    names = {n for n, source in sources.items() if _is_new(index, dataset, n, source, kinds[n], again)}
    facts = index.sets[dataset]
    own = {name: spec for name, spec in keys.properties.items() if name in names}
    if any(spec.path is not None for spec in own.values()) and keys.parser != facts.parser:
        raise PropertyIndexError(
            f"{index.path} was built with {data_set_key(dataset, 'parser')}={facts.parser}, but it is {keys.parser} "
            "now.\n  The paths of new properties refer to what the parser returns: give the parser of the build."
        )
    # Rows that the build has left out are left out again, and rows that it has read must be read again.
    changed = replace(keys, properties=own, text=facts.text, on_bad_sample="skip", root=str(index.roots[dataset]))
    if all(spec.path is None for spec in own.values()):
        changed = replace(changed, parser=None)
    scan = scan_of_set(config, changed, None)
    chat: ChatTemplate | None = None
    if scan.spec.documents and stored_template(facts.text):
        tokenizer = load_vocabulary(config.dataplane)
        check_chat_template(index, tokenizer)
        chat = tokenizer.chat if tokenizer is not None else None
    return replace(scan, spec=replace(scan.spec, seek_folder=None, chat=chat))


def _is_new(index: PropertyIndex, dataset: str, name: str, source: str, kind: Kind, again: bool) -> bool:
    """Return whether a property has to be read or computed.

    Raises:
        PropertyIndexError: the index reads another property of that name from its rows.
    """
    prop = index.tables.properties.get(name)
    is_stored = prop is not None and prop.kind is kind and index.sets[dataset].sources.get(name) == source
    if is_stored:
        return again and source.startswith("function:")
    for facts in index.sets.values():
        stored = facts.sources.get(name, source)
        is_replaced = again and source.startswith("path:")
        if stored.startswith("path:") and stored != source and not is_replaced:
            raise PropertyIndexError(
                f"{index.path} has a property {name!r} already, from {stored}.\n"
                f"  Give the new one another name than {data_set_key(dataset, f'properties.{name}')}."
            )
    return True


def _null_fields(
    index: PropertyIndex, scan: DataSetScan, fields: Mapping[str, PropertyField]
) -> tuple[PropertyField, ...]:
    """Return the new properties that are null in a data set: those of other data sets that it has not stored."""
    own = {field.name for field in (*scan.spec.properties, *scan.computed.fields)}
    stored = {
        name for name, prop in index.tables.properties.items() if name in fields and prop.kind is fields[name].kind
    }
    return tuple(field for name, field in sorted(fields.items()) if name not in own | stored)


@dataclass(frozen=True, slots=True)
class _Derivation:
    """Inputs of a derivation."""

    index: PropertyIndex
    new: Mapping[str, NewProperties]
    """Data set → its new properties."""
    combos: list[Combo | None]
    """The combos of the index, by number."""
    began_s: float
    """Start, in seconds of the monotonic clock."""

    def plan(self) -> ScanPlan:
        """Cut the shards that are read into units of their formats, and the blocks of the others into ranges.

        A unit is (position of the shard, start, stop): bytes of a shard that is read, else block numbers.
        """
        index = self.index
        shards = index.tables.shards
        units = []
        sizes = []
        for number, dataset in enumerate(index.shard_datasets()):
            if self.new[dataset].reads_shards:
                path = index.data_root / index.shard_paths()[number]
                own = load_format(shards.format[number]).units(path, int(shards.size_bytes[number]))
                units += [(number, unit.start, unit.stop) for unit in own]
                sizes += [unit.stop - unit.start for unit in own]
            else:
                first, stop = np.searchsorted(index.tables.blocks.shard, [number, number + 1])
                ranges = list(block_ranges(index, np.arange(first, stop)))
                units += [(number, start, end) for start, end in ranges]
                sizes += [0] * len(ranges)
        return ScanPlan(shards=[], units=units, sizes=sizes)

    def scan(self, plan: ScanPlan, unit: int) -> Iterator[ScanResult]:
        """Yield the results of a unit: what the index stores about its blocks, and the new properties."""
        shard, start, stop = plan.units[unit]
        new = self.new[self.index.shard_datasets()[shard]]
        if new.reads_shards:
            return extend_unit(self.index, self.combos, shard, ScanUnit(start, stop), new)
        return iter([extend_blocks(self.index, self.combos, range(start, stop), new, {})])

    @property
    def fields(self) -> dict[str, PropertyField]:
        """Return the new properties of all data sets, by name."""
        scans = [new.scan for new in self.new.values()]
        return {field.name: field for scan in scans for field in (*scan.spec.properties, *scan.computed.fields)}

    def finish(self, plan: ScanPlan, records: UnitRecords) -> DeriveReport:
        """Merge, write and publish on rank 0.

        Raises:
            PropertyIndexError: the shards had other rows than the index stores.
        """
        index = self.index
        fields = {
            prop.name: PropertyField(name=prop.name, path="", kind=Kind(prop.kind))
            for prop in index.tables.properties.values()
        }
        # With `again` a derived property replaces the stored one.
        fields |= self.fields
        sources = placed_records(plan, records)
        merged = merge_results([field for _, field in sorted(fields.items())], sources, (), index.chunk_rows)
        if merged.blocks != len(index.tables.blocks):
            raise PropertyIndexError(
                f"The shards of {index.path} have {merged.blocks} blocks now, the index stores "
                f"{len(index.tables.blocks)}.\n  Run mixtera-hpc index verify --deep, and build again."
            )
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
        # A property whose kind has changed is null where this data set does not have it any more.
        nulls = {field.name for field in self.new[name].nulls}
        sources = {prop: source for prop, source in facts.sources.items() if prop not in nulls}
        sources |= sources_of(self.new[name].scan)
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
