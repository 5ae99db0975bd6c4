"""Build the property index of a data collection: discover, scan, merge, publish.

Rank 0 lists the shards and cuts them into units; all ranks scan them together and log the parts; rank 0 merges them in order
and writes the file under its final name when all of it is on disk. The bytes are the same for any number of ranks. A killed
build leaves the old index as it was and its logs beside it: the next one, with any number of ranks, scans only what is missing.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.config.schema import Config
from mixtera_hpc.formats.base import ScanUnit, Vocabulary
from mixtera_hpc.formats.codecs.seek_points import seek_folder_of
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.formats.shard_scan import scan_spec_of
from mixtera_hpc.index.build.assemble import BuildReport, BuildRequest, assemble_index
from mixtera_hpc.index.build.discover import Shard, discover_shards, roots_of
from mixtera_hpc.index.build.index_job import IndexJob, ScanPlan, UnitRecords, run_index_job
from mixtera_hpc.index.scan.computed_properties import DocumentFunctions
from mixtera_hpc.index.scan.parallel_scan import ProgressCallback
from mixtera_hpc.index.scan.scan_result import ScanResult
from mixtera_hpc.index.scan.unit_scan import ScanSettings, scan_unit
from mixtera_hpc.tokens.tokenizer import load_vocabulary

__all__ = ["BuildReport", "build_index", "plan_shards", "scan_settings", "shard_scan_job"]


def build_index(
    config: Config, comm: Communicator | None = None, progress: ProgressCallback | None = None
) -> BuildReport:
    """Build `config.index.path` from the shards of `config.data`. **Collective.**

    Args:
        progress: called on rank 0 as all ranks go on.

    Raises:
        ConfigError: globs, formats, properties, functions or the tokenizer.
        DataError: a shard or a row that cannot be read.
        PropertyIndexError: the index cannot be written, or is being built already.
    """
    began, job = time.monotonic(), scan_settings(config)

    def end(plan: ScanPlan, records: UnitRecords) -> BuildReport:
        return assemble_index(BuildRequest(config, job, began), plan, records)

    work = shard_scan_job(config, job)
    return run_index_job(
        work, comm or Local(), lambda: plan_shards(job, discover_shards(config.data)), end, BuildReport, progress
    )


def scan_settings(config: Config) -> ScanSettings:
    """What a configuration says of scanning.

    Raises:
        ConfigError: paths that contradict each other, a function or a tokenizer that cannot be loaded.
    """
    tokenizer, functions = load_vocabulary(config.dataplane), DocumentFunctions.of(config.data)
    vocabulary = Vocabulary(size=tokenizer.vocab_size, eos_id=tokenizer.eos_id) if tokenizer else None
    documents = tokenizer is not None or bool(functions.all)
    fields = scan_spec_of(config.data, documents=documents, vocabulary=vocabulary)
    if config.index.seek_points:
        fields = replace(fields, seek_folder=str(seek_folder_of(config.index.path)))
    return ScanSettings(
        roots=roots_of(config.data),
        fields=fields,
        functions=functions,
        block_rows=config.index.block_rows,
        tokenizer=tokenizer,
    )


def shard_scan_job(config: Config, job: ScanSettings) -> IndexJob:
    """How units of shards are scanned."""

    def scan(plan: ScanPlan, number: int) -> Iterator[ScanResult]:
        shard, start, stop = plan.units[number]
        return scan_unit(job, plan.shards[shard], ScanUnit(start, stop))

    tokenizer = job.tokenizer.fingerprint if job.tokenizer else None
    return IndexJob(
        path=Path(config.index.path),
        depends=[job.fields, job.functions.fields, job.functions.sources, job.block_rows, tokenizer],
        threads=config.index.threads,
        scan=scan,
    )


def plan_shards(job: ScanSettings, shards: list[Shard], first: int = 0) -> ScanPlan:
    """The units of all shards from position `first` on."""
    units = [
        (number, unit.start, unit.stop)
        for number, shard in enumerate(shards)
        if number >= first
        for unit in load_format(shard.format).units(shard.below(job.roots), shard.size_bytes)
    ]
    return ScanPlan(shards=shards, units=units, sizes=[stop - start for _, start, stop in units])
