"""Assemble an index on rank 0, from scan results and from the shards that a refresh reuses of the older index."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.index_tables import ShardTable
from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.batching.row_paths import check_path_forms
from mixtera_hpc.formats.chat_rows import is_chat, stored_chat_text
from mixtera_hpc.formats.composed_text import FUNCTION_PREFIX
from mixtera_hpc.index.build.index_job import ScanPlan, UnitRecords
from mixtera_hpc.index.build.merge import MergedTables, PlacedSource, merge_results
from mixtera_hpc.index.build.publish import IndexFacts, PublishedIndex, publish_index
from mixtera_hpc.index.data_sets import DataSetFacts
from mixtera_hpc.index.layout import DATASET, BadRows, Generation, bucket_source, function_source, path_source
from mixtera_hpc.index.row_store.row_job import RowReport
from mixtera_hpc.index.scan.scan_result import Combo
from mixtera_hpc.index.scan.unit_scan import DataSetScan, ScanSettings
from mixtera_hpc.index.shards import Shard
from mixtera_hpc.index.token_store.store_job import StoreReport

__all__ = [
    "BuildReport",
    "BuildRequest",
    "ReusedShards",
    "assemble_index",
    "data_set_facts",
    "placed_records",
    "sources_of",
]

MAX_LISTED = 5
"""Reasons that an error message lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """Results of a build."""

    path: str
    fingerprint: str
    shards: int
    samples: int
    """Rows that can be read."""
    tokens: int | None
    """None if tokens were not counted."""
    blocks: int
    combos: int
    bytes_read: int
    """Bytes read of the shards."""
    index_bytes: int
    """Size of the index."""
    units: int
    resumed_units: int
    """Units taken from the logs of an interrupted build."""
    elapsed_s: float
    finish_s: float
    """The part of `elapsed_s` in which rank 0 merged and wrote."""
    empty_properties: tuple[str, ...]
    """Properties that no sample has, most often because of a typing error in a path."""
    bad_rows: int
    """Rows that were skipped because they cannot be read."""
    damaged_shards: int
    """Shards whose end was skipped."""
    null_shares: dict[str, dict[str, float]]
    """Data set → property → share of its rows without a value, from 0 to 1."""
    empty_shards: tuple[str, ...]
    """Paths of the shards without rows."""
    token_store: StoreReport | None = None
    """The token store that was written too, if any."""
    row_store: RowReport | None = None
    """The row store that was written too, if any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReusedShards:
    """Data that a refreshed index takes from the older one: the unchanged shards, which come first."""

    rows: Sequence[int] = ()
    """Number of rows of every reused shard."""
    fingerprints: Sequence[str] = ()
    """Fingerprint of every reused shard."""
    blocks: Sequence[PlacedSource] = ()
    combos: Sequence[Combo | None] = ()
    """All combos of the older index, by number."""
    bad: Sequence[BadRows] = ()
    generations: Sequence[Generation] = ()
    chunk_rows: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """The settings of a build."""

    config: Config
    settings: ScanSettings
    began_s: float
    """Start, in seconds of the monotonic clock."""


def assemble_index(
    request: BuildRequest, plan: ScanPlan, records: UnitRecords, reused: ReusedShards | None = None
) -> BuildReport:
    """Merge all results, and write and publish the index.

    Raises:
        DataError: a data set has no row that can be read.
    """
    began_s = time.monotonic()
    reused = reused or ReusedShards()
    settings = request.settings
    # Index order: reused shards come first, and units are numbered in the order of shards and bytes.
    sources = [*reused.blocks, *placed_records(plan, records)]
    merged = merge_results(settings.properties, sources, reused.combos, reused.chunk_rows)
    shards, bad = _shard_table(settings, plan, records, reused)

    # Check before the old index is replaced.
    _check_rows(settings, shards, bad)

    tokenizer = settings.tokenizer
    facts = IndexFacts(
        sets=data_set_facts(settings),
        tokenizer=tokenizer.fingerprint if tokenizer else None,
        bad=tuple(bad),
        generations=tuple(reused.generations),
    )
    published = publish_index(Path(request.config.index.path), facts, shards, merged, sources)
    return _report(request, plan, merged, shards, bad, published, began_s)


def placed_records(plan: ScanPlan, records: UnitRecords) -> list[PlacedSource]:
    """Return all logged results in index order, each with the position of its shard."""
    return [(plan.units[unit][0], record) for unit in sorted(records) for record in records[unit]]


def data_set_facts(settings: ScanSettings) -> dict[str, DataSetFacts]:
    """Return what the index stores about each data set."""
    return {name: _facts_of(name, data_set) for name, data_set in settings.sets.items()}


def _facts_of(name: str, data_set: DataSetScan) -> DataSetFacts:
    spec = data_set.spec
    # The built-in property `dataset` is its own source.
    sources = {DATASET: DATASET} if name else {}
    sources |= sources_of(data_set)
    return DataSetFacts(
        root=str(data_set.root.resolve()),
        text=stored_chat_text(spec.text, spec.chat) if spec.text is not None and is_chat(spec.text) else spec.text,
        text_digest=spec.text_digest if (spec.text or "").startswith(FUNCTION_PREFIX) else "",
        parser=spec.parser.path if spec.parser else None,
        sources=dict(sorted(sources.items())),
    )


def sources_of(data_set: DataSetScan) -> dict[str, str]:
    """Return where the values of each property of a data set come from, as the index stores it."""
    sources = {field.name: path_source(field.path, field.pattern) for field in data_set.spec.properties}
    sources |= {f.field.name: function_source(f.field.path, f.over_rows) for f in data_set.computed.functions}
    return sources | {b.field.name: bucket_source(b.field.path, b.bounds) for b in data_set.computed.buckets}


def _report(
    request: BuildRequest,
    plan: ScanPlan,
    merged: MergedTables,
    shards: ShardTable,
    bad: Sequence[BadRows],
    published: PublishedIndex,
    began_s: float,
) -> BuildReport:
    path = Path(request.config.index.path)
    now = time.monotonic()
    return BuildReport(
        path=str(path),
        fingerprint=published.fingerprint,
        shards=len(plan.shards),
        samples=merged.rows - merged.bad_rows,
        tokens=published.tokens if request.settings.tokenizer else None,
        blocks=merged.blocks,
        combos=merged.combos.num_combos,
        bytes_read=plan.missing_bytes,
        index_bytes=path.stat().st_size,
        units=len(plan.units),
        resumed_units=len(plan.done),
        elapsed_s=now - request.began_s,
        finish_s=now - began_s,
        empty_properties=published.empty_properties,
        bad_rows=merged.bad_rows,
        damaged_shards=len({rows.shard for rows in bad if not rows.rows}),
        null_shares=published.null_shares,
        empty_shards=tuple(shards.path[i] for i in np.flatnonzero(shards.rows == 0).tolist()),
    )


def _check_rows(settings: ScanSettings, shards: ShardTable, bad: Sequence[BadRows]) -> None:
    """Refuse a data set without a row that can be read: it would be missing from every mixture without a word."""
    readable = np.array(shards.rows, np.int64)
    for rows in bad:
        readable[rows.shard] -= rows.rows
    names = np.array(shards.dataset)
    for name in settings.sets:
        own = np.flatnonzero(names == name)
        if not readable[own].sum():
            raise _no_rows(settings, name, shards, [rows for rows in bad if rows.shard in own])


def _no_rows(settings: ScanSettings, name: str, shards: ShardTable, bad: Sequence[BadRows]) -> DataError:
    """Return the error for a data set without a readable row, with some of the reasons."""
    count = shards.dataset.count(name)
    data_set = f" of data.sets.{name}" if name else ""
    where = f"The {count} shards{data_set} below {settings.roots[name]} hold no rows"
    if not bad:
        return DataError(f"{where}.\n  Set data.root and data.include to files that have some.")
    reasons = [f"\n    {shards.path[b.shard]}: {b.rows or 'the rest'}, {b.reason}" for b in bad[:MAX_LISTED]]
    return DataError(
        f"{where} that can be read:{''.join(reasons)}\n"
        "  Do data.text and data.properties name fields that the rows have? See docs/formats.md."
    )


def _shard_table(
    settings: ScanSettings, plan: ScanPlan, records: UnitRecords, reused: ReusedShards
) -> tuple[ShardTable, list[BadRows]]:
    """Return the table of all shards, and what was skipped of each. Reads the header of every record."""
    rows = np.zeros(len(plan.shards), np.int64)
    # Reused shards have no records; their rows are known from the older index.
    rows[: len(reused.rows)] = reused.rows
    fingerprints = dict(enumerate(reused.fingerprints))
    skipped: Counter[tuple[int, str]] = Counter()
    path_forms: dict[int, dict[str, set[int]]] = {}
    for unit in sorted(records):
        shard = plan.units[unit][0]
        for record in records[unit]:
            header = record.header()
            rows[shard] += header.summary.rows
            if header.fingerprint:
                fingerprints[shard] = header.fingerprint
            for path, forms in header.path_forms.items():
                path_forms.setdefault(shard, {}).setdefault(path, set()).update(forms)
            for reason, number in header.reasons.items():
                skipped[(shard, reason)] += number

    # A unit checks its own rows; here all units of a shard are compared.
    for shard, used in path_forms.items():
        check_path_forms(plan.shards[shard].below(settings.roots), used)

    # Sorted, so that the order of the records does not show in the file.
    bad = [BadRows(shard=shard, reason=reason, rows=number) for (shard, reason), number in sorted(skipped.items())]
    return _table_of(plan.shards, rows, [fingerprints[i] for i in range(len(plan.shards))]), [*reused.bad, *bad]


def _table_of(shards: Sequence[Shard], rows: NDArray[np.int64], fingerprints: Sequence[str]) -> ShardTable:
    return ShardTable(
        path=tuple(shard.path for shard in shards),
        format=tuple(shard.format for shard in shards),
        rows=rows,
        size_bytes=np.array([shard.size_bytes for shard in shards], np.int64),
        mtime_ns=np.array([shard.mtime_ns for shard in shards], np.int64),
        fingerprint=tuple(fingerprints),
        dataset=tuple(shard.dataset for shard in shards),
    )
