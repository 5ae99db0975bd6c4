"""Add properties to an index: functions over documents, which are read again; everything else is taken over.

Every unit is a run of neighbouring blocks of one shard. Its part has all that the index says of them and the new columns, so
the merge is that of a build, and a killed attempt goes on like one. Blocks, rows and their order stay; combos are numbered
anew, since every one may have split. Price: all documents are read once, the index is written once; every rank opens the
index, O(blocks) memory each.
"""

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.properties import Kind
from mixtera_hpc.errors import ConfigError, PropertyIndexError
from mixtera_hpc.formats.base import BlockRef, Column, PropertyField, ShardReader
from mixtera_hpc.formats.category_codes import Categories
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.seek_points import seek_folder_of
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.index.build.index_job import IndexJob, ScanPlan, UnitRecords, run_index_job
from mixtera_hpc.index.build.merge import PlacedSource, merge_results
from mixtera_hpc.index.build.publish import IndexFacts, publish_index
from mixtera_hpc.index.build.stored_blocks import StoredBlocks, block_ranges, combo_values
from mixtera_hpc.index.read.configured import open_written
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.read.verify import check_fresh
from mixtera_hpc.index.scan.computed_properties import DocumentFunctions
from mixtera_hpc.index.scan.parallel_scan import ProgressCallback
from mixtera_hpc.index.scan.scan_result import Combo, ScanResult, combine_columns, histogram_of, zones_of

__all__ = ["DeriveReport", "derive_properties"]

UNIT_BYTES = 64 << 20
BATCH_BLOCKS_ROWS = 4096
"""Documents handed to a function at once, about."""


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
    units: int
    elapsed_s: float
    empty_properties: tuple[str, ...]


def derive_properties(
    config: Config, comm: Communicator | None = None, progress: ProgressCallback | None = None, again: bool = False
) -> DeriveReport:
    """Add every property of `config.data.properties` that has a `function` and that the index lacks. **Collective.**

    Args:
        again: compute those it has once more, with the functions as they are now.

    Raises:
        ConfigError: there is nothing to add, or a function cannot be imported.
        PropertyIndexError: there is no index, its shards have changed, or a name is taken.
        DataError: a function returned something else than a value of its kind for each document.
    """
    comm, began = comm or Local(), time.monotonic()
    index = open_written(config)
    functions = _new(index, DocumentFunctions.of(config.data), again)
    combos = combo_values(index.tables.combos)

    def plan() -> ScanPlan:
        check_fresh(index)
        return _plan(index)

    def scan(made: ScanPlan, unit: int) -> Iterator[ScanResult]:
        _, first, last = made.units[unit]
        yield _unit(index, combos, functions, first, last)

    def end(made: ScanPlan, records: UnitRecords) -> DeriveReport:
        return _end(index, functions, made, records, began)

    job = IndexJob(
        path=Path(config.index.path),
        depends=["derive", index.fingerprint, functions.fields, functions.sources],
        threads=config.index.threads,
        scan=scan,
    )
    with index:
        return run_index_job(job, comm, plan, end, DeriveReport, progress)


def _new(index: PropertyIndex, functions: DocumentFunctions, again: bool) -> DocumentFunctions:
    """The functions whose properties are to be computed."""
    have = index.tables.properties
    for field in functions.fields:
        if field.name in have and not index.sources[field.name].startswith("function:"):
            raise PropertyIndexError(
                f"{index.path} has a property {field.name!r} already, from {index.sources[field.name]}.\n"
                f"  Give the new one another name than data.properties.{field.name}."
            )
    wanted = tuple(function for function in functions.all if again or _is_new(index, function.field))
    if not wanted:
        what = "the index has all these properties already" if functions.all else "data.properties names no function"
        raise ConfigError(
            f"There is nothing to derive: {what}.\n  Add data.properties.NAME={{function: package.module.function, kind: "
            "category}, or compute what is there once more with --again."
        )
    return DocumentFunctions(wanted)


def _is_new(index: PropertyIndex, field: PropertyField) -> bool:
    found = index.tables.properties.get(field.name)
    return found is None or found.kind != field.kind or index.sources[field.name] != f"function:{field.path}"


def _plan(index: PropertyIndex) -> ScanPlan:
    """Units of some dozen megabytes, each within one shard."""
    blocks, units, sizes = index.tables.blocks, [], []
    for first, last in block_ranges(index, np.arange(len(blocks), dtype=np.int64)):
        cuts = _cuts(blocks.shard[first:last], blocks.length[first:last])
        for a, b in itertools.pairwise(cuts):
            units.append((int(blocks.shard[first + a]), first + a, first + b))
            sizes.append(int(blocks.length[first + a : first + b].sum()))
    return ScanPlan(shards=[], units=units, sizes=sizes)


def _cuts(shard: NDArray[np.int32], length: NDArray[np.int64]) -> list[int]:
    """Where consecutive blocks are cut: at every shard, and every so many bytes."""
    ends = np.cumsum(length)
    is_cut = (shard[1:] != shard[:-1]) | (ends[1:] // UNIT_BYTES != ends[:-1] // UNIT_BYTES)
    return [0, *(np.flatnonzero(is_cut) + 1).tolist(), len(shard)]


def _unit(
    index: PropertyIndex, combos: list[Combo | None], functions: DocumentFunctions, first: int, last: int
) -> ScanResult:
    """What the index says of some blocks of a shard, and the new properties."""
    part = StoredBlocks(index, combos, first, last).load()
    shard = int(index.tables.blocks.shard[first])
    path = index.data_root / index.shard_paths()[shard]
    reader = load_format(index.tables.shards.format[shard]).open(
        path, index.text, BlockCache(seek_folders=[seek_folder_of(index.path)])
    )
    try:
        found = list(_columns(index, part, functions, reader, first))
    finally:
        reader.close()
    columns = {field.name: _one([each[field.name] for each in found]) for field in functions.fields}
    return _with(part, list(index.tables.combos.properties), functions.fields, columns)


def _columns(
    index: PropertyIndex, part: ScanResult, functions: DocumentFunctions, reader: ShardReader, first: int
) -> Iterator[Mapping[str, Column]]:
    """The new properties of every block, computed from some thousand documents at a time."""
    blocks = index.tables.blocks
    bad = part.combos.index(None) if None in part.combos else -1
    held: list[str] = []
    row = 0
    for number, rows in enumerate(part.blocks["rows"].tolist()):
        place = BlockRef.of(blocks, first + number)
        lengths = part.samples.get("length", np.zeros(part.num_rows, np.int64))[row : row + rows]
        wanted = np.flatnonzero(part.samples["combo"][row : row + rows] != bad)
        texts = [""] * rows
        for where, text in zip(wanted.tolist(), reader.documents(place, lengths, wanted), strict=True):
            texts[where] = text
        held += texts
        row += rows
        if len(held) >= BATCH_BLOCKS_ROWS:
            yield functions.columns(held)
            held = []
    yield functions.columns(held)


def _one(columns: list[Column]) -> Column:
    """Columns of consecutive rows as one."""
    numbers = [column for column in columns if isinstance(column, np.ndarray)]
    if numbers:
        return np.concatenate(numbers)
    values: dict[tuple[str, ...], int] = {}
    codes = []
    for column in columns:
        if isinstance(column, Categories):
            known = np.array([values.setdefault(value, len(values)) for value in column.values], np.int32)
            codes.append(known[column.code] if len(known) else column.code)
    return Categories(list(values), np.concatenate(codes))


def _with(
    part: ScanResult, names: list[str], fields: tuple[PropertyField, ...], columns: Mapping[str, Column]
) -> ScanResult:
    """A part with more properties; one it has by that name is replaced."""
    numbers = {n: v for n, v in part.numbers.items() if n not in columns}
    zones = {n: z for n, z in part.zones.items() if n not in columns}
    bad = part.combos.index(None) if None in part.combos else -1
    is_bad = part.samples["combo"] == bad
    for field in fields:
        column = columns[field.name]
        if isinstance(column, np.ndarray):
            numbers[field.name] = np.where(is_bad, np.nan, column)
            zones[field.name] = zones_of(numbers[field.name], part.blocks["rows"], is_bad)
    combos, codes = _recombined(part, names, {n: c for n, c in columns.items() if isinstance(c, Categories)}, columns)
    samples = part.samples | {"combo": codes}
    counts, cells = histogram_of(
        part.blocks["rows"], samples, len(combos), combos.index(None) if None in combos else None
    )
    return replace(
        part,
        combos=combos,
        blocks=part.blocks | {"count": counts},
        cells=cells,
        samples=samples,
        numbers=numbers,
        zones=zones,
    )


def _recombined(
    part: ScanResult, names: list[str], added: Mapping[str, Categories], replaced: Mapping[str, Column]
) -> tuple[list[Combo | None], NDArray[np.int64]]:
    """The combos with more values, and the combo of every row."""
    kept = [(i, name) for i, name in enumerate(names) if name not in replaced]
    order = sorted([*(name for _, name in kept), *added])
    new, code = combine_columns([added[name] for name in sorted(added)], part.num_rows)
    pairs, row_of = np.unique(part.samples["combo"] * max(len(new), 1) + code, return_inverse=True)
    position: dict[Combo | None, int] = {}
    number = np.zeros(len(pairs), np.int64)
    for i, pair in enumerate(pairs.tolist()):
        old, more = part.combos[pair // max(len(new), 1)], new[pair % max(len(new), 1)]
        combo = None
        if old is not None:
            values = {name: old[column] for column, name in kept} | dict(zip(sorted(added), more, strict=True))
            combo = tuple(values[name] for name in order)
        number[i] = position.setdefault(combo, len(position))
    return list(position), number[row_of]


def _end(
    index: PropertyIndex, functions: DocumentFunctions, plan: ScanPlan, records: UnitRecords, began: float
) -> DeriveReport:
    """Rank 0: merge, write, publish."""
    new = {field.name: field for field in functions.fields}
    stored = {p.name: PropertyField(name=p.name, path="", kind=Kind(p.kind)) for p in index.tables.properties.values()}
    pieces: list[PlacedSource] = [(plan.units[unit][0], record) for unit in sorted(records) for record in records[unit]]
    merged = merge_results([field for _, field in sorted((stored | new).items())], pieces, (), index.chunk_rows)
    facts = IndexFacts(
        roots={name: str(root.resolve()) for name, root in index.roots.items()},
        text=index.text,
        tokenizer=index.tokenizer_fingerprint,
        parser=index.parser,
        sources={**index.sources} | {name: f"function:{field.path}" for name, field in new.items()},
        bad=tuple(index.bad),
    )
    written = publish_index(index.path, facts, index.tables.shards, merged, pieces)
    return DeriveReport(
        path=str(index.path),
        fingerprint=written.fingerprint,
        derived=tuple(new),
        samples=index.tables.num_samples,
        combos=merged.combos.num_combos,
        bytes_read=plan.missing_bytes,
        resumed_units=len(plan.done),
        units=len(plan.units),
        elapsed_s=time.monotonic() - began,
        empty_properties=tuple(name for name in written.empty_properties if name in new),
    )
