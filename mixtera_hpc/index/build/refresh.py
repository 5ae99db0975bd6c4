"""Bring an index up to date with its shards: new ones are added, gone ones dropped, changed ones scanned again.

Unchanged shards are not opened. They come first, in the order they had, with the combos numbered as they were; new and changed
ones follow, sorted. So an index to which shards were only added begins with all it was before, and says so: every such earlier
state is a *generation*, known by its fingerprint, and `index.generation` makes a run see that state and nothing else. Dropping
a shard ends all generations that had it. Price: the whole file is written again; a shard is compared by size and time of change.
"""

import time
from dataclasses import dataclass, replace

import numpy as np

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.index.build.assemble import BuildReport, BuildRequest, ReusedShards, assemble_index, property_sources
from mixtera_hpc.index.build.build import plan_shards, scan_settings, shard_scan_job
from mixtera_hpc.index.build.discover import Shard, discover_shards
from mixtera_hpc.index.build.index_job import ScanPlan, UnitRecords, run_index_job
from mixtera_hpc.index.build.stored_blocks import StoredBlocks, block_ranges, combo_values
from mixtera_hpc.index.read.open import PropertyIndex, open_index
from mixtera_hpc.index.scan.parallel_scan import ProgressCallback
from mixtera_hpc.index.scan.unit_scan import ScanSettings

__all__ = ["RefreshReport", "refresh_index"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshReport:
    """What a refresh found and did."""

    unchanged: int
    """Shards that have not changed."""
    added: tuple[str, ...]
    changed: tuple[str, ...]
    deleted: tuple[str, ...]
    generations: tuple[str, ...]
    """Fingerprints of the earlier states that runs can go on with."""
    build: BuildReport | None
    """None when nothing had changed: the file was left as it was."""


@dataclass(frozen=True, slots=True)
class _ShardChanges:
    """What became of the shards of an index."""

    kept: list[int]
    """Positions in the index, ascending."""
    added: list[Shard]
    changed: list[Shard]
    deleted: list[str]


def refresh_index(
    config: Config, comm: Communicator | None = None, progress: ProgressCallback | None = None
) -> RefreshReport:
    """Refresh `config.index.path`, which was built with the same settings. **Collective.**

    Raises:
        PropertyIndexError: there is no index, or it was built with other settings.
        ConfigError, DataError: as for `build_index`.
    """
    comm, began, job = comm or Local(), time.monotonic(), scan_settings(config)
    opened: list[_OpenedIndex] = []  # On rank 0, by `plan`.

    def plan() -> ScanPlan:
        index = open_index(config.index.path, {name: str(root) for name, root in job.roots.items()})
        _check_settings(index, config, job)
        difference = _difference(index, discover_shards(config.data))
        opened.append(_OpenedIndex(index, difference, began))
        new = sorted([*difference.added, *difference.changed], key=lambda shard: (shard.dataset, shard.path))
        return plan_shards(job, [*(_stored(index, i) for i in difference.kept), *new], first=len(difference.kept))

    def end(made: ScanPlan, records: UnitRecords) -> RefreshReport:
        (old,) = opened
        with old.index:
            return _end(config, job, made, records, old)

    return run_index_job(shard_scan_job(config, job), comm, plan, end, RefreshReport, progress)


@dataclass(frozen=True, slots=True)
class _OpenedIndex:
    """What is refreshed."""

    index: PropertyIndex
    difference: _ShardChanges
    began_s: float
    """Of the monotonic clock."""


def _end(config: Config, job: ScanSettings, plan: ScanPlan, records: UnitRecords, old: _OpenedIndex) -> RefreshReport:
    difference = old.difference
    kept, report = _kept(old.index, difference), None
    if difference.added or difference.changed or difference.deleted:
        report = assemble_index(BuildRequest(config, job, old.began_s), plan, records, kept)
    return RefreshReport(
        unchanged=len(difference.kept),
        added=tuple(shard.path for shard in difference.added),
        changed=tuple(shard.path for shard in difference.changed),
        deleted=tuple(difference.deleted),
        generations=tuple(generation.fingerprint for generation in kept.generations),
        build=report,
    )


def _check_settings(index: PropertyIndex, config: Config, job: ScanSettings) -> None:
    """Refuse to scan some shards differently from the others."""
    tokenizer = job.tokenizer.fingerprint if job.tokenizer else None
    kinds = {field.name: str(field.kind) for field in job.properties}
    wanted = {name: f"{kinds[name]} {source}" for name, source in property_sources(job).items()}
    stored = {name: f"{prop.kind} {index.sources[name]}" for name, prop in index.tables.properties.items()}
    pairs = [("data.text", index.text, config.data.text), ("the tokenizer", index.tokenizer_fingerprint, tokenizer)]
    pairs.append(("data.parser", index.parser, job.fields.parser.path if job.fields.parser else None))
    pairs += [(f"data.properties.{name}", stored.get(name), wanted.get(name)) for name in sorted(stored | wanted)]
    differing = [f"\n  - {name}: {was} in the index, {now} now" for name, was, now in pairs if was != now]
    if differing:
        raise PropertyIndexError(
            f"{index.path} was made with other settings:{''.join(differing)}\n  Refresh it with the settings it has, add "
            "properties of documents with mixtera-hpc index derive, or build it again."
        )


def _difference(index: PropertyIndex, found: list[Shard]) -> _ShardChanges:
    shards = [_stored(index, number) for number in range(len(index.tables.shards.path))]
    now = {(shard.dataset, shard.path): shard for shard in found}
    before = {(shard.dataset, shard.path): shard for shard in shards}
    return _ShardChanges(
        kept=[i for i, shard in enumerate(shards) if now.get((shard.dataset, shard.path)) == shard],
        added=[shard for key, shard in now.items() if key not in before],
        changed=[shard for key, shard in now.items() if key in before and before[key] != shard],
        deleted=[shard.path for key, shard in before.items() if key not in now],
    )


def _stored(index: PropertyIndex, number: int) -> Shard:
    shards = index.tables.shards
    return Shard(
        path=shards.path[number],
        format=shards.format[number],
        size_bytes=int(shards.size_bytes[number]),
        mtime_ns=int(shards.mtime_ns[number]),
        dataset=shards.dataset[number] if shards.dataset else "",
    )


def _kept(index: PropertyIndex, difference: _ShardChanges) -> ReusedShards:
    """What of the index stays, in its new numbers."""
    tables, kept = index.tables, np.array(difference.kept, np.int64)
    position = np.full(len(tables.shards.path), -1, np.int64)
    position[kept] = np.arange(len(kept))
    shard_of_block = position[tables.blocks.shard]
    combos = combo_values(tables.combos)
    prefix = int(np.argmax(np.append(position, -1) < 0))
    return ReusedShards(
        rows=tables.shards.rows[kept].tolist(),
        fingerprints=[tables.shards.fingerprint[i] for i in difference.kept],
        pieces=[
            (shard_of_block[first:last], StoredBlocks(index, combos, first, last))
            for first, last in block_ranges(index, np.flatnonzero(shard_of_block >= 0))
        ],
        combos=combos,
        bad=[replace(b, shard=int(position[b.shard])) for b in index.bad if position[b.shard] >= 0],
        generations=[generation for generation in index.generations if generation.shards <= prefix],
        chunk_rows=index.chunk_rows,
    )
