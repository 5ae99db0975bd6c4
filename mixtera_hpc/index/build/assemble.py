"""Rank 0's last part: what was scanned, and what an older index is taken over of it, becomes the file."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.index_tables import ShardTable
from mixtera_hpc.errors import DataError
from mixtera_hpc.index.build.discover import fingerprint_of_shard
from mixtera_hpc.index.build.index_job import ScanPlan, UnitRecords
from mixtera_hpc.index.build.merge import PlacedSource, merge_results
from mixtera_hpc.index.build.publish import IndexFacts, publish_index
from mixtera_hpc.index.layout import BadRows, Generation, path_source
from mixtera_hpc.index.scan.scan_result import Combo
from mixtera_hpc.index.scan.unit_scan import ScanSettings

__all__ = ["BuildReport", "BuildRequest", "ReusedShards", "assemble_index", "property_sources"]

NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """What a build did."""

    path: str
    fingerprint: str
    shards: int
    samples: int
    """Those that can be read."""
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
    finish_s: float
    """Of these, the part in which rank 0 merged and wrote."""
    empty_properties: tuple[str, ...]
    """Properties that no sample has: most often a path with a typing error."""
    bad_rows: int
    """Rows that cannot be read, and were skipped."""
    damaged_shards: int
    """Shards that were left out from some place on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReusedShards:
    """What a new file takes over from an older one: the shards it begins with."""

    rows: Sequence[int] = ()
    """Of every shard."""
    fingerprints: Sequence[str] = ()
    pieces: Sequence[PlacedSource] = ()
    combos: Sequence[Combo | None] = ()
    bad: Sequence[BadRows] = ()
    generations: Sequence[Generation] = ()
    chunk_rows: int = 0


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """What was asked for, and when."""

    config: Config
    job: ScanSettings
    began_s: float
    """Of the monotonic clock."""


def assemble_index(
    asked: BuildRequest, plan: ScanPlan, records: UnitRecords, kept: ReusedShards = ReusedShards()
) -> BuildReport:
    """Merge, write, publish.

    Raises:
        DataError: there are no rows.
    """
    config, job, started = asked.config, asked.job, time.monotonic()
    path = Path(config.index.path)
    new = [(plan.units[unit][0], record) for unit in sorted(records) for record in records[unit]]
    pieces: list[PlacedSource] = [*kept.pieces, *new]
    merged = merge_results(job.properties, pieces, kept.combos, kept.chunk_rows)
    shards, bad = _shards(job, plan, records, kept)
    if merged.rows == merged.bad_rows:
        raise _no_rows(job, shards, bad)
    facts = IndexFacts(
        roots={name: str(root.resolve()) for name, root in job.roots.items()},
        text=config.data.text,
        tokenizer=job.tokenizer.fingerprint if job.tokenizer else None,
        parser=job.fields.parser.path if job.fields.parser else None,
        sources=property_sources(job),
        bad=tuple(bad),
        generations=tuple(kept.generations),
    )
    written = publish_index(path, facts, shards, merged, pieces)
    now = time.monotonic()
    return BuildReport(
        path=str(path),
        fingerprint=written.fingerprint,
        shards=len(plan.shards),
        samples=merged.rows - merged.bad_rows,
        tokens=written.tokens if job.tokenizer else None,
        blocks=merged.blocks,
        combos=merged.combos.num_combos,
        bytes_read=plan.missing_bytes,
        index_bytes=path.stat().st_size,
        units=len(plan.units),
        resumed_units=len(plan.done),
        elapsed_s=now - asked.began_s,
        finish_s=now - started,
        empty_properties=written.empty_properties,
        bad_rows=merged.bad_rows,
        damaged_shards=len({b.shard for b in bad if not b.rows}),
    )


def _no_rows(job: ScanSettings, shards: ShardTable, bad: Sequence[BadRows]) -> DataError:
    """The error for shards of which nothing can be read, with some of the reasons."""
    where = f"The {len(shards.path)} shards below {', '.join(map(str, job.roots.values()))} hold no rows"
    if not bad:
        return DataError(f"{where}.\n  Set data.root and data.include to files that have some.")
    listed = "".join(f"\n    {shards.path[b.shard]}: {b.rows or 'the rest'}, {b.reason}" for b in bad[:NAMED])
    return DataError(
        f"{where} that can be read:{listed}\n  Do data.text and data.properties name what the rows have? See docs/formats.md."
    )


def property_sources(job: ScanSettings) -> dict[str, str]:
    """Property → where its values come from, as the index stores it."""
    found = {f.name: path_source(f.path, f.pattern) for f in job.fields.properties}
    found |= {field.name: f"function:{field.path}" for field in job.functions.fields}
    return {field.name: found.get(field.name, field.name) for field in job.properties}


def _shards(
    job: ScanSettings, plan: ScanPlan, records: UnitRecords, kept: ReusedShards
) -> tuple[ShardTable, list[BadRows]]:
    """The table of all shards, and what was skipped of each; parts are looked at once more for what they say of theirs."""
    rows = np.zeros(len(plan.shards), np.int64)
    rows[: len(kept.rows)] = kept.rows
    fingerprints = dict(enumerate(kept.fingerprints))
    bad: Counter[tuple[int, str]] = Counter()
    for unit in sorted(records):
        shard = plan.units[unit][0]
        for record in records[unit]:
            header = record.header()
            rows[shard] += header.summary.rows
            if header.fingerprint:
                fingerprints[shard] = header.fingerprint
            for reason, number in header.reasons.items():
                bad[(shard, reason)] += number
    for number in set(range(len(plan.shards))).difference(fingerprints):  # An empty one has no units.
        empty = plan.shards[number]
        fingerprints[number] = fingerprint_of_shard(empty.below(job.roots), empty.size_bytes)
    table = ShardTable(
        path=tuple(s.path for s in plan.shards),
        format=tuple(s.format for s in plan.shards),
        rows=rows,
        size_bytes=np.array([s.size_bytes for s in plan.shards], np.int64),
        mtime_ns=np.array([s.mtime_ns for s in plan.shards], np.int64),
        fingerprint=tuple(fingerprints[i] for i in range(len(plan.shards))),
        dataset=tuple(s.dataset for s in plan.shards),
    )
    found = [BadRows(shard=shard, reason=reason, rows=number) for (shard, reason), number in sorted(bad.items())]
    return table, [*kept.bad, *found]
