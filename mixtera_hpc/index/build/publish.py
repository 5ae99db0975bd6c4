"""Write merged results to an HDF5 file that appears under its name complete, or not at all.

The bytes depend on the content only: there are no timestamps, and the order is fixed. The fingerprint covers
everything that a plan depends on, but neither the data root nor the modification times of shards.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.index_tables import ShardTable
from mixtera_hpc.index.build.column_writer import BlockWriter, TableWriter
from mixtera_hpc.index.build.merge import MergedTables, PlacedSource, translate_result
from mixtera_hpc.index.build.null_shares import NullCounter
from mixtera_hpc.index.data_sets import DataSetFacts
from mixtera_hpc.index.layout import (
    FORMAT,
    VERSION,
    BadRows,
    Generation,
    building_folder,
    narrow,
    write_column,
    write_text,
    write_texts,
)
from mixtera_hpc.index.open_file import explain_locks

__all__ = ["IndexFacts", "PublishedIndex", "publish_index", "renew_modification_times"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexFacts:
    """Facts that an index stores about its build."""

    sets: Mapping[str, DataSetFacts]
    """Name of the data set → its facts; a single unnamed one is called ''."""
    tokenizer: str | None
    """Fingerprint of the tokenizer that counted the tokens."""
    bad: tuple[BadRows, ...] = ()
    """Skipped rows, by shard and reason."""
    generations: tuple[Generation, ...] = ()
    """The earlier ones, oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedIndex:
    """Facts about the index that was written."""

    fingerprint: str
    tokens: int
    empty_properties: tuple[str, ...]
    """Properties that no sample has."""
    null_shares: dict[str, dict[str, float]]
    """Data set → property → share of its rows without a value, from 0 to 1."""


def publish_index(
    path: Path, facts: IndexFacts, shards: ShardTable, merged: MergedTables, sources: Iterable[PlacedSource]
) -> PublishedIndex:
    """Write an index in its building folder, then rename it to `path`; an older index is replaced atomically."""
    # In the building folder, which is on the same file system, so that the rename is atomic.
    new_file = building_folder(path) / "index.h5"
    published = _write_file(new_file, facts, shards, merged, sources)
    new_file.replace(path)
    # The rename itself is only durable once the folder is on disk.
    _sync(path.parent)
    return published


def renew_modification_times(path: Path, mtime_ns: NDArray[np.int64]) -> None:
    """Give the shards of an index other modification times, which its fingerprint does not cover; atomic like a build.

    Args:
        path: the index.
        mtime_ns: of every shard.
    """
    new_file = building_folder(path) / "index.h5"
    shutil.copyfile(path, new_file)
    with explain_locks(new_file), h5py.File(new_file, "r+", libver=("v110", "v110"), locking=False) as file:
        # Deleted and written again, because the stored type may be too narrow.
        del file["shards/mtime_ns"]
        write_column(file["shards"], "mtime_ns", narrow(mtime_ns))
    _sync(new_file)
    new_file.replace(path)
    _sync(path.parent)


def _write_file(
    path: Path, facts: IndexFacts, shards: ShardTable, merged: MergedTables, sources: Iterable[PlacedSource]
) -> PublishedIndex:
    """Write an index to `path` and flush it to disk.

    Raises:
        OSError: the disk does not accept the data; h5py reports some of these as RuntimeError.
    """
    # A fixed format version and no recorded creation order or times: equal content gives equal bytes.
    with explain_locks(path):
        file = h5py.File(path, "w", libver=("v110", "v110"), track_order=False, locking=False)
    try:
        published = _write_content(file, facts, shards, merged, sources)
    except (OSError, RuntimeError) as error:
        _abandon(file)
        # h5py puts the error number of the system into the text only.
        number = re.search(r"errno = (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    file.close()
    _sync(path)
    return published


def _write_content(
    file: h5py.File, facts: IndexFacts, shards: ShardTable, merged: MergedTables, sources: Iterable[PlacedSource]
) -> PublishedIndex:
    # The order of all that follows decides the bytes of the file.
    tables = TableWriter(file)
    _write_shards(tables, facts, shards)
    _write_properties(tables, merged)
    blocks = BlockWriter(tables, merged, len(shards.path))
    nulls = NullCounter(merged, shards.dataset or ("",) * len(shards.path))
    for shard, source in sources:
        result = translate_result(merged, source.load())
        blocks.add(shard, result)
        nulls.add(shard, result)
    blocks.finish()

    # Kinds and settings are attributes, which no column digest covers.
    kinds = [(prop.name, str(prop.kind)) for prop in merged.properties.values()]
    rows = [(name, data_set.text, data_set.parser) for name, data_set in facts.sets.items()]
    fingerprint = tables.fingerprint(repr((VERSION, rows, facts.tokenizer, kinds)))
    _write_generations(file, (*facts.generations, _newest_generation(fingerprint, merged, len(shards.path))))
    _write_bad_rows(file, facts.bad)
    _write_attributes(file, facts, merged, fingerprint)
    file.flush()

    with_values = merged.has_values | blocks.known_numbers
    empty = tuple(name for name in merged.properties if name not in with_values)
    return PublishedIndex(
        fingerprint=fingerprint,
        tokens=blocks.tokens,
        empty_properties=empty,
        null_shares=nulls.shares(),
    )


def _abandon(file: h5py.File) -> None:
    """Close a file that the disk does not accept.

    HDF5 writes its buffers once more when it closes a file, and crashes at interpreter exit if that fails. So the file
    descriptor is redirected to memory first.
    """
    memory = os.memfd_create("unwritten")
    os.dup2(memory, file.id.get_vfd_handle())
    os.close(memory)
    with contextlib.suppress(OSError, RuntimeError):
        file.close()


def _write_shards(tables: TableWriter, facts: IndexFacts, shards: ShardTable) -> None:
    datasets = list(facts.sets)
    _write_sets(tables.file.require_group("sets"), facts.sets)
    tables.write_texts("shards", "path", shards.path)
    position = {name: i for i, name in enumerate(datasets)}
    dataset_of_shard = shards.dataset or ("",) * len(shards.path)
    # Not in the fingerprint: the data set of a shard is also the property `dataset` of its samples.
    codes = np.array([position[name] for name in dataset_of_shard], np.int64)
    tables.write_column("shards", "dataset", codes, in_fingerprint=False)
    tables.write_texts("shards", "format", shards.format)
    tables.write_column("shards", "rows", shards.rows)
    tables.write_column("shards", "size_bytes", shards.size_bytes)
    tables.write_column("shards", "mtime_ns", shards.mtime_ns, in_fingerprint=False)
    # Hex texts as raw bytes; shape (shards, 16).
    digests = np.frombuffer(bytes.fromhex("".join(shards.fingerprint)), np.uint8)
    tables.write_column("shards", "fingerprint", digests.reshape(len(shards.path), -1))


def _write_sets(group: h5py.Group, sets: Mapping[str, DataSetFacts]) -> None:
    write_texts(group, "name", list(sets))
    write_texts(group, "root", [data_set.root for data_set in sets.values()])
    write_texts(group, "text", [data_set.text or "" for data_set in sets.values()])
    write_texts(group, "text_digest", [data_set.text_digest for data_set in sets.values()])
    write_texts(group, "parser", [data_set.parser or "" for data_set in sets.values()])
    write_texts(group, "sources", [json.dumps(dict(data_set.sources), sort_keys=True) for data_set in sets.values()])


def _write_properties(tables: TableWriter, merged: MergedTables) -> None:
    tables.file.require_group("properties")
    for prop in merged.properties.values():
        tables.write_texts(f"properties/{prop.name}", "values", prop.values)
        write_text(tables.file[f"properties/{prop.name}"], "kind", prop.kind)
    group = tables.file.require_group("combos")
    group.attrs["num_combos"] = merged.combos.num_combos
    group.attrs["bad"] = merged.combos.bad
    for name in merged.combos.properties:
        tables.write_column(f"combos/{name}", "count", np.diff(merged.combos.indptr[name]))
        tables.write_column(f"combos/{name}", "code", merged.combos.codes[name])


def _newest_generation(fingerprint: str, merged: MergedTables, num_shards: int) -> Generation:
    return Generation(
        fingerprint=fingerprint,
        shards=num_shards,
        blocks=merged.blocks,
        cells=merged.cells,
        combos=merged.combos.num_combos,
        samples=merged.rows,
    )


def _write_generations(file: h5py.File, generations: Sequence[Generation]) -> None:
    group = file.require_group("generations")
    write_texts(group, "fingerprint", [generation.fingerprint for generation in generations])
    for name in ("shards", "blocks", "cells", "combos", "samples"):
        write_column(group, name, np.array([getattr(generation, name) for generation in generations], np.int64))


def _write_bad_rows(file: h5py.File, bad: Sequence[BadRows]) -> None:
    group = file.require_group("bad")
    write_column(group, "shard", narrow(np.array([rows.shard for rows in bad], np.int64)))
    write_column(group, "rows", narrow(np.array([rows.rows for rows in bad], np.int64)))
    write_texts(group, "reason", [rows.reason for rows in bad])


def _write_attributes(file: h5py.File, facts: IndexFacts, merged: MergedTables, fingerprint: str) -> None:
    texts = {
        "format": FORMAT,
        "tokenizer": facts.tokenizer,
        "fingerprint": fingerprint,
    }
    for name, text in texts.items():
        write_text(file, name, text or "")
    file.attrs["version"] = VERSION
    file.attrs["num_samples"] = merged.rows - merged.bad_rows
    file.attrs["chunk_rows"] = merged.chunk_rows


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
