"""Write the columns of an index file from front to back, and compute its fingerprint on the way.

Lengths and types are known before the first value is written, so memory does not grow with the index: long columns go
through a buffer of one HDF5 chunk. The bytes of the file depend on the order in which groups, columns and attributes
are created.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.index.build.merge import MergedTables, TranslatedResult
from mixtera_hpc.index.layout import TABLE_CHUNK, first_samples, narrow, narrow_type, write_column, write_texts

__all__ = ["BlockWriter", "TableWriter"]


class TableWriter:
    """Writes table columns, and digests each of them; the fingerprint is the digest of all digests."""

    def __init__(self, file: h5py.File) -> None:
        self.file = file
        self._digests: dict[str, Any] = {}

    def write_column(self, group: str, name: str, values: NDArray[Any], *, in_fingerprint: bool = True) -> None:
        """Write a table column that is in memory."""
        # The digest is of the stored bytes, so it covers the type as well.
        stored = narrow(values)
        write_column(self.file.require_group(group), name, stored)
        if in_fingerprint:
            self.new_digest(f"{group}/{name}", stored.dtype).update(np.ascontiguousarray(stored).data)

    def write_texts(self, group: str, name: str, texts: Sequence[str]) -> None:
        """Write a column of texts."""
        write_texts(self.file.require_group(group), name, texts)
        digest = self.new_digest(f"{group}/{name}", np.dtype("u1"))
        for text in texts:
            encoded = text.encode()
            # With the length in front, ["a", "b"] and ["ab"] differ.
            digest.update(len(encoded).to_bytes(8, "little") + encoded)

    def new_digest(self, name: str, dtype: np.dtype[Any]) -> Any:
        """Return the digest that the values of a column go into."""
        self._digests[name] = hashlib.blake2b(f"{name} {dtype.str} ".encode(), digest_size=16)
        return self._digests[name]

    def fingerprint(self, settings: str) -> str:
        """Return the hex digest of all columns so far and of `settings`."""
        digest = hashlib.blake2b(settings.encode(), digest_size=16)
        # By name, so that the order of writing does not matter.
        for name in sorted(self._digests):
            digest.update(self._digests[name].digest())
        return digest.hexdigest()


class BlockWriter:
    """Writes the columns of blocks and samples, one scan result after the other."""

    def __init__(self, tables: TableWriter, merged: MergedTables, num_shards: int) -> None:
        block_columns = _block_column_types(merged, num_shards)
        self._columns = {
            name: _new_column(tables, name, dtype, length) for name, (dtype, length) in block_columns.items()
        }
        self._samples = _SampleWriter(tables, merged)
        self.tokens = 0
        """Tokens of all samples written."""
        self.known_numbers: set[str] = set()
        """Number properties of which some value is not null."""

    def add(self, shard: int | NDArray[np.int64], result: TranslatedResult) -> None:
        """Write the blocks of a result; `shard` is the position of the shard of all blocks, or of each."""
        blocks = result.blocks
        # One number for all blocks, or one for each.
        self._columns["blocks/shard"].add(np.broadcast_to(shard, len(blocks["rows"])))
        for name in ("rows", "offset", "length"):
            self._columns[f"blocks/{name}"].add(blocks[name])
        for number, zones in result.zones.items():
            for name, values in zones.items():
                self._columns[f"zones/{number}/{name}"].add(values)
            if not np.isnan(zones["low"]).all():
                self.known_numbers.add(number)
        self._columns["histogram/count"].add(blocks["count"])
        for name in ("combo", "rows", "tokens"):
            self._columns[f"histogram/{name}"].add(result.cells[name])
        self.tokens += int(result.cells["tokens"].sum())
        self._samples.add(blocks["rows"], result.samples)

    def finish(self) -> None:
        """Write what is still buffered."""
        for column in self._columns.values():
            column.write_buffered()
        self._samples.write_buffered()


class _BufferedColumn:
    """A column of known length, written in whole chunks."""

    def __init__(self, dataset: Any, digest: Any) -> None:
        self._dataset = dataset
        self._digest = digest
        self._buffer: list[NDArray[Any]] = []
        self._num_buffered = 0
        self._num_written = 0

    def add(self, values: NDArray[Any]) -> None:
        """Append values, and write the chunks that are complete."""
        stored = np.ascontiguousarray(values, self._dataset.dtype)
        self._digest.update(stored.data)
        self._buffer.append(stored)
        self._num_buffered += len(stored)
        # Whole chunks only: HDF5 would read, change and write a partly filled one again.
        if self._num_buffered >= TABLE_CHUNK:
            self._write(self._num_buffered // TABLE_CHUNK * TABLE_CHUNK)

    def write_buffered(self) -> None:
        """Write everything that is buffered."""
        self._write(self._num_buffered)

    def _write(self, count: int) -> None:
        """Write the first `count` of the buffered values."""
        values = np.concatenate(self._buffer) if self._buffer else np.zeros(0, self._dataset.dtype)
        if count:
            self._dataset[self._num_written : self._num_written + count] = values[:count]
        self._num_written += count
        self._num_buffered -= count
        self._buffer = [values[count:].copy()]  # Copied, so that the written values are freed.


class _SampleWriter:
    """Writes the compressed per-sample columns, each block at the start of a chunk."""

    def __init__(self, tables: TableWriter, merged: MergedTables) -> None:
        self._chunk_rows = merged.chunk_rows
        self._types = _sample_types(merged)
        self._digests = {name: tables.new_digest(f"samples/{name}", dtype) for name, dtype in self._types.items()}
        group = tables.file.require_group("samples")
        group.require_group("numbers")
        self._datasets = {
            name: group.create_dataset(
                name,
                (merged.padded_rows,),
                dtype,
                chunks=(merged.chunk_rows,),
                shuffle=True,
                # Shuffling puts the high bytes together, most of which are zero, so that the fastest level is enough.
                compression=1,
                fletcher32=True,
            )
            for name, dtype in self._types.items()
        }
        self._buffers: dict[str, list[NDArray[Any]]] = {name: [] for name in self._types}
        self._num_buffered = 0
        self._num_written = 0

    def add(self, rows: NDArray[np.int64], samples: dict[str, NDArray[Any]]) -> None:
        """Append the samples of some blocks, given the rows of each block."""
        # Rows move to the chunk where their block begins; the padding behind short blocks stays zero.
        bounds = first_samples(rows, self._chunk_rows)
        rows_before = np.cumsum(rows) - rows
        position = np.repeat(bounds[:-1] - rows_before, rows) + np.arange(int(rows.sum()))
        for name, dtype in self._types.items():
            stored = samples[name].astype(dtype)
            self._digests[name].update(stored.data)
            padded = np.zeros(int(bounds[-1]), dtype)
            padded[position] = stored
            self._buffers[name].append(padded)
        self._num_buffered += int(bounds[-1])
        if self._num_buffered >= TABLE_CHUNK:
            self.write_buffered()

    def write_buffered(self) -> None:
        """Write everything that is buffered.

        Small results are written together, since a write costs as much as a block.
        """
        end = self._num_written + self._num_buffered
        for name, dataset in self._datasets.items():
            if self._num_buffered:
                dataset[self._num_written : end] = np.concatenate(self._buffers[name])
            self._buffers[name].clear()
        self._num_written = end
        self._num_buffered = 0


def _block_column_types(merged: MergedTables, num_shards: int) -> dict[str, tuple[np.dtype[Any], int]]:
    """Return type and length of every column of blocks, zones and histogram, in the order of creation."""

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
    """Return the type of every sample column, in the order of creation."""
    types = {"combo": narrow_type(max(merged.combos.num_combos - 1, 0))}
    for name in ("length", "tokens"):
        if f"samples/{name}" in merged.maxima:
            types[name] = narrow_type(merged.maxima[f"samples/{name}"])
    # Floats are stored as they are: a narrower type would change comparisons.
    return types | {f"numbers/{name}": np.dtype("<f8") for name in merged.numbers}


def _new_column(tables: TableWriter, name: str, dtype: np.dtype[Any], length: int) -> _BufferedColumn:
    group, _, column = name.rpartition("/")
    # HDF5 refuses chunks for empty columns.
    storage: dict[str, Any] = {"chunks": (min(length, TABLE_CHUNK),), "fletcher32": True} if length else {}
    dataset = tables.file.require_group(group).create_dataset(column, (length,), dtype, **storage)
    return _BufferedColumn(dataset, tables.new_digest(name, dtype))
