"""Merged pieces → an HDF5 file that appears under its name whole, or not at all.

Sizes and types are known before the first piece is loaded, so every column is written from front to back through a buffer of
one chunk: memory does not grow with the index. The bytes depend on the content only: no times, fixed order. Beside them a
fingerprint is taken of everything a plan depends on: not of the data root, nor of when files were changed.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.index_tables import ShardTable
from mixtera_hpc.index.build.merge import MergedTables, PlacedSource, TranslatedResult, translate_result
from mixtera_hpc.index.layout import (
    FORMAT,
    TABLE_CHUNK,
    VERSION,
    BadRows,
    Generation,
    first_samples,
    narrow,
    narrow_type,
    write_column,
    write_text,
    write_texts,
)
from mixtera_hpc.index.scan.scan_log import building_folder

__all__ = ["IndexFacts", "PublishedIndex", "publish_index"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexFacts:
    """What an index says about itself."""

    roots: dict[str, str]
    """Dataset → folder; a single one is called ''."""
    text: str | None
    tokenizer: str | None
    """Fingerprint of the tokenizer that counted."""
    parser: str | None
    """Import path of the user's function that properties come from."""
    sources: dict[str, str]
    """Property → where it comes from."""
    bad: tuple[BadRows, ...] = ()
    """By shard and reason."""
    generations: tuple[Generation, ...] = ()
    """The earlier ones, oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedIndex:
    """What went into the file."""

    fingerprint: str
    tokens: int
    empty_properties: tuple[str, ...]
    """Properties that no sample has."""


def publish_index(
    path: Path, facts: IndexFacts, shards: ShardTable, merged: MergedTables, pieces: Iterable[PlacedSource]
) -> PublishedIndex:
    """Write the file where it is built, then give it its name; an older one is replaced in the same instant."""
    part = building_folder(path) / "index.h5"
    written = _write_file(part, facts, shards, merged, pieces)
    part.replace(path)
    _sync(path.parent)
    return written


def _write_file(
    path: Path, facts: IndexFacts, shards: ShardTable, merged: MergedTables, pieces: Iterable[PlacedSource]
) -> PublishedIndex:
    """Write the file to `path`, flushed to disk."""
    file = h5py.File(path, "w", libver=("v110", "v110"), track_order=False, locking=False)
    try:
        written = _write(file, facts, shards, merged, pieces)
    except (OSError, RuntimeError) as error:
        _abandon(file)
        failed = re.search(r"errno = (\d+)", str(error))
        raise (OSError(int(failed[1]), os.strerror(int(failed[1])), str(path)) if failed else error) from None
    file.close()
    _sync(path)
    return written


def _write(
    file: h5py.File, facts: IndexFacts, shards: ShardTable, merged: MergedTables, pieces: Iterable[PlacedSource]
) -> PublishedIndex:
    tables = _Tables(file)
    _write_shards(tables, facts, shards)
    _write_properties(tables, facts, merged)
    content = _Content(tables, merged, len(shards.path))
    for shard, piece in pieces:
        content.add(shard, translate_result(merged, piece.load()))
    content.finish()
    kinds = [(p.name, str(p.kind)) for p in merged.properties.values()]
    fingerprint = tables.fingerprint(repr((VERSION, facts.text, facts.tokenizer, facts.parser, kinds)))
    _write_generations(file, (*facts.generations, _generation(fingerprint, merged, len(shards.path))))
    _write_bad(file, facts.bad)
    told = {"text": facts.text, "tokenizer": facts.tokenizer, "parser": facts.parser, "fingerprint": fingerprint}
    for name, text in {"format": FORMAT, **told}.items():
        write_text(file, name, text or "")
    file.attrs["version"] = VERSION
    file.attrs["num_samples"] = merged.rows - merged.bad_rows
    file.attrs["chunk_rows"] = merged.chunk_rows
    file.flush()
    empty = tuple(name for name in merged.properties if name not in merged.has_values | content.known_numbers)
    return PublishedIndex(fingerprint=fingerprint, tokens=content.tokens, empty_properties=empty)


def _abandon(file: h5py.File) -> None:
    """Close a file that the disk does not take; HDF5 tries to write it again, and crashes at exit where it cannot: into memory."""
    memory = os.memfd_create("unwritten")
    os.dup2(memory, file.id.get_vfd_handle())
    os.close(memory)
    with contextlib.suppress(OSError, RuntimeError):
        file.close()


class _Tables:
    """Makes the columns of a file and takes their fingerprint on the way: of each, then of all."""

    def __init__(self, file: h5py.File) -> None:
        self.file = file
        self._digests: dict[str, Any] = {}

    def column(self, group: str, name: str, values: NDArray[Any], *, counts: bool = True) -> None:
        """Store a small table column; `counts` says whether it is part of the fingerprint."""
        stored = narrow(values)
        write_column(self.file.require_group(group), name, stored)
        if counts:
            self.digest(f"{group}/{name}", stored.dtype).update(np.ascontiguousarray(stored).data)

    def texts(self, group: str, name: str, texts: tuple[str, ...]) -> None:
        """Store a column of texts."""
        write_texts(self.file.require_group(group), name, texts)
        digest = self.digest(f"{group}/{name}", np.dtype("u1"))
        for text in texts:
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)

    def digest(self, name: str, dtype: np.dtype[Any]) -> Any:
        """Where the content of a column is counted."""
        self._digests[name] = hashlib.blake2b(f"{name} {dtype.str} ".encode(), digest_size=16)
        return self._digests[name]

    def fingerprint(self, more: str) -> str:
        """Hex digest of everything counted."""
        whole = hashlib.blake2b(more.encode(), digest_size=16)
        for name in sorted(self._digests):
            whole.update(self._digests[name].digest())
        return whole.hexdigest()


@dataclass(slots=True)
class _Column:
    """One column of known length, written from front to back in whole chunks."""

    dataset: Any
    digest: Any
    held: list[NDArray[Any]] = field(default_factory=list)
    num_held: int = 0
    written: int = 0

    def add(self, values: NDArray[Any]) -> None:
        stored = np.ascontiguousarray(values, self.dataset.dtype)
        self.digest.update(stored.data)
        self.held.append(stored)
        self.num_held += len(stored)
        if self.num_held >= TABLE_CHUNK:
            self.flush(self.num_held // TABLE_CHUNK * TABLE_CHUNK)

    def flush(self, count: int) -> None:
        """Write the first `count` of the values held."""
        values = np.concatenate(self.held) if self.held else np.zeros(0, self.dataset.dtype)
        if count:
            self.dataset[self.written : self.written + count] = values[:count]
        self.written += count
        self.held, self.num_held = [values[count:].copy()], self.num_held - count


class _Content:
    """The columns of blocks and samples, piece by piece."""

    def __init__(self, tables: _Tables, merged: MergedTables, num_shards: int) -> None:
        self._merged = merged
        self._columns = {
            name: _made(tables, name, dtype, length)
            for name, (dtype, length) in _block_columns(merged, num_shards).items()
        }
        types = _sample_types(merged)
        self._types = types
        self._digests = {name: tables.digest(f"samples/{name}", dtype) for name, dtype in types.items()}
        group = tables.file.require_group("samples")
        group.require_group("numbers")
        chunks = (merged.chunk_rows,)
        self._samples = {
            name: group.create_dataset(
                name, (merged.padded_rows,), dtype, chunks=chunks, shuffle=True, compression=1, fletcher32=True
            )
            for name, dtype in types.items()
        }
        self._held: dict[str, list[NDArray[Any]]] = {name: [] for name in types}
        self._num_held = 0
        self._next_sample = 0
        self.tokens = 0
        self.known_numbers: set[str] = set()

    def add(self, shard: int | NDArray[np.int64], piece: TranslatedResult) -> None:
        blocks = piece.blocks
        self._columns["blocks/shard"].add(np.broadcast_to(shard, len(blocks["rows"])))
        for name in ("rows", "offset", "length"):
            self._columns[f"blocks/{name}"].add(blocks[name])
        for number, zones in piece.zones.items():
            for name, values in zones.items():
                self._columns[f"zones/{number}/{name}"].add(values)
            if not np.isnan(zones["low"]).all():
                self.known_numbers.add(number)
        self._columns["histogram/count"].add(blocks["count"])
        for name in ("combo", "rows", "tokens"):
            self._columns[f"histogram/{name}"].add(piece.cells[name])
        self.tokens += int(piece.cells["tokens"].sum())
        self._add_samples(blocks["rows"], piece.samples)

    def finish(self) -> None:
        """Write what is still held."""
        for column in self._columns.values():
            column.flush(column.num_held)
        self._flush_samples()

    def _add_samples(self, rows: NDArray[np.int64], samples: dict[str, NDArray[Any]]) -> None:
        """Rows go where their blocks begin, the gaps behind short blocks stay zero."""
        bounds = first_samples(rows, self._merged.chunk_rows)
        place = np.repeat(bounds[:-1] - (np.cumsum(rows) - rows), rows) + np.arange(int(rows.sum()))
        for name in self._samples:
            stored = samples[name].astype(self._types[name])
            self._digests[name].update(stored.data)
            padded = np.zeros(int(bounds[-1]), self._types[name])
            padded[place] = stored
            self._held[name].append(padded)
        self._num_held += int(bounds[-1])
        if self._num_held >= TABLE_CHUNK:
            self._flush_samples()

    def _flush_samples(self) -> None:
        """Small pieces are written together: a write costs as much as a block."""
        end = self._next_sample + self._num_held
        for name, dataset in self._samples.items():
            if self._num_held:
                dataset[self._next_sample : end] = np.concatenate(self._held[name])
            self._held[name].clear()
        self._next_sample, self._num_held = end, 0


def _block_columns(merged: MergedTables, num_shards: int) -> dict[str, tuple[np.dtype[Any], int]]:
    """Type and length of every column of the block tables."""

    def type_of(name: str) -> np.dtype[Any]:
        return narrow_type(merged.maxima.get(name, 0))

    columns = {"blocks/shard": (narrow_type(max(num_shards - 1, 0)), merged.blocks)}
    columns |= {f"blocks/{name}": (type_of(f"blocks/{name}"), merged.blocks) for name in ("rows", "offset", "length")}
    for number in merged.numbers:
        for name, dtype in (("low", "<f8"), ("high", "<f8"), ("has_null", "u1")):
            columns[f"zones/{number}/{name}"] = (np.dtype(dtype), merged.blocks)
    columns["histogram/count"] = (type_of("blocks/count"), merged.blocks)
    columns["histogram/combo"] = (narrow_type(max(merged.combos.num_combos - 1, 0)), merged.cells)
    return columns | {f"histogram/{name}": (type_of(f"cells/{name}"), merged.cells) for name in ("rows", "tokens")}


def _sample_types(merged: MergedTables) -> dict[str, np.dtype[Any]]:
    """Type of every sample column."""
    types = {"combo": narrow_type(max(merged.combos.num_combos - 1, 0))}
    for name in ("length", "tokens"):
        if f"samples/{name}" in merged.maxima:
            types[name] = narrow_type(merged.maxima[f"samples/{name}"])
    return types | {f"numbers/{name}": np.dtype("<f8") for name in merged.numbers}


def _made(tables: _Tables, name: str, dtype: np.dtype[Any], length: int) -> _Column:
    group, _, column = name.rpartition("/")
    chunks = {"chunks": (min(length, TABLE_CHUNK),), "fletcher32": True} if length else {}
    dataset = tables.file.require_group(group).create_dataset(column, (length,), dtype, **chunks)
    return _Column(dataset, tables.digest(name, dtype))


def _write_shards(tables: _Tables, facts: IndexFacts, shards: ShardTable) -> None:
    datasets = list(facts.roots)
    write_texts(tables.file.require_group("roots"), "dataset", datasets)
    write_texts(tables.file["roots"], "path", list(facts.roots.values()))
    tables.texts("shards", "path", shards.path)
    code, names = {name: i for i, name in enumerate(datasets)}, shards.dataset or ("",) * len(shards.path)
    tables.column("shards", "dataset", np.array([code[name] for name in names], np.int64), counts=False)
    tables.texts("shards", "format", shards.format)
    tables.column("shards", "rows", shards.rows)
    tables.column("shards", "size_bytes", shards.size_bytes)
    tables.column("shards", "mtime_ns", shards.mtime_ns, counts=False)
    digests = np.frombuffer(bytes.fromhex("".join(shards.fingerprint)), np.uint8)
    tables.column("shards", "fingerprint", digests.reshape(len(shards.path), -1))


def _write_properties(tables: _Tables, facts: IndexFacts, merged: MergedTables) -> None:
    tables.file.require_group("properties")
    for prop in merged.properties.values():
        tables.texts(f"properties/{prop.name}", "values", prop.values)
        write_text(tables.file[f"properties/{prop.name}"], "kind", prop.kind)
        write_text(tables.file[f"properties/{prop.name}"], "source", facts.sources[prop.name])
    group = tables.file.require_group("combos")
    group.attrs["num_combos"] = merged.combos.num_combos
    group.attrs["bad"] = merged.combos.bad
    for name in merged.combos.properties:
        tables.column(f"combos/{name}", "count", np.diff(merged.combos.indptr[name]))
        tables.column(f"combos/{name}", "code", merged.combos.codes[name])


def _write_bad(file: h5py.File, bad: tuple[BadRows, ...]) -> None:
    group = file.require_group("bad")
    write_column(group, "shard", narrow(np.array([b.shard for b in bad], np.int64)))
    write_column(group, "rows", narrow(np.array([b.rows for b in bad], np.int64)))
    write_texts(group, "reason", [b.reason for b in bad])


def _generation(fingerprint: str, merged: MergedTables, num_shards: int) -> Generation:
    return Generation(
        fingerprint=fingerprint,
        shards=num_shards,
        blocks=merged.blocks,
        cells=merged.cells,
        combos=merged.combos.num_combos,
        samples=merged.rows,
    )


def _write_generations(file: h5py.File, generations: tuple[Generation, ...]) -> None:
    group = file.require_group("generations")
    write_texts(group, "fingerprint", [g.fingerprint for g in generations])
    for name in ("shards", "blocks", "cells", "combos", "samples"):
        write_column(group, name, np.array([getattr(g, name) for g in generations], np.int64))


def _sync(path: Path) -> None:
    """Have the disk know of a file, or of the names in a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
