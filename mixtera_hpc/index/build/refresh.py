"""Bring an index up to date with its shards: new shards are added, deleted ones dropped, changed ones scanned again.

Unchanged shards are not opened. They come first, in the order they had, and combos keep their numbers. New and changed
shards follow, sorted. So an index to which shards were only added begins with everything it contained before. Each such
earlier state is a *generation*, identified by its fingerprint, and `index.generations` makes a run read that state and
nothing else. Dropping a shard ends all generations that contained it. Price: the whole file is written again.

A shard is compared by size and modification time. Where only the time differs, its fingerprint decides (two reads of
1 MiB): a copy or a purge of a scratch file system gives files new times. If the content is the same, the index gets the
new time and keeps its fingerprint and generations, so that saved states stay valid.
"""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.index.build.assemble import (
    BuildReport,
    BuildRequest,
    ReusedShards,
    assemble_index,
    data_set_facts,
)
from mixtera_hpc.index.build.build import plan_shards, scan_settings, shard_scan_job
from mixtera_hpc.index.build.discover import discover_shards
from mixtera_hpc.index.build.index_job import ScanPlan, UnitRecords, follow_index_job, lead_index_job
from mixtera_hpc.index.build.publish import renew_modification_times
from mixtera_hpc.index.build.stored_blocks import StoredBlocks, block_ranges, combo_values
from mixtera_hpc.index.build.stores.store_maker import AnnounceStore, StoreMaker
from mixtera_hpc.index.data_sets import data_set_key
from mixtera_hpc.index.read.open import PropertyIndex, open_index
from mixtera_hpc.index.row_store.row_job import RowReport
from mixtera_hpc.index.scan.parallel_scan import ProgressCallback
from mixtera_hpc.index.scan.unit_scan import ScanSettings
from mixtera_hpc.index.shards import Shard, fingerprint_of_shard
from mixtera_hpc.index.token_store.store_job import StoreReport
from mixtera_hpc.index.token_store.store_state import KeptRows
from mixtera_hpc.tokens.slow_encoding import warn_of_slow_encoding

__all__ = ["RefreshReport", "refresh_index"]

READ_THREADS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshReport:
    """Results of a refresh."""

    unchanged: int
    """Shards that have not changed."""
    added: tuple[str, ...]
    changed: tuple[str, ...]
    touched: tuple[str, ...]
    """Shards with the same content but another modification time, which the index has now."""
    deleted: tuple[str, ...]
    generations: tuple[str, ...]
    """Fingerprints of the earlier states that runs can continue with."""
    build: BuildReport | None
    """None if no content has changed; no sample is written again then."""
    token_store: StoreReport | None = None
    """The token store that was extended, if there is one."""
    row_store: RowReport | None = None
    """The row store that was extended, if there is one."""


@dataclass(frozen=True, slots=True)
class _ShardChanges:
    """Differences between the shards of an index and those on disk."""

    unchanged: list[int]
    """Positions in the index, ascending."""
    touched: dict[int, Shard]
    """The unchanged shards that have another modification time: position in the index → shard."""
    added: list[Shard]
    changed: list[Shard]
    deleted: list[str]

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.deleted)


def refresh_index(
    config: Config,
    comm: Communicator | None = None,
    progress: ProgressCallback | None = None,
    announce: AnnounceStore | None = None,
) -> RefreshReport:
    """Refresh `config.index.path`, which was built with the same settings. **Collective.**

    Args:
        config: as for `build_index`.
        comm: the ranks that share the work; None for this process alone.
        progress: called on rank 0 while units are scanned.
        announce: called on rank 0 before a token store of the index is extended; None leaves it as it is.

    Raises:
        PropertyIndexError: there is no index, or it was built with other settings.
        ConfigError, DataError: as for `build_index`.
    """
    comm = comm or Local()
    request = BuildRequest(config=config, settings=scan_settings(config), began_s=time.monotonic())
    settings = request.settings
    maker = None
    if announce is not None:
        maker = StoreMaker(config, settings.tokenizer, comm, announce, progress, only_existing=True)
    job = shard_scan_job(config, settings, maker)
    if comm.rank > 0:
        return _with_store(follow_index_job(job, comm, RefreshReport), maker)

    warn_of_slow_encoding(settings.tokenizer)
    # The shards may have moved since the build; only the configured folders count.
    roots = {name: str(root) for name, root in settings.roots.items()}
    with open_index(config.index.path, roots, max_bytes=config.data.largest_block_bytes()) as index:
        _check_settings(index, request)
        # Compared before the lock is taken: another build in progress fails at the lock.
        changes = _compare_shards(index, discover_shards(config.data), settings.roots)
        if maker is not None:
            maker.kept = _kept_rows(index, changes)

        def finish(plan: ScanPlan, records: UnitRecords) -> RefreshReport:
            return _finish(request, index, changes, plan, records)

        plan = _plan_changes(settings, index, changes)
        return _with_store(lead_index_job(job, plan, comm, finish, progress), maker)


def _with_store(report: RefreshReport, maker: StoreMaker | None) -> RefreshReport:
    return report if maker is None else replace(report, token_store=maker.tokens, row_store=maker.rows)


def _kept_rows(index: PropertyIndex, changes: _ShardChanges) -> KeptRows:
    """Return which rows of the index come first in the new one."""
    blocks = index.tables.blocks
    kept = np.flatnonzero(np.isin(blocks.shard, changes.unchanged))
    first_rows = np.concatenate([[0], np.cumsum(blocks.rows, dtype=np.int64)])
    rows = [(int(first_rows[first]), int(first_rows[last])) for first, last in block_ranges(index, kept)]
    return KeptRows(index=index.fingerprint, rows=rows, blocks=len(kept))


def _plan_changes(settings: ScanSettings, index: PropertyIndex, changes: _ShardChanges) -> ScanPlan:
    """Plan the new index: unchanged shards first, which are not scanned; then the others, sorted."""
    unchanged = [changes.touched.get(number) or _stored_shard(index, number) for number in changes.unchanged]
    others = sorted([*changes.added, *changes.changed], key=lambda shard: (shard.dataset, shard.path))
    return plan_shards(settings, [*unchanged, *others], first=len(unchanged))


def _finish(
    request: BuildRequest, index: PropertyIndex, changes: _ShardChanges, plan: ScanPlan, records: UnitRecords
) -> RefreshReport:
    reused = _reused_shards(index, changes)
    build = assemble_index(request, plan, records, reused) if changes else None
    if build is None and changes.touched:
        renew_modification_times(index.path, np.array([shard.mtime_ns for shard in plan.shards], np.int64))
    return RefreshReport(
        unchanged=len(changes.unchanged),
        added=tuple(shard.path for shard in changes.added),
        changed=tuple(shard.path for shard in changes.changed),
        touched=tuple(shard.path for shard in changes.touched.values()),
        deleted=tuple(changes.deleted),
        generations=tuple(generation.fingerprint for generation in reused.generations),
        build=build,
    )


def _check_settings(index: PropertyIndex, request: BuildRequest) -> None:
    """Refuse to scan some shards with other settings than the rest.

    Raises:
        PropertyIndexError: names every setting that differs.
    """
    settings = request.settings
    tokenizer = settings.tokenizer.fingerprint if settings.tokenizer else None
    pairs: list[tuple[str, str | None, str | None]] = [("the tokenizer", index.tokenizer_fingerprint, tokenizer)]
    kinds = {field.name: str(field.kind) for field in settings.properties}
    stored_kinds = {name: str(prop.kind) for name, prop in index.tables.properties.items()}
    # The names of the data sets were compared when the index was opened.
    for dataset, given in data_set_facts(settings).items():
        stored = index.sets[dataset]
        pairs.append((data_set_key(dataset, "text"), stored.text, given.text))
        pairs.append((data_set_key(dataset, "parser"), stored.parser, given.parser))
        # A property is the same if its kind and its source are.
        before = {name: f"{stored_kinds[name]} {source}" for name, source in stored.sources.items()}
        now = {name: f"{kinds[name]} {source}" for name, source in given.sources.items()}
        pairs += [
            (data_set_key(dataset, f"properties.{name}"), before.get(name), now.get(name))
            for name in sorted(before | now)
        ]
    differing = [f"\n  - {name}: {was} in the index, {now} now" for name, was, now in pairs if was != now]
    if differing:
        raise PropertyIndexError(
            f"{index.path} was built with other settings:{''.join(differing)}\n  Refresh it with the settings of the "
            "build, add properties of documents with mixtera-hpc index derive, or rebuild the index."
        )


def _compare_shards(index: PropertyIndex, on_disk: list[Shard], roots: Mapping[str, Path]) -> _ShardChanges:
    stored = [_stored_shard(index, number) for number in range(len(index.tables.shards.path))]
    # Equal paths may occur in different data sets.
    now = {(shard.dataset, shard.path): shard for shard in on_disk}
    before = {(shard.dataset, shard.path): shard for shard in stored}
    # Equality covers path, format, size and modification time.
    differing = {
        i: now[shard.dataset, shard.path]
        for i, shard in enumerate(stored)
        if now.get((shard.dataset, shard.path), shard) != shard
    }
    touched = _touched_shards(index, stored, differing, roots)
    changed = [shard for i, shard in differing.items() if i not in touched]
    changed_keys = {(shard.dataset, shard.path) for shard in changed}
    return _ShardChanges(
        unchanged=[i for i, shard in enumerate(stored) if (shard.dataset, shard.path) in now.keys() - changed_keys],
        touched=touched,
        added=[shard for key, shard in now.items() if key not in before],
        changed=sorted(changed, key=lambda shard: (shard.dataset, shard.path)),
        deleted=[shard.path for key, shard in before.items() if key not in now],
    )


def _touched_shards(
    index: PropertyIndex, stored: list[Shard], differing: Mapping[int, Shard], roots: Mapping[str, Path]
) -> dict[int, Shard]:
    """Return those of the differing shards that have the indexed content, and only another modification time."""
    candidates = {
        i: shard for i, shard in differing.items() if replace(shard, mtime_ns=stored[i].mtime_ns) == stored[i]
    }

    def has_indexed_content(number: int) -> bool:
        shard = candidates[number]
        return fingerprint_of_shard(shard.below(roots), shard.size_bytes) == index.tables.shards.fingerprint[number]

    # On a parallel file system a read mostly waits.
    with ThreadPoolExecutor(READ_THREADS) as pool:
        is_same = dict(zip(candidates, pool.map(has_indexed_content, candidates), strict=True))
    return {i: shard for i, shard in candidates.items() if is_same[i]}


def _stored_shard(index: PropertyIndex, number: int) -> Shard:
    shards = index.tables.shards
    return Shard(
        path=shards.path[number],
        format=shards.format[number],
        size_bytes=int(shards.size_bytes[number]),
        mtime_ns=int(shards.mtime_ns[number]),
        dataset=shards.dataset[number] if shards.dataset else "",
    )


def _reused_shards(index: PropertyIndex, changes: _ShardChanges) -> ReusedShards:
    """Return what the new index takes from the old one, with the new shard positions."""
    tables = index.tables
    unchanged = np.array(changes.unchanged, np.int64)
    new_position = np.full(len(tables.shards.path), -1, np.int64)  # Old position → new one, -1 for dropped shards.
    new_position[unchanged] = np.arange(len(unchanged))
    shard_of_block = new_position[tables.blocks.shard]
    reused_blocks = np.flatnonzero(shard_of_block >= 0)
    combos = combo_values(tables.combos)
    # A generation survives if all its shards are unchanged, that is, if it ends before the first dropped shard.
    num_before_dropped = int(np.argmax(np.append(new_position, -1) < 0))
    return ReusedShards(
        rows=tables.shards.rows[unchanged].tolist(),
        fingerprints=[tables.shards.fingerprint[i] for i in changes.unchanged],
        blocks=[
            (shard_of_block[first:last], StoredBlocks(index, combos, first, last))
            for first, last in block_ranges(index, reused_blocks)
        ],
        combos=combos,
        bad=[replace(rows, shard=int(new_position[rows.shard])) for rows in index.bad if new_position[rows.shard] >= 0],
        generations=[generation for generation in index.generations if generation.shards <= num_before_dropped],
        chunk_rows=index.chunk_rows,
    )
