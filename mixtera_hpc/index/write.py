"""Merged parts → an HDF5 file that appears under its name whole, or not at all.

The bytes depend on the content only: no times, fixed order. Beside them a fingerprint is taken of everything a plan depends on:
not of the data root, nor of when files were changed.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.properties import Kind, Property
from mixtera_hpc.core.tables import ShardTable
from mixtera_hpc.index.layout import (
    FORMAT,
    VERSION,
    first_samples,
    narrow,
    narrow_type,
    put_column,
    put_text,
    put_texts,
)
from mixtera_hpc.index.merge import Merged

__all__ = ["IndexFacts", "publish", "write_index"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexFacts:
    """What an index says about itself."""

    data_root: str
    text: str | None
    tokenizer: str | None
    """Fingerprint of the tokenizer that counted."""
    parser: str | None = None
    """Import path of the user's function that properties come from."""

    def texts(self) -> dict[str, str]:
        """The attributes that are text."""
        told = {"text": self.text, "tokenizer": self.tokenizer, "parser": self.parser}
        return {"format": FORMAT, "data_root": self.data_root} | {name: value or "" for name, value in told.items()}


def write_index(
    path: Path, facts: IndexFacts, shards: ShardTable, merged: Merged, samples: Iterator[dict[str, NDArray[Any]]]
) -> str:
    """Write the file to `path`, flushed to disk; returns the index's fingerprint."""
    with h5py.File(path, "w", libver=("v110", "v110"), track_order=False, locking=False) as file:
        tables = _Tables(file)
        _write_shards(tables, shards)
        file.require_group("properties")
        for prop in merged.properties.values():
            tables.texts(f"properties/{prop.name}", "values", prop.values)
            put_text(file[f"properties/{prop.name}"], "kind", prop.kind)
        _write_combos(tables, merged)
        _write_blocks(tables, merged)
        _write_samples(tables, merged, samples)
        fingerprint = tables.fingerprint(facts, merged.properties)
        for name, text in facts.texts().items():
            put_text(file, name, text)
        put_text(file, "fingerprint", fingerprint)
        file.attrs["version"] = VERSION
        file.attrs["num_samples"] = int(shards.rows.sum())
        file.attrs["chunk_rows"] = merged.chunk_rows
    _sync(path)
    return fingerprint


def publish(part: Path, path: Path) -> None:
    """Give a finished file its name; an older one is replaced in the same instant."""
    part.replace(path)
    _sync(path.parent)


class _Tables:
    """Writes columns and takes their fingerprint on the way."""

    def __init__(self, file: h5py.File) -> None:
        self.file = file
        self._digest = hashlib.blake2b(digest_size=16)

    def column(self, group: str, name: str, values: NDArray[Any], *, counts: bool = True) -> None:
        """Store a table column; `counts` says whether it is part of the fingerprint."""
        stored = narrow(values)
        put_column(self.file.require_group(group), name, stored)
        if counts:
            self.count(f"{group}/{name}", stored)

    def texts(self, group: str, name: str, texts: tuple[str, ...]) -> None:
        """Store a column of texts."""
        put_texts(self.file.require_group(group), name, texts)
        encoded = [text.encode() for text in texts]
        self.count(f"{group}/{name}", np.array([len(e) for e in encoded], "<i8"))
        self._digest.update(b"".join(encoded))

    def count(self, name: str, values: NDArray[Any]) -> None:
        """Make values part of the fingerprint."""
        self._digest.update(f"{name} {values.dtype.str} {values.shape}".encode())
        self._digest.update(np.ascontiguousarray(values).data)

    def fingerprint(self, facts: IndexFacts, properties: dict[str, Property]) -> str:
        """Hex digest of everything counted."""
        kinds = [(p.name, str(p.kind)) for p in properties.values()]
        self._digest.update(repr((VERSION, facts.text, facts.tokenizer, facts.parser, kinds)).encode())
        return self._digest.hexdigest()


def _write_shards(tables: _Tables, shards: ShardTable) -> None:
    tables.texts("shards", "path", shards.path)
    tables.texts("shards", "format", shards.format)
    tables.column("shards", "rows", shards.rows)
    tables.column("shards", "size_bytes", shards.size_bytes)
    tables.column("shards", "mtime_ns", shards.mtime_ns, counts=False)
    digests = np.frombuffer(bytes.fromhex("".join(shards.fingerprint)), np.uint8)
    tables.column("shards", "fingerprint", digests.reshape(len(shards.path), -1))


def _write_combos(tables: _Tables, merged: Merged) -> None:
    tables.file.require_group("combos").attrs["num_combos"] = merged.combos.num_combos
    for name in merged.combos.properties:
        tables.column(f"combos/{name}", "count", np.diff(merged.combos.indptr[name]))
        tables.column(f"combos/{name}", "code", merged.combos.codes[name])


def _write_blocks(tables: _Tables, merged: Merged) -> None:
    blocks, histogram = merged.blocks, merged.histogram
    for name in ("shard", "rows", "offset", "length"):
        tables.column("blocks", name, getattr(blocks, name))
    for number, zones in blocks.zones.items():
        tables.column(f"zones/{number}", "low", zones.low)
        tables.column(f"zones/{number}", "high", zones.high)
        tables.column(f"zones/{number}", "has_null", zones.has_null.astype(np.uint8))
    tables.column("histogram", "count", np.diff(histogram.indptr))
    for name in ("combo", "rows", "tokens"):
        tables.column("histogram", name, getattr(histogram, name))


def _write_samples(tables: _Tables, merged: Merged, samples: Iterator[dict[str, NDArray[Any]]]) -> None:
    """Unit by unit: rows go where their blocks begin, the gaps behind short blocks stay zero."""
    bounds = first_samples(merged.blocks.rows, merged.chunk_rows)
    types = {name: narrow_type(largest) for name, largest in merged.maxima.items()}
    types |= {f"numbers/{p.name}": np.dtype("<f8") for p in merged.properties.values() if p.kind is Kind.NUMBER}
    group = tables.file.require_group("samples")
    group.require_group("numbers")
    for name, dtype in types.items():
        group.create_dataset(
            name, (bounds[-1],), dtype, chunks=(merged.chunk_rows,), shuffle=True, compression=1, fletcher32=True
        )
    block = 0
    for columns in samples:
        first, rows = block, 0
        while rows < len(columns["combo"]):
            rows += int(merged.blocks.rows[block])
            block += 1
        place = _places(bounds[first : block + 1], merged.blocks.rows[first:block])
        for name, dtype in types.items():
            stored = columns[name].astype(dtype)
            tables.count(name, stored)
            padded = np.zeros(bounds[block] - bounds[first], dtype)
            padded[place] = stored
            if len(padded):
                group[name][bounds[first] : bounds[block]] = padded


def _places(bounds: NDArray[np.int64], rows: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where the rows of consecutive blocks go, counted from the first of them."""
    row = np.arange(int(rows.sum())) - np.repeat(np.cumsum(rows) - rows, rows)
    return np.asarray(np.repeat(bounds[:-1] - bounds[0], rows) + row, np.int64)


def _sync(path: Path) -> None:
    """Have the disk know of a file, or of the names in a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
