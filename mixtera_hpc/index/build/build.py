"""Build the property index of a data collection: discover, scan, merge, publish.

Rank 0 lists the shards and cuts them into units. All ranks scan the units and log the results. Rank 0 merges them in
index order, and gives the file its final name when all of it is on disk. The bytes are the same for any number of
ranks. A killed build leaves the old index as it was, and its logs beside it: the next one, with any number of ranks,
scans only what is missing.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.config.schema import Config, DataSetKeys
from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import ConfigError, did_you_mean
from mixtera_hpc.formats.base import ScanUnit, Vocabulary
from mixtera_hpc.formats.chat_rows import is_chat
from mixtera_hpc.formats.codecs.seek_points import seek_folder_of
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.formats.shard_scan import scan_spec_of
from mixtera_hpc.index.build.assemble import BuildReport, BuildRequest, assemble_index
from mixtera_hpc.index.build.discover import discover_shards
from mixtera_hpc.index.build.index_job import IndexJob, ScanPlan, UnitRecords, follow_index_job, lead_index_job
from mixtera_hpc.index.build.stores.store_maker import AnnounceStore, StoreMaker
from mixtera_hpc.index.chat_check import check_has_template
from mixtera_hpc.index.data_sets import data_set_key
from mixtera_hpc.index.scan.computed_properties import ComputedProperties
from mixtera_hpc.index.scan.parallel_scan import ProgressCallback
from mixtera_hpc.index.scan.scan_result import ScanResult
from mixtera_hpc.index.scan.unit_scan import DataSetScan, ScanSettings, scan_unit
from mixtera_hpc.index.shards import Shard
from mixtera_hpc.tokens.slow_encoding import warn_of_slow_encoding
from mixtera_hpc.tokens.tokenizer import Tokenizer, load_vocabulary

__all__ = ["build_index", "check_bucket_numbers", "plan_shards", "scan_of_set", "scan_settings", "shard_scan_job"]


def build_index(
    config: Config,
    comm: Communicator | None = None,
    progress: ProgressCallback | None = None,
    announce: AnnounceStore | None = None,
) -> BuildReport:
    """Build `config.index.path` from the shards of `config.data`. **Collective.**

    Args:
        config: the keys `data`, `index` and the tokenizer of `dataplane` count.
        comm: the ranks that share the work; None for this process alone.
        progress: called on rank 0 while units are scanned.
        announce: called on rank 0 with the size of a token store, before it is written; None writes no store,
            whatever `data.materialize` says.

    Raises:
        ConfigError: globs, formats, properties, functions or the tokenizer are wrong.
        DataError: a shard or a row cannot be read.
        PropertyIndexError: the index cannot be written, or another process is building it.
    """
    comm = comm or Local()
    began_s = time.monotonic()
    settings = scan_settings(config)
    maker = None
    if announce is not None:
        maker = StoreMaker(config, settings.tokenizer, comm, announce, progress)
    job = shard_scan_job(config, settings, maker)
    # Only rank 0 lists the shards: thousands of ranks would overload the metadata server of the file system.
    if comm.rank > 0:
        return _with_store(follow_index_job(job, comm, BuildReport), maker)

    warn_of_slow_encoding(settings.tokenizer)
    request = BuildRequest(config=config, settings=settings, began_s=began_s)
    plan = plan_shards(settings, discover_shards(config.data))

    def finish(plan: ScanPlan, records: UnitRecords) -> BuildReport:
        return assemble_index(request, plan, records)

    return _with_store(lead_index_job(job, plan, comm, finish, progress), maker)


def _with_store(report: BuildReport, maker: StoreMaker | None) -> BuildReport:
    return report if maker is None else replace(report, token_store=maker.tokens, row_store=maker.rows)


def scan_settings(config: Config) -> ScanSettings:
    """Return the scan settings of a configuration.

    Raises:
        ConfigError: paths contradict each other, or a function or a tokenizer cannot be loaded.
    """
    tokenizer = load_vocabulary(config.dataplane)
    sets = {name: scan_of_set(config, data_set, tokenizer) for name, data_set in config.data.named_sets().items()}
    check_bucket_numbers(sets, (), has_tokens=tokenizer is not None)
    return ScanSettings(
        sets=sets,
        block_rows=config.index.block_rows,
        tokenizer=tokenizer,
    )


def check_bucket_numbers(sets: Mapping[str, DataSetScan], stored: Iterable[str], *, has_tokens: bool) -> None:
    """Refuse buckets of a number that no data set has: all samples would be in none.

    Args:
        sets: the data sets.
        stored: further numbers, of an existing index.
        has_tokens: whether tokens are counted.

    Raises:
        ConfigError: names the property.
    """
    fields = [f for s in sets.values() for f in (*s.spec.properties, *s.computed.fields)]
    known = {field.name for field in fields if field.kind is Kind.NUMBER} | set(stored) | {"bytes"}
    if has_tokens:
        known.add("tokens")
    for dataset, data_set in sets.items():
        for bucket in data_set.computed.buckets:
            number = bucket.field.path
            if number not in known:
                is_uncounted = number == "tokens"
                cure = " Set dataplane.tokenizer." if is_uncounted else did_you_mean(number, sorted(known))
                problem = "not counted" if is_uncounted else "not a number property"
                key = data_set_key(dataset, f"properties.{bucket.field.name}")
                raise ConfigError(f"{key} has buckets of {number}, which is {problem}.{cure}")


def scan_of_set(config: Config, data_set: DataSetKeys, tokenizer: Tokenizer | None) -> DataSetScan:
    """Return how the rows of one data set are scanned.

    Raises:
        ConfigError: paths contradict each other, or a function cannot be loaded.
    """
    computed = ComputedProperties.of(data_set)
    vocabulary: Vocabulary | None = None
    if tokenizer is not None:
        vocabulary = Vocabulary(size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, bos_ids=tokenizer.bos_ids)
    # Texts are decoded only to count tokens or to compute properties.
    spec = scan_spec_of(
        data_set,
        documents=tokenizer is not None or computed.needs_documents,
        whole_rows=computed.needs_rows,
        vocabulary=vocabulary,
        chat=tokenizer.chat if tokenizer is not None else None,
    )
    if tokenizer is not None and is_chat(data_set.text):
        check_has_template(data_set.text, tokenizer)
    # Columns that no setting names cost extra reads, so they are checked only where whole rows will be served.
    spec = replace(spec, check_rows=data_set.text is None or config.mixture.unit == "samples")
    if config.index.seek_points:
        # A second decompression now saves decoding from the start of the file at every later read.
        spec = replace(spec, seek_folder=str(seek_folder_of(config.index.path)))
    return DataSetScan(root=Path(data_set.root), spec=spec, computed=computed)


def shard_scan_job(config: Config, settings: ScanSettings, maker: StoreMaker | None) -> IndexJob:
    """Return the job that scans units of shards, and that makes a token store of them if there is a maker."""

    def scan(plan: ScanPlan, number: int) -> Iterator[ScanResult]:
        position, start, stop = plan.units[number]
        shard = plan.shards[position]
        spool = maker.spool_of(plan, shard) if maker is not None else None
        return scan_unit(settings, shard, ScanUnit(start, stop), spool)

    tokenizer = settings.tokenizer.fingerprint if settings.tokenizer else None
    # Everything that can change a result; the tokenizer and the code of functions by their digests.
    sets = [[name, s.spec, s.computed.identity] for name, s in settings.sets.items()]
    return IndexJob(
        path=Path(config.index.path),
        depends_on=[sets, settings.block_rows, tokenizer],
        threads=config.index.threads,
        scan=scan,
        store=maker,
    )


def plan_shards(settings: ScanSettings, shards: list[Shard], first: int = 0) -> ScanPlan:
    """Cut the shards from position `first` on into units."""
    # Formats decide where a shard can be cut; a unit of a Parquet file is a range of its bytes like any other.
    units = [
        (number, unit.start, unit.stop)
        for number, shard in enumerate(shards)
        if number >= first
        for unit in _units_of(shard, settings)
    ]
    return ScanPlan(shards=shards, units=units, sizes=[stop - start for _, start, stop in units])


def _units_of(shard: Shard, settings: ScanSettings) -> list[ScanUnit]:
    units = load_format(shard.format).units(shard.below(settings.roots), shard.size_bytes)
    # A file of 0 bytes has an empty unit: its scan decides whether it is a valid one.
    return units or [ScanUnit(0, 0)]
