"""The tables of an index file, read whole: O(blocks), a block some 20 µs."""

from collections.abc import Mapping, Sequence

import h5py
import numpy as np

from mixtera_hpc.core.index_tables import BlockTable, Histogram, IndexTables, ShardTable, Zones
from mixtera_hpc.core.properties import ComboTable, Kind, Property
from mixtera_hpc.index.build.discover import escapes
from mixtera_hpc.index.layout import (
    BadRows,
    Generation,
    first_rows,
    first_samples,
    open_children,
    prepend_zero,
    read_column,
    read_text,
    read_texts,
)

__all__ = ["read_bad_rows", "read_generations", "read_tables"]


def read_tables(file: h5py.File, datasets: tuple[str, ...]) -> IndexTables:
    """All tables that planning needs.

    Args:
        datasets: the names that positions in the column `dataset` stand for.

    Raises:
        ValueError: they contradict each other, or a shard's path leads out of its root.
    """
    properties = {name: _property(name, group) for name, group in sorted(open_children(file["properties"]).items())}
    numbers = [name for name, prop in properties.items() if prop.kind is Kind.NUMBER]
    blocks = _blocks(file, int(file.attrs["chunk_rows"]), numbers)
    num_samples, num_bad = int(file.attrs["num_samples"]), int(read_column(file["bad"], "rows", np.int64).sum())
    if int(blocks.rows.sum(dtype=np.int64)) != num_samples + num_bad:
        raise ValueError("blocks and samples do not add up")
    return IndexTables(
        properties=properties,
        combos=_combos(file, properties),
        shards=_shards(file["shards"], datasets),
        blocks=blocks,
        histogram=_histogram(file["histogram"]),
        num_samples=num_samples,
        has_tokens=bool(read_text(file, "tokenizer")),
    )


def read_bad_rows(group: h5py.Group) -> tuple[BadRows, ...]:
    """What was skipped, by shard and reason."""
    columns = zip(group["shard"][...].tolist(), read_texts(group, "reason"), group["rows"][...].tolist(), strict=True)
    return tuple(BadRows(shard=shard, reason=reason, rows=rows) for shard, reason, rows in columns)


def read_generations(group: h5py.Group) -> tuple[Generation, ...]:
    """The states that the index begins with, oldest first; the last is the whole."""
    names = ("shards", "blocks", "cells", "combos", "samples")
    columns = zip(read_texts(group, "fingerprint"), *(group[name][...].tolist() for name in names), strict=True)
    return tuple(Generation(**dict(zip(("fingerprint", *names), row, strict=True))) for row in columns)


def _property(name: str, group: h5py.Group) -> Property:
    return Property(name=name, kind=Kind(read_text(group, "kind")), values=read_texts(group, "values"))


def _shards(group: h5py.Group, datasets: tuple[str, ...]) -> ShardTable:
    paths = read_texts(group, "path")
    if (outside := next((path for path in paths if escapes(path)), None)) is not None:
        raise ValueError(f"shard {outside!r} is outside the data root")
    return ShardTable(
        path=paths,
        dataset=() if datasets == ("",) else tuple(datasets[i] for i in group["dataset"][...]),
        format=read_texts(group, "format"),
        rows=read_column(group, "rows", np.int64),
        size_bytes=read_column(group, "size_bytes", np.int64),
        mtime_ns=read_column(group, "mtime_ns", np.int64),
        fingerprint=tuple(row.tobytes().hex() for row in group["fingerprint"][...]),
    )


def _combos(file: h5py.File, properties: Mapping[str, Property]) -> ComboTable:
    categorical = {name: p for name, p in properties.items() if p.kind is not Kind.NUMBER}
    groups = {name: file["combos"][name] for name in categorical}
    counts = {name: read_column(group, "count", np.int64) for name, group in groups.items()}
    return ComboTable(
        num_combos=int(file["combos"].attrs["num_combos"]),
        properties=categorical,
        indptr={name: prepend_zero(np.cumsum(count)) for name, count in counts.items()},
        codes={name: read_column(group, "code", np.int32) for name, group in groups.items()},
        bad=int(file["combos"].attrs["bad"]),
    )


def _histogram(group: h5py.Group) -> Histogram:
    return Histogram(
        indptr=prepend_zero(np.cumsum(read_column(group, "count", np.int64))),
        combo=group["combo"][...],
        rows=group["rows"][...],
        tokens=group["tokens"][...],
    )


def _blocks(file: h5py.File, chunk_rows: int, numbers: Sequence[str]) -> BlockTable:
    group = file["blocks"]
    shard, rows = read_column(group, "shard", np.int32), read_column(group, "rows", np.int32)
    return BlockTable(
        shard=shard,
        first_row=first_rows(shard, rows),
        rows=rows,
        offset=read_column(group, "offset", np.int64),
        length=read_column(group, "length", np.int64),
        first_sample=first_samples(rows, chunk_rows)[:-1],
        zones={name: _zones(file["zones"][name]) for name in numbers},
    )


def _zones(group: h5py.Group) -> Zones:
    low, high = read_column(group, "low", np.float64), read_column(group, "high", np.float64)
    return Zones(low=low, high=high, has_null=read_column(group, "has_null", np.bool_))
