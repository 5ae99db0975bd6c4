"""Build the property index of a data collection: discover, scan, merge, publish.

Rank 0 lists the shards and cuts them into units; every rank scans its share and logs the parts; rank 0 merges them in order
and writes the file under its final name when all of it is on disk. The bytes are the same for any number of ranks. A killed
build leaves the old index as it was and its logs beside it: the next one, with any number of ranks, scans only what is missing.
"""

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from mixtera_hpc.comm.communicator import Communicator, Local, bcast_bytes
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.tables import ShardTable
from mixtera_hpc.errors import DataError, PropertyIndexError
from mixtera_hpc.formats.format import Unit, Vocabulary
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.formats.scan import fields_of
from mixtera_hpc.index.discover import Shard, discover, fingerprint_of_shard
from mixtera_hpc.index.layout import VERSION
from mixtera_hpc.index.merge import Merged, merge
from mixtera_hpc.index.parts import PartLog, PartRecord, building_folder, find_parts, locked, recover_parts
from mixtera_hpc.index.scan import ScanJob, scan_unit
from mixtera_hpc.index.write import IndexFacts, publish, write_index
from mixtera_hpc.tokens.tokenizer import load_vocabulary

__all__ = ["BuildProgress", "BuildReport", "build_index"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildProgress:
    """How far this rank's share of a build has come."""

    rows: int
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """What a build did."""

    path: str
    fingerprint: str
    shards: int
    samples: int
    tokens: int | None
    """None when they were not counted."""
    blocks: int
    combos: int
    bytes_read: int
    """Of the shards."""
    index_bytes: int
    units: int
    resumed_units: int
    """Found in the logs of a build that did not come to its end."""
    elapsed_s: float
    empty_properties: tuple[str, ...]
    """Properties that no sample has: most often a path with a typing error."""


class _Plan(msgspec.Struct):
    """What rank 0 tells the others."""

    shards: list[Shard]
    units: list[tuple[int, int, int]]
    """Shard, start and stop, in canonical order."""
    key: str
    """Of everything a part depends on."""
    done: list[int]
    """Units whose parts were found."""
    attempt: int


def build_index(
    config: Config, comm: Communicator | None = None, progress: Callable[[BuildProgress], None] | None = None
) -> BuildReport:
    """Build `config.index.path` from the shards of `config.data`. **Collective.**

    Args:
        progress: called on every rank after each of its units.

    Raises:
        ConfigError: globs, formats, properties or the tokenizer.
        DataError: a shard or a row that cannot be read.
        PropertyIndexError: the index cannot be written, or is being built already.
    """
    comm, began = comm or Local(), time.monotonic()
    tokenizer = load_vocabulary(config.dataplane)
    vocabulary = Vocabulary(size=tokenizer.vocab_size, eos_id=tokenizer.eos_id) if tokenizer else None
    fields = fields_of(config.data, documents=tokenizer is not None, vocabulary=vocabulary)
    job = ScanJob(root=Path(config.data.root), fields=fields, block_rows=config.index.block_rows, tokenizer=tokenizer)
    path = Path(config.index.path)
    folder = building_folder(path)
    if comm.rank > 0:
        _scan_share(job, msgspec.json.decode(bcast_bytes(comm, None), type=_Plan), folder, comm, progress)
        return msgspec.json.decode(bcast_bytes(comm, None), type=BuildReport)
    shards = discover(config.data)
    _make(folder)
    with locked(folder):
        plan = _plan(shards, job, folder)
        bcast_bytes(comm, msgspec.json.encode(plan))
        _scan_share(job, plan, folder, comm, progress)
        report = _finish(config, job, plan, began)
        shutil.rmtree(folder)
    bcast_bytes(comm, msgspec.json.encode(report))
    return report


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PropertyIndexError(
            f"The index cannot be written to {folder.parent}: {error.strerror}.\n  Set index.path to a place you can write to."
        ) from None


def _plan(shards: list[Shard], job: ScanJob, folder: Path) -> _Plan:
    """Units, and which of them an earlier attempt has finished."""
    units = [
        (i, unit.start, unit.stop)
        for i, shard in enumerate(shards)
        for unit in load_format(shard.format).units(job.root / shard.path, shard.size_bytes)
    ]
    tokenizer = job.tokenizer.fingerprint if job.tokenizer else None
    described = msgspec.json.encode([VERSION, shards, units, job.fields, job.block_rows, tokenizer])
    key = hashlib.blake2b(described, digest_size=16).hexdigest()
    found = _resumable(folder, key)
    attempt = 1 + max((int(p.stem.split("-")[0]) for p in folder.glob("*.parts")), default=0)
    return _Plan(shards=shards, units=units, key=key, done=sorted(found), attempt=attempt)


def _resumable(folder: Path, key: str) -> dict[int, PartRecord]:
    """Parts of an earlier attempt at the very same build; others are removed."""
    marker = folder / "key"
    if marker.exists() and marker.read_text() == key:
        return recover_parts(folder)
    for path in folder.glob("*.parts"):
        path.unlink()
    marker.write_text(key)
    return {}


def _scan_share(
    job: ScanJob, plan: _Plan, folder: Path, comm: Communicator, progress: Callable[[BuildProgress], None] | None
) -> None:
    """Scan this rank's share of the units that are missing. **Collective.**"""
    done = set(plan.done)
    share = [i for i in range(len(plan.units)) if i not in done][comm.rank :: comm.size]
    total, finished, rows = sum(_size(plan, i) for i in share), 0, 0
    log = PartLog(folder, f"{plan.attempt:03d}-{comm.rank:05d}")
    for i in share:
        shard, start, stop = plan.units[i]
        part = scan_unit(job, plan.shards[shard], Unit(start, stop))
        log.append(i, part)
        finished, rows = finished + _size(plan, i), rows + part.num_rows
        if progress:
            progress(BuildProgress(rows=rows, bytes_done=finished, bytes_total=total))
    log.close()
    comm.Barrier()


def _size(plan: _Plan, unit: int) -> int:
    _, start, stop = plan.units[unit]
    return stop - start


def _finish(config: Config, job: ScanJob, plan: _Plan, began: float) -> BuildReport:
    """Rank 0's part: merge, write, publish."""
    path = Path(config.index.path)
    folder = building_folder(path)
    found = find_parts(folder)
    missing = [i for i in range(len(plan.units)) if i not in found]
    if missing:
        raise PropertyIndexError(
            f"{len(missing)} scanned parts cannot be read back from {folder}. Build the index again."
        )
    records = [found[i] for i in range(len(plan.units))]
    if not any(record.num_rows for record in records):
        raise DataError(f"The {len(plan.shards)} shards below {config.data.root} hold no rows.")
    merged = merge(job.fields.properties, records, np.array([shard for shard, _, _ in plan.units], np.int64))
    facts = IndexFacts(
        data_root=str(job.root.resolve()),
        text=config.data.text,
        parser=job.fields.parser.path if job.fields.parser else None,
        tokenizer=job.tokenizer.fingerprint if job.tokenizer else None,
    )
    shards = _shard_table(job, plan, records)
    part = folder / "index.h5"
    fingerprint = write_index(part, facts, shards, merged, merged.samples(records))
    publish(part, path)
    return BuildReport(
        path=str(path),
        fingerprint=fingerprint,
        shards=len(plan.shards),
        samples=int(shards.rows.sum()),
        tokens=int(merged.blocks.tokens.sum()) if job.tokenizer else None,
        blocks=len(merged.blocks),
        combos=merged.combos.num_combos,
        bytes_read=sum(_size(plan, i) for i in range(len(plan.units)) if i not in set(plan.done)),
        index_bytes=path.stat().st_size,
        units=len(plan.units),
        resumed_units=len(plan.done),
        elapsed_s=time.monotonic() - began,
        empty_properties=_empty(merged),
    )


def _shard_table(job: ScanJob, plan: _Plan, records: list[PartRecord]) -> ShardTable:
    rows = np.zeros(len(plan.shards), np.int64)
    fingerprints = {
        i: fingerprint_of_shard(job.root / s.path, 0) for i, s in enumerate(plan.shards) if not s.size_bytes
    }
    for (shard, start, _), record in zip(plan.units, records, strict=True):
        rows[shard] += record.num_rows
        if start == 0:
            fingerprints[shard] = record.fingerprint
    return ShardTable(
        path=tuple(s.path for s in plan.shards),
        format=tuple(s.format for s in plan.shards),
        rows=rows,
        size_bytes=np.array([s.size_bytes for s in plan.shards], np.int64),
        mtime_ns=np.array([s.mtime_ns for s in plan.shards], np.int64),
        fingerprint=tuple(fingerprints[i] for i in range(len(plan.shards))),
    )


def _empty(merged: Merged) -> tuple[str, ...]:
    zones = merged.blocks.zones
    return tuple(
        p.name
        for p in merged.properties.values()
        if (np.isnan(zones[p.name].low).all() if p.name in zones else not p.values)
    )
