"""Several indexes as one: their block tables one after the other, their properties together.

A property that an index does not have is null there; the built-in property `dataset` tells them apart: it is the name of the
index file, unless the index was built over named roots and has it already. Shards have absolute paths here. Price: a copy of
the block tables. Every rank opens the files it reads samples from, when it reads the first.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.schema import Config, DataConfig
from mixtera_hpc.core.index_tables import (
    BLOCK_COLUMNS,
    BlockTable,
    Histogram,
    IndexTables,
    SampleColumns,
    ShardTable,
    Zones,
)
from mixtera_hpc.core.properties import ComboTable, Kind, Property
from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.index.layout import DATASET, path_source, with_zero
from mixtera_hpc.index.read.open import PropertyIndex, open_index
from mixtera_hpc.index.read.sample_reader import SampleReader

__all__ = ["SampleSource", "open_configured", "open_samples", "sample_sources"]

TEXT_DEFAULT = "text"
"""What `data.text` is when nobody says; runs need not say it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSource:
    """Where samples are read; goes to every rank."""

    path: str
    fingerprint: str
    first_sample: int = 0
    """What its own positions begin with."""
    combos: list[int] | None = None
    """Its combos in the numbers of all together; None: as they are."""
    numbers: list[str] | None = None
    """The numbers of all together; None: its own."""


def open_configured(config: Config) -> PropertyIndex:
    """The index that a configuration names, or all of them as one.

    Raises:
        PropertyIndexError: one is missing or damaged, was built from other places of a row than `config.data` says, or they
            do not fit together.
    """
    data, names = config.data, config.index
    first = open_index(names.path, data.roots() or data.root or None, names.generation)
    _check_described(first, data)
    if not names.paths:
        return first
    others = [open_index(path) for path in names.paths]
    return JoinedIndex([first, *others])


def _check_described(index: PropertyIndex, data: DataConfig) -> None:
    """Refuse keys that count only when an index is built, and were others then. `data.text` at its default is not looked at."""
    differing: list[tuple[str, str | None, str | None]] = []
    if data.text not in (TEXT_DEFAULT, index.text):
        differing.append(("data.text", data.text, index.text))
    for name, spec in data.properties.items():
        if name in index.sources and spec.path is not None:
            now = f"{spec.kind} {path_source(spec.path, spec.pattern)}"
            was = f"{index.tables.properties[name].kind} {index.sources[name]}"
            if now != was:
                differing.append((f"data.properties.{name}", now, was))
    if differing:
        lines = "".join(f"\n  - {key} is {now!r}, the index has {was!r}" for key, now, was in differing)
        raise PropertyIndexError(
            f"{index.path} was built with other settings than these:{lines}\n  Leave them as they were, or build the index again."
        )


def sample_sources(index: PropertyIndex) -> list[SampleSource]:
    """Where the samples of an open index are."""
    if isinstance(index, JoinedIndex):
        return index.readers
    return [SampleSource(path=str(index.path), fingerprint=index.fingerprint)]


def open_samples(sources: Sequence[SampleSource], keep_bytes: int = 0) -> SampleReader:
    """A reader of the samples of all sources; nothing is opened before it is read. `keep_bytes` as for `SampleReader`."""
    if len(sources) == 1:
        return SampleReader(sources[0].path, sources[0].fingerprint, keep_bytes)
    return JoinedSampleReader(sources, keep_bytes)


class JoinedSampleReader(SampleReader):
    """Asks the reader of the index that a position lies in."""

    def __init__(self, sources: Sequence[SampleSource], keep_bytes: int) -> None:
        super().__init__(sources[0].path)
        self._sources = sources
        self._readers = [
            SampleReader(source.path, source.fingerprint, keep_bytes // len(sources)) for source in sources
        ]
        self._bounds = np.array([source.first_sample for source in sources])
        self._combos = [np.array(source.combos, np.int32) for source in sources]

    def read_many(
        self, first_samples: Sequence[int], rows: Sequence[int], only: Collection[str] | None = None
    ) -> SampleColumns:
        owners = np.searchsorted(self._bounds, first_samples, side="right") - 1
        borders = np.flatnonzero(np.diff(owners)) + 1
        parts = []
        for start, stop in zip([0, *borders.tolist()], [*borders.tolist(), len(owners)], strict=True):
            if start < stop:
                parts.append(self._part(int(owners[start]), first_samples[start:stop], rows[start:stop], only))
        self.bytes_read = sum(reader.bytes_read for reader in self._readers)
        return _concatenated(parts, self._sources[0].numbers or [])

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def _part(
        self, owner: int, first_samples: Sequence[int], rows: Sequence[int], only: Collection[str] | None
    ) -> SampleColumns:
        base = int(self._bounds[owner])
        found = self._readers[owner].read_many([first - base for first in first_samples], rows, only)
        missing = np.full(len(found.combo), np.nan)
        names = self._sources[owner].numbers or []
        return SampleColumns(
            combo=self._combos[owner][found.combo],
            length=found.length,
            tokens=found.tokens,
            numbers={name: found.numbers.get(name, missing) for name in names},
        )


def _concatenated(parts: Sequence[SampleColumns], numbers: Sequence[str]) -> SampleColumns:
    if len(parts) == 1:
        return parts[0]
    return SampleColumns(
        combo=np.concatenate([np.zeros(0, np.int32), *(p.combo for p in parts)]),
        length=np.concatenate([np.zeros(0, np.int64), *(p.length for p in parts)]),
        tokens=np.concatenate([np.zeros(0, np.int64), *(p.tokens for p in parts)]),
        numbers={n: np.concatenate([np.zeros(0), *(p.numbers[n] for p in parts)]) for n in numbers},
    )


class JoinedIndex(PropertyIndex):
    """Several open indexes behind the face of one."""

    def __init__(self, indexes: Sequence[PropertyIndex]) -> None:
        _check_alike(indexes)
        first = indexes[0]
        names = _names(indexes)
        self.path = first.path
        self.roots = {}
        self.text, self.parser = first.text, first.parser
        self.tokenizer_fingerprint = first.tokenizer_fingerprint
        self.sources = {}
        self.chunk_rows, self.generations = first.chunk_rows, ()
        firsts = np.cumsum([0, *(len(index.tables.shards.path) for index in indexes)]).tolist()
        self.bad = tuple(
            replace(b, shard=b.shard + n) for n, index in zip(firsts, indexes, strict=False) for b in index.bad
        )
        told = "".join(f"{name} {index.fingerprint} " for name, index in zip(names, indexes, strict=True))
        self.fingerprint = hashlib.blake2b(told.encode(), digest_size=16).hexdigest()
        self._paths = [str((i.data_root / path).absolute()) for i in indexes for path in i.shard_paths()]
        self.tables, combos = _tables(indexes, names)
        numbers = sorted(self.tables.blocks.zones)
        self.readers = [
            SampleSource(
                path=str(index.path),
                fingerprint=index.fingerprint,
                first_sample=base,
                combos=translate.tolist(),
                numbers=numbers,
            )
            for index, base, translate in zip(indexes, _bases(indexes), combos, strict=True)
        ]
        self.samples = open_samples(self.readers)
        for index in indexes:
            index.close()

    def shard_paths(self) -> list[str]:
        return self._paths


def _check_alike(indexes: Sequence[PropertyIndex]) -> None:
    """Refuse what one run cannot read as one."""
    first = indexes[0]
    for other in indexes[1:]:
        pairs = [
            ("data.text", first.text, other.text),
            ("the tokenizer", first.tokenizer_fingerprint, other.tokenizer_fingerprint),
        ]
        for name, prop in other.tables.properties.items():
            known = first.tables.properties.get(name, prop)
            pairs.append((f"the kind of {name}", str(known.kind), str(prop.kind)))
        differing = [f"\n  - {name}: {a} in {first.path}, {b} in {other.path}" for name, a, b in pairs if a != b]
        if differing:
            raise PropertyIndexError(
                f"These indexes do not fit together in one run:{''.join(differing)}\n  Build them again with the same settings."
            )


def _names(indexes: Sequence[PropertyIndex]) -> list[str]:
    """What the samples of each belong to, where it does not say so itself."""
    names = [index.path.stem for index in indexes]
    unnamed = [n for n, index in zip(names, indexes, strict=True) if DATASET not in index.tables.properties]
    twice = sorted({name for name in unnamed if unnamed.count(name) > 1})
    if twice or len({i.path.absolute() for i in indexes}) < len(indexes):
        raise PropertyIndexError(
            f"Two of the indexes {', '.join(str(i.path) for i in indexes)} have the same name, which is their samples' dataset.\n"
            "  Rename one of the files, or build it over data.sets={NAME: DIR}."
        )
    return names


def _bases(indexes: Sequence[PropertyIndex]) -> list[int]:
    """Where the sample positions of each begin."""
    lengths = []
    for index in indexes:
        blocks = index.tables.blocks
        end = int(blocks.first_sample[-1]) + int(blocks.rows[-1]) if len(blocks) else 0
        lengths.append(end)
    return with_zero(np.cumsum(lengths, dtype=np.int64))[:-1].tolist()


def _tables(indexes: Sequence[PropertyIndex], names: Sequence[str]) -> tuple[IndexTables, list[NDArray[np.int64]]]:
    """All tables together, and for each index the new numbers of its combos."""
    tables = [index.tables for index in indexes]
    combos, translate = _combos(tables, names)
    numbers = sorted({name for t in tables for name in t.blocks.zones})
    properties: dict[str, Property] = {n: Property(name=n, kind=Kind.NUMBER) for n in numbers} | dict(combos.properties)
    joined = IndexTables(
        properties=dict(sorted(properties.items())),
        combos=combos,
        shards=_shards(indexes),
        blocks=_blocks(indexes, numbers),
        histogram=_histogram(tables, translate),
        num_samples=sum(t.num_samples for t in tables),
        has_tokens=all(t.has_tokens for t in tables),
    )
    return joined, translate


def _combos(tables: Sequence[IndexTables], names: Sequence[str]) -> tuple[ComboTable, list[NDArray[np.int64]]]:
    kinds = {DATASET: Kind.CATEGORY} | {n: p.kind for t in tables for n, p in t.combos.properties.items()}
    rows: list[dict[str, tuple[str, ...]] | None] = []
    translate = []
    bad = -1
    for table, name in zip(tables, names, strict=True):
        numbers = []
        for number in range(table.combos.num_combos):
            is_bad = number == table.combos.bad
            numbers.append(bad if is_bad and bad >= 0 else len(rows))
            if is_bad and bad < 0:
                bad = len(rows)
                rows.append(None)
            elif not is_bad:
                own = {n: table.combos.values(n, number) for n in table.combos.properties}
                rows.append({DATASET: (name,)} | own)
        translate.append(np.array(numbers, np.int64))
    return _combo_table(kinds, rows, bad), translate


def _combo_table(kinds: Mapping[str, Kind], rows: Sequence[dict[str, tuple[str, ...]] | None], bad: int) -> ComboTable:
    properties, indptr, codes = {}, {}, {}
    for name, kind in sorted(kinds.items()):
        found = [() if row is None else row.get(name, ()) for row in rows]
        values = sorted({value for own in found for value in own})
        code = {value: i for i, value in enumerate(values)}
        properties[name] = Property(name=name, kind=kind, values=tuple(values))
        indptr[name] = with_zero(np.cumsum([len(own) for own in found], dtype=np.int64))
        codes[name] = np.array([code[value] for own in found for value in own], np.int32)
    return ComboTable(num_combos=len(rows), properties=properties, indptr=indptr, codes=codes, bad=bad)


def _shards(indexes: Sequence[PropertyIndex]) -> ShardTable:
    shards = [index.tables.shards for index in indexes]
    return ShardTable(
        path=tuple(path for s in shards for path in s.path),
        format=tuple(name for s in shards for name in s.format),
        rows=np.concatenate([s.rows for s in shards]),
        size_bytes=np.concatenate([s.size_bytes for s in shards]),
        mtime_ns=np.concatenate([s.mtime_ns for s in shards]),
        fingerprint=tuple(digest for s in shards for digest in s.fingerprint),
    )


def _blocks(indexes: Sequence[PropertyIndex], numbers: Sequence[str]) -> BlockTable:
    blocks = [index.tables.blocks for index in indexes]
    shards = with_zero(np.cumsum([len(i.tables.shards.path) for i in indexes], dtype=np.int64))[:-1].tolist()
    moved = {
        "shard": [b.shard + first for b, first in zip(blocks, shards, strict=True)],
        "first_sample": [b.first_sample + base for b, base in zip(blocks, _bases(indexes), strict=True)],
    }
    columns: dict[str, Any] = {}
    for name in BLOCK_COLUMNS:
        parts = moved.get(name, [getattr(b, name) for b in blocks])
        columns[name] = np.concatenate(parts).astype(getattr(blocks[0], name).dtype, copy=False)
    return BlockTable(**columns, zones={name: _zones(blocks, name) for name in numbers})


def _zones(blocks: Sequence[BlockTable], name: str) -> Zones:
    found = [b.zones.get(name) or _no_zones(len(b)) for b in blocks]
    return Zones(
        low=np.concatenate([z.low for z in found]),
        high=np.concatenate([z.high for z in found]),
        has_null=np.concatenate([z.has_null for z in found]),
    )


def _no_zones(count: int) -> Zones:
    return Zones(low=np.full(count, np.nan), high=np.full(count, np.nan), has_null=np.ones(count, np.bool_))


def _histogram(tables: Sequence[IndexTables], translate: Sequence[NDArray[np.int64]]) -> Histogram:
    found = [table.histogram for table in tables]
    return Histogram(
        indptr=with_zero(np.cumsum(np.concatenate([np.diff(h.indptr) for h in found]))),
        combo=np.concatenate([t[h.combo] for t, h in zip(translate, found, strict=True)]).astype(np.int32),
        rows=np.concatenate([h.rows for h in found]),
        tokens=np.concatenate([h.tokens for h in found]),
    )
