"""Read the tables of an index file: O(blocks), about 20 µs per block."""

import json
from collections.abc import Mapping, Sequence

import h5py
import numpy as np

from mixtera_hpc.core.index_tables import BlockTable, Histogram, IndexTables, ShardTable, Zones
from mixtera_hpc.core.properties import ComboTable, Kind, Property
from mixtera_hpc.index.data_sets import DataSetFacts
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
from mixtera_hpc.index.shards import escapes
from mixtera_hpc.index.table_values import check_range, check_tables

__all__ = ["read_bad_rows", "read_data_sets", "read_generations", "read_tables"]


def read_tables(file: h5py.File, datasets: Sequence[str]) -> IndexTables:
    """Read all tables that planning needs.

    Args:
        file: an open index.
        datasets: the names of the data sets, in stored order.

    Raises:
        ValueError: the tables contradict each other, a value is out of range, or the path of a shard leads out of its
            root.
    """
    properties = {
        name: _read_property(name, group) for name, group in sorted(open_children(file["properties"]).items())
    }
    numbers = [name for name, prop in properties.items() if prop.kind is Kind.NUMBER]
    blocks = _read_blocks(file, int(file.attrs["chunk_rows"]), numbers)

    # Checksums detect damaged bytes. This sum detects tables that come from different builds.
    num_samples = int(file.attrs["num_samples"])
    num_bad = int(read_column(file["bad"], "rows", np.int64).sum())
    if int(blocks.rows.sum(dtype=np.int64)) != num_samples + num_bad:
        raise ValueError("blocks and samples do not add up")

    tables = IndexTables(
        properties=properties,
        combos=_read_combos(file["combos"], properties),
        shards=_read_shards(file["shards"], datasets),
        blocks=blocks,
        histogram=_read_histogram(file["histogram"]),
        num_samples=num_samples,
        has_tokens=bool(read_text(file, "tokenizer")),
    )
    check_tables(tables)
    return tables


def read_data_sets(group: h5py.Group) -> dict[str, DataSetFacts]:
    """Read what the index stores about each data set, by name."""
    columns = [read_texts(group, name) for name in ("name", "root", "text", "text_digest", "parser", "sources")]
    return {
        name: DataSetFacts(
            root=root,
            text=text or None,
            text_digest=text_digest,
            parser=parser or None,
            sources=json.loads(sources),
        )
        for name, root, text, text_digest, parser, sources in zip(*columns, strict=True)
    }


def read_bad_rows(group: h5py.Group) -> tuple[BadRows, ...]:
    """Read the number of rows that the build skipped, by shard and reason."""
    columns = zip(group["shard"][...].tolist(), read_texts(group, "reason"), group["rows"][...].tolist(), strict=True)
    return tuple(BadRows(shard=shard, reason=reason, rows=rows) for shard, reason, rows in columns)


def read_generations(group: h5py.Group) -> tuple[Generation, ...]:
    """Read the states that the file begins with, oldest first; the last is the newest."""
    names = ("shards", "blocks", "cells", "combos", "samples")
    fingerprints = read_texts(group, "fingerprint")
    lengths = zip(*(group[name][...].tolist() for name in names), strict=True)
    return tuple(
        Generation(fingerprint=fingerprint, **dict(zip(names, row, strict=True)))
        for fingerprint, row in zip(fingerprints, lengths, strict=True)
    )


def _read_property(name: str, group: h5py.Group) -> Property:
    return Property(name=name, kind=Kind(read_text(group, "kind")), values=read_texts(group, "values"))


def _read_shards(group: h5py.Group, datasets: Sequence[str]) -> ShardTable:
    paths = read_texts(group, "path")
    # Readers join these paths to the data root without a further check.
    for path in paths:
        if escapes(path):
            raise ValueError(f"shard {path!r} is outside the data root")
    check_range("shards/dataset", group["dataset"][...], 0, len(datasets) - 1)
    # A single unnamed data set needs no column of names.
    is_unnamed = tuple(datasets) == ("",)
    return ShardTable(
        path=paths,
        dataset=() if is_unnamed else tuple(datasets[i] for i in group["dataset"][...]),
        format=read_texts(group, "format"),
        rows=read_column(group, "rows", np.int64),
        size_bytes=read_column(group, "size_bytes", np.int64),
        mtime_ns=read_column(group, "mtime_ns", np.int64),
        fingerprint=tuple(row.tobytes().hex() for row in group["fingerprint"][...]),
    )


def _read_combos(group: h5py.Group, properties: Mapping[str, Property]) -> ComboTable:
    categorical = {name: prop for name, prop in properties.items() if prop.kind is not Kind.NUMBER}
    # Values per combo, from which the CSR bounds follow.
    counts = {name: read_column(group[name], "count", np.int64) for name in categorical}
    return ComboTable(
        num_combos=int(group.attrs["num_combos"]),
        properties=categorical,
        indptr={name: prepend_zero(np.cumsum(count)) for name, count in counts.items()},
        codes={name: read_column(group[name], "code", np.int32) for name in categorical},
        bad=int(group.attrs["bad"]),
    )


def _read_histogram(group: h5py.Group) -> Histogram:
    # The three long columns keep their narrow stored types: there may be a hundred million cells.
    return Histogram(
        indptr=prepend_zero(np.cumsum(read_column(group, "count", np.int64))),
        combo=group["combo"][...],
        rows=group["rows"][...],
        tokens=group["tokens"][...],
    )


def _read_blocks(file: h5py.File, chunk_rows: int, numbers: Sequence[str]) -> BlockTable:
    group = file["blocks"]
    shard = read_column(group, "shard", np.int32)
    rows = read_column(group, "rows", np.int32)
    return BlockTable(
        shard=shard,
        # Not stored: sums over the rows of the blocks before.
        first_row=first_rows(shard, rows),
        rows=rows,
        offset=read_column(group, "offset", np.int64),
        length=read_column(group, "length", np.int64),
        first_sample=first_samples(rows, chunk_rows)[:-1],
        zones={name: _read_zones(file["zones"][name]) for name in numbers},
    )


def _read_zones(group: h5py.Group) -> Zones:
    return Zones(
        low=read_column(group, "low", np.float64),
        high=read_column(group, "high", np.float64),
        has_null=read_column(group, "has_null", np.bool_),
    )
