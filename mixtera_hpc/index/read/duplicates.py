"""Find exact duplicates: samples whose documents have the same bytes, within data sets and across them.

Every rank hashes the documents of its part of the blocks (BLAKE2b, 128 bits) and sorts the hashes into files by their
first bits. Then every rank looks for equal hashes in its part of the files. Price: all documents are read once, and 32
bytes per sample are written beside the index; memory holds one of the files, 1/64 of them.
"""

import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Communicator, bcast_bytes
from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.formats.base import BlockRef, ShardReader, TokenReader
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.seek_points import seek_folder_of
from mixtera_hpc.formats.composed_text import open_reader
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.read.selection import SampleTest, sample_test

__all__ = ["DuplicateReport", "find_duplicates"]

NUM_FILES = 64
"""Files that hashes are sorted into. The first 6 bits of a hash choose the file."""
UNIT_ROWS = 1 << 14
"""Rows of neighbouring blocks that a rank hashes before it takes others."""
MAX_EXAMPLES = 5
_ENTRY = np.dtype([("low", "<u8"), ("high", "<u8"), ("block", "<u4"), ("row", "<u4"), ("dataset", "<u8")])
"""A hashed sample: its hash, its place in the index, and the number of its data set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DuplicateReport:
    """The duplicates of an index."""

    datasets: list[str]
    """Names of the data sets."""
    samples: list[int]
    """Samples of each data set that the query selects and that can be read."""
    within: list[int]
    """Samples of each data set that repeat an earlier one of the same data set."""
    shared: list[list[int]]
    """`shared[a][b]`: samples of data set b whose document also occurs in data set a; 0 for a = b."""
    duplicates: int
    """Samples that repeat an earlier one of any data set."""
    groups: int
    """Documents that occur more than once."""
    examples: list[list[tuple[str, int]]]
    """Some of these documents: shard and row of every sample that has it."""


def find_duplicates(
    index: PropertyIndex, comm: Communicator, write: Path | None = None, where: str | None = None
) -> DuplicateReport:
    """Find the exact duplicates among all samples that can be read; examples only on rank 0. **Collective.**

    Args:
        index: an open index, the same on every rank.
        comm: the ranks that share the work.
        where: a query (`query.where`) that selects the samples to compare; None takes all.
        write: rank 0 writes all groups of duplicates to this file, one JSON list of (shard, row) per line.

    Raises:
        ConfigError: the query names what the index does not have.
        DataError: a shard cannot be read.
        PropertyIndexError: no files can be written beside the index.
    """
    is_wanted = sample_test(where, index)
    folder = _shared_folder(index, comm)
    try:
        samples = _hash_documents(index, comm, folder, is_wanted)
        comm.Barrier()
        search = _Search(index, folder)
        for number in range(comm.rank, NUM_FILES, comm.size):
            search.add_file(number)
        # No rank returns from this before all files are complete.
        totals = comm.Allreduce(np.concatenate([samples, search.totals()]), "sum")
        examples = search.collect(write) if comm.rank == 0 else []
        return search.report(totals, examples)
    finally:
        if comm.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _shared_folder(index: PropertyIndex, comm: Communicator) -> Path:
    """Return a new folder that all ranks see, beside the index or, for one process, among temporary files."""
    name: bytes | None = None
    if comm.rank == 0:
        parent = None if comm.size == 1 else index.path.absolute().parent
        try:
            name = tempfile.mkdtemp(prefix=f".{index.path.name}.duplicates.", dir=parent).encode()
        except OSError as error:
            raise PropertyIndexError(
                f"No files can be written beside {index.path}: {error.strerror}.\n  Run it in one process, or copy the "
                "index to a folder that you may write to."
            ) from None
    return Path(bcast_bytes(comm, name).decode())


def _hash_documents(index: PropertyIndex, comm: Communicator, folder: Path, is_wanted: SampleTest) -> NDArray[np.int64]:
    """Hash this rank's part of the documents into files; return the number of samples of each data set."""
    names = sorted(set(index.shard_datasets()))
    counts = np.zeros(len(names), np.int64)
    files = [(folder / f"{number}-{comm.rank}").open("wb") for number in range(NUM_FILES)]
    try:
        for number, (shard, blocks) in enumerate(_units(index)):
            # Neighbouring units go to different ranks, since shards differ in size.
            if number % comm.size != comm.rank:
                continue
            dataset = names.index(index.shard_datasets()[shard])
            for entries in _entries_of(index, shard, blocks, dataset, is_wanted):
                counts[dataset] += len(entries)
                chosen = (entries["low"] >> np.uint64(58)).astype(np.int64)
                for part in np.unique(chosen).tolist():
                    files[part].write(entries[chosen == part].tobytes())
    finally:
        for file in files:
            file.close()
    return counts


def _units(index: PropertyIndex) -> Iterator[tuple[int, range]]:
    """Yield ranges of neighbouring blocks of one shard."""
    blocks = index.tables.blocks
    start = 0
    rows = 0
    for block in range(len(blocks)):
        is_other = blocks.shard[block] != blocks.shard[start]
        if block > start and (is_other or rows + int(blocks.rows[block]) > UNIT_ROWS):
            yield int(blocks.shard[start]), range(start, block)
            start = block
            rows = 0
        rows += int(blocks.rows[block])
    if len(blocks):
        yield int(blocks.shard[start]), range(start, len(blocks))


def _entries_of(
    index: PropertyIndex, shard: int, blocks: range, dataset: int, is_wanted: SampleTest
) -> Iterator[NDArray[Any]]:
    """Yield the hashed samples of each block."""
    file_format = load_format(index.tables.shards.format[shard])
    text = index.shard_texts()[shard]
    path = index.data_root / index.shard_paths()[shard]
    folders = [seek_folder_of(source.path) for source in index.sample_sources()]
    reader = open_reader(file_format, path, text, BlockCache(seek_folders=folders, max_block_bytes=sys.maxsize))
    try:
        for block in blocks:
            rows = np.flatnonzero(is_wanted(block))
            if not len(rows):
                continue
            samples = index.read_block(block)
            ref = BlockRef.of(index.tables.blocks, block)
            entries = np.zeros(len(rows), _ENTRY)
            contents = _contents(reader, ref, samples.length, rows, has_text=text is not None)
            digests = b"".join(hashlib.blake2b(content, digest_size=16).digest() for content in contents)
            hashes = np.frombuffer(digests, "<u8").reshape(-1, 2)
            entries["low"] = hashes[:, 0]
            entries["high"] = hashes[:, 1]
            entries["block"] = block
            entries["row"] = rows
            entries["dataset"] = dataset
            yield entries
    finally:
        reader.close()


def _contents(
    reader: ShardReader, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64], *, has_text: bool
) -> Iterator[bytes]:
    """Yield what is compared of each row: its token ids, its text, or the whole row if it has none."""
    if hasattr(reader, "tokens"):
        tokens = cast(TokenReader, reader).tokens(block, rows)
        return (np.asarray(ids, "<u4").tobytes() for ids in tokens)
    if has_text:
        return (text.encode("utf-8", "surrogatepass") for text in reader.documents(block, lengths, rows))
    payloads = reader.payloads(block, lengths, rows)
    return (msgspec.msgpack.encode(payload, order="deterministic") for payload in payloads)


class _Search:
    """Counts equal hashes, one file of hashes after the other."""

    def __init__(self, index: PropertyIndex, folder: Path) -> None:
        self._index = index
        self._folder = folder
        self._names = sorted(set(index.shard_datasets()))
        count = len(self._names)
        self._within = np.zeros(count, np.int64)
        self._shared = np.zeros((count, count), np.int64)
        self._duplicates = 0
        self._groups = 0

    def add_file(self, number: int) -> None:
        """Count the duplicates in one file of hashes of all ranks, and list them in another file."""
        parts = [np.fromfile(path, _ENTRY) for path in sorted(self._folder.glob(f"{number}-*"))]
        entries = np.concatenate([np.zeros(0, _ENTRY), *parts])
        # By hash, then by place, so that the result does not depend on who hashed what.
        entries = entries[np.lexsort((entries["row"], entries["block"], entries["high"], entries["low"]))]
        is_new = np.ones(len(entries), np.bool_)
        is_new[1:] = (entries["low"][1:] != entries["low"][:-1]) | (entries["high"][1:] != entries["high"][:-1])
        group = np.cumsum(is_new) - 1
        sizes = np.bincount(group)
        repeated = sizes[group] > 1 if len(entries) else is_new
        entries = entries[repeated]
        group = np.unique(group[repeated], return_inverse=True)[1]

        self._duplicates += int((sizes[sizes > 1] - 1).sum())
        self._groups += int((sizes > 1).sum())
        self._count_datasets(group, entries["dataset"].astype(np.int64))
        self._list(number, group, entries)

    def totals(self) -> NDArray[np.int64]:
        """Return all counts of this rank in one array."""
        return np.concatenate([self._within, self._shared.reshape(-1), [self._duplicates, self._groups]])

    def collect(self, write: Path | None) -> list[list[tuple[str, int]]]:
        """Return some groups of all ranks, and write all of them to a file."""
        lines: list[str] = []
        with (write or Path(os.devnull)).open("w") as collected:
            for number in range(NUM_FILES):
                with (self._folder / f"groups-{number}").open() as file:
                    lines += itertools.islice(file, MAX_EXAMPLES - len(lines))
                    file.seek(0)
                    shutil.copyfileobj(file, collected)
        return [[(shard, row) for shard, row in json.loads(line)] for line in lines]

    def report(self, totals: NDArray[np.int64], examples: list[list[tuple[str, int]]]) -> DuplicateReport:
        """Return the report of all ranks, given the samples of each data set and the sums of their counts."""
        count = len(self._names)
        return DuplicateReport(
            datasets=self._names,
            samples=totals[:count].tolist(),
            within=totals[count : 2 * count].tolist(),
            shared=totals[2 * count : -2].reshape(count, count).tolist(),
            duplicates=int(totals[-2]),
            groups=int(totals[-1]),
            examples=examples,
        )

    def _count_datasets(self, group: NDArray[np.int64], dataset: NDArray[np.int64]) -> None:
        """Count repetitions within data sets, and documents that several of them share."""
        count = len(self._names)
        cells, copies = np.unique(group * count + dataset, return_counts=True)
        cell_group, cell_dataset = np.divmod(cells, count)
        self._within += np.bincount(cell_dataset, copies - 1, count).astype(np.int64)
        # Pairs of data sets of one group: cells are sorted by group, so partners are at most `count` cells apart.
        for distance in range(1, count):
            same = np.flatnonzero(cell_group[distance:] == cell_group[:-distance])
            first, second = cell_dataset[same], cell_dataset[same + distance]
            np.add.at(self._shared, (first, second), copies[same + distance])
            np.add.at(self._shared, (second, first), copies[same])

    def _list(self, number: int, group: NDArray[np.int64], entries: NDArray[Any]) -> None:
        """Write the places of all duplicates, one group per line."""
        blocks = self._index.tables.blocks
        paths = self._index.shard_paths()
        shards = blocks.shard[entries["block"]].tolist()
        rows = (blocks.first_row[entries["block"]] + entries["row"]).tolist()
        places = [(paths[shard], row) for shard, row in zip(shards, rows, strict=True)]
        with (self._folder / f"groups-{number}").open("w") as file:
            for first, last in _runs(group):
                file.write(json.dumps(places[first:last], ensure_ascii=False) + "\n")


def _runs(values: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of each run of equal neighbours."""
    borders: Sequence[int] = (np.flatnonzero(values[1:] != values[:-1]) + 1).tolist()
    bounds = [0, *borders, len(values)] if len(values) else []
    yield from itertools.pairwise(bounds)
