"""Write the rows of compressed JSON lines into a row store, with any number of ranks.

Ranks take units (blocks of one file), decode them, and append their rows to a file of their own: rows with the same
categorical values together, in index order, in frames of about 64 KiB. A unit is logged after its rows are on disk, so
that a job that is killed continues with the units that are not in a log. Price: every file is decoded a second time
after the scan of the build. Memory of a rank: one decoded unit and its rows.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Communicator, bcast_bytes
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.formats.base import BlockRef
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.seek_points import seek_folder_of
from mixtera_hpc.formats.decoded_sizes import decodes_files
from mixtera_hpc.formats.readers.compressed_jsonl import CompressedJsonlReader
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.index.disk_errors import explain_disk_errors
from mixtera_hpc.index.read.configured import open_written
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.read.verify import check_shard
from mixtera_hpc.index.row_store.row_files import FRAME_BYTES, PLACE_BYTES, RowStoreFiles, RowStoreHeader
from mixtera_hpc.index.scan.parallel_scan import ProgressCallback
from mixtera_hpc.index.scan.scan_log import build_lock
from mixtera_hpc.index.scan.shared_units import share_units
from mixtera_hpc.index.store_folder import log_unit

__all__ = ["RowPlan", "RowReport", "write_rows"]

UNIT_BYTES = 16 << 20
"""Blocks of one file are written together up to this size on disk."""
EXTRA_SIZE = 1.3
"""Size of the store, per byte of the files: short frames compress less."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """The work of a job, before it begins."""

    folder: Path
    num_bytes: int
    """About the bytes that will be written."""
    free_bytes: int


class RowReport(msgspec.Struct, kw_only=True):
    """The result of a job."""

    folder: str
    num_bytes: int
    """Size of the complete store."""
    units_written: int
    seconds: float


class _BlockUnit(NamedTuple):
    """Consecutive blocks of one file that are written together."""

    first: int
    stop: int
    """One past the last block."""
    num_bytes: int
    """Bytes on disk; of long gzip members, decoded bytes."""


class _RowJob(msgspec.Struct, kw_only=True):
    """The work that rank 0 broadcasts to all ranks."""

    header: RowStoreHeader
    missing: list[int]
    """Units to write, by number."""
    attempt: int
    first_file: int
    """Number of the file of rank 0; those of the other ranks follow."""


def write_rows(
    config: Config, comm: Communicator, announce: Callable[[RowPlan], None], progress: ProgressCallback | None
) -> RowReport:
    """Write the row store of `index.path`, finish an interrupted one, or extend it after a refresh. **Collective.**

    Args:
        config: names the index.
        comm: the ranks that share the work.
        announce: called on rank 0 before anything is written.
        progress: called on rank 0 while units are written.

    Raises:
        ConfigError: the disk has too little room.
        DataError: a file cannot be read.
    """
    began_s = time.monotonic()
    files = RowStoreFiles.of_index(config.index.path)
    with open_written(config, announce=False) as index:
        if comm.rank > 0:
            job = msgspec.json.decode(bcast_bytes(comm, None), type=_RowJob)
            _write_units(index, files, job, comm, None)
        else:
            with _explain_disk_errors(files):
                files.folder.mkdir(parents=True, exist_ok=True)
                with build_lock(files.folder, "writing this row store"):
                    job = _prepare(index, files, announce)
                    bcast_bytes(comm, msgspec.json.encode(job))
                    _write_units(index, files, job, comm, progress)
                    _complete(files, job.header)
        comm.Barrier()
    return RowReport(
        folder=str(files.folder),
        num_bytes=sum(path.stat().st_size for path in files.folder.iterdir()) if comm.rank == 0 else 0,
        units_written=len(job.missing),
        seconds=time.monotonic() - began_s,
    )


def _units(index: PropertyIndex, kept_blocks: int) -> list[_BlockUnit]:
    """Return every unit that a store has to hold, without those of its first `kept_blocks` blocks."""
    blocks = index.tables.blocks
    is_wanted = [decodes_files(name) for name in index.tables.shards.format]
    units: list[_BlockUnit] = []
    shard_of_last = -1
    for block, (shard, length) in enumerate(zip(blocks.shard.tolist(), blocks.length.tolist(), strict=True)):
        if block < kept_blocks or not is_wanted[shard]:
            continue
        if units and shard == shard_of_last and units[-1].num_bytes < UNIT_BYTES:
            units[-1] = units[-1]._replace(stop=block + 1, num_bytes=units[-1].num_bytes + length)
        else:
            units.append(_BlockUnit(block, block + 1, length))
        shard_of_last = shard
    return units


def _prepare(index: PropertyIndex, files: RowStoreFiles, announce: Callable[[RowPlan], None]) -> _RowJob:
    """Create the files on rank 0, or find out what is there."""
    old = files.read_header()
    wanted = RowStoreHeader(
        index=index.fingerprint,
        rows=int(index.tables.blocks.rows.sum(dtype=np.int64)),
        places=f"places-{index.fingerprint[:16]}.bin",
        generations=[generation.fingerprint for generation in index.generations],
    )
    earlier = [g for g in index.generations[:-1] if old is not None and old.complete and g.fingerprint == old.index]
    same = old is not None and (old.version, old.index) == (wanted.version, wanted.index)
    if old is not None and same:
        wanted = msgspec.structs.replace(old, complete=False)
    elif earlier:
        wanted.kept_blocks = earlier[0].blocks
    units = _units(index, wanted.kept_blocks)
    done = files.logged_units() if same else set()
    missing = [number for number in range(len(units)) if number not in done]
    if old is not None and same and old.complete:
        missing = []
    plan = RowPlan(
        folder=files.folder,
        num_bytes=int(EXTRA_SIZE * sum(_bytes_on_disk(index, units[i]) for i in missing)) + PLACE_BYTES * wanted.rows,
        free_bytes=shutil.disk_usage(files.folder).free,
    )
    announce(plan)
    if plan.num_bytes > plan.free_bytes:
        raise ConfigError(
            f"The row store needs about {plan.num_bytes / 1e9:,.3g} GB in {plan.folder}, but "
            f"{plan.free_bytes / 1e9:,.3g} GB are free.\n"
            "  Make room, set index.path to another file system, or set data.materialize=never."
        )
    # A run that is active may still open the files of before by their names, so no name is used again.
    numbers = [int(path.stem.split("-")[1]) for path in files.folder.glob("rows-*.zst")]
    if not same:
        _begin(files, wanted, files.folder / old.places if old is not None and earlier else None)
    attempts = [int(path.stem.split("-")[1]) for path in files.logs()]
    return _RowJob(
        header=wanted,
        missing=missing,
        attempt=1 + max(attempts, default=0),
        first_file=1 + max(numbers, default=0),
    )


def _bytes_on_disk(index: PropertyIndex, unit: _BlockUnit) -> int:
    """Return the part of a file that a unit is in; the blocks of long gzip members count decoded bytes."""
    shard = int(index.tables.blocks.shard[unit.first])
    return min(unit.num_bytes, int(index.tables.shards.size_bytes[shard]))


def _begin(files: RowStoreFiles, header: RowStoreHeader, kept_places: Path | None) -> None:
    """Begin a store. With the places of an earlier generation its rows stay, else everything is removed."""
    places = files.folder / header.places
    if kept_places is None:
        # The header goes first: without it, no run takes what is left for a store.
        for path in (files.header, *files.logs(), *files.folder.glob("rows-*.zst"), *files.folder.glob("places-*.bin")):
            path.unlink(missing_ok=True)
    else:
        # A job that was killed when its store was complete may have left logs, whose units are others now.
        for path in files.logs():
            path.unlink()
        shutil.copyfile(kept_places, places)
    with places.open("ab") as file:
        file.truncate(PLACE_BYTES * header.rows)
        os.fsync(file.fileno())
    files.write_header(header)


def _write_units(
    index: PropertyIndex, files: RowStoreFiles, job: _RowJob, comm: Communicator, progress: ProgressCallback | None
) -> None:
    """Write the missing units. **Collective.**"""
    units = _units(index, job.header.kept_blocks)
    missing = [units[number] for number in job.missing]
    if not missing:
        return
    with _explain_disk_errors(files), _RowWriter(index, files, job, comm.rank) as writer:

        def write(position: int) -> int:
            return writer.write(missing[position], job.missing[position])

        share_units([unit.num_bytes for unit in missing], write, comm, progress)


def _complete(files: RowStoreFiles, header: RowStoreHeader) -> None:
    files.write_header(msgspec.structs.replace(header, complete=True))
    # Also what killed jobs have left, and the places of another index.
    other_places = set(files.folder.glob("places-*.bin")) - {files.folder / header.places}
    for path in (*files.logs(), *files.unfinished_headers(), *other_places):
        path.unlink()


class _RowWriter:
    """The writer of units into the file of one rank."""

    def __init__(self, index: PropertyIndex, files: RowStoreFiles, job: _RowJob, rank: int) -> None:
        """Open the files."""
        self._index = index
        self._paths = index.shard_paths()
        self._cache = BlockCache(seek_folders=[seek_folder_of(index.path)])
        self._first_rows = np.concatenate([[0], np.cumsum(index.tables.blocks.rows, dtype=np.int64)])
        self._number = job.first_file + rank
        # Four bytes per frame, which show damage when a run decodes it.
        self._compress = zstandard.ZstdCompressor(write_checksum=True).compress
        # Buffered files write everything or raise; a full disk lets a single call write a part.
        self._places = (files.folder / job.header.places).open("r+b")
        self._rows = files.rows(self._number).open("xb")
        self._log = files.log(job.attempt, rank).open("xb")

    def __enter__(self) -> "_RowWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._rows, self._places, self._log):
            file.close()

    def write(self, unit: _BlockUnit, number: int) -> int:
        """Write the rows of a unit, and log its number; return the rows."""
        index = self._index
        blocks = range(unit.first, unit.stop)
        first_row = int(self._first_rows[unit.first])
        samples = index.read_blocks(np.arange(unit.first, unit.stop, dtype=np.int32), {"combo"})
        chosen = np.flatnonzero(samples.combo != index.tables.combos.bad)
        lines = self._lines(blocks, chosen, first_row)
        places = np.zeros((len(samples.combo), 2), "<i8")
        order = np.argsort(samples.combo[chosen], kind="stable")
        for frame in _frames(order, samples.combo[chosen][order].astype(np.int64), lines):
            content = self._compress(b"".join([lines[i] for i in frame.tolist()]))
            places[chosen[frame], 0] = (self._number << 48) + self._rows.tell()
            places[chosen[frame], 1] = (len(content) << 32) + np.arange(len(frame))
            self._rows.write(content)
        self._rows.flush()
        self._places.seek(PLACE_BYTES * first_row)
        self._places.write(places.tobytes())
        self._places.flush()
        # After the reads: rows that changed meanwhile may be as long as before.
        shard = int(index.tables.blocks.shard[unit.first])
        check_shard(index, shard, self._paths[shard])
        # The log must not reach the disk before the rows.
        os.fdatasync(self._rows.fileno())
        os.fdatasync(self._places.fileno())
        log_unit(self._log.fileno(), number)
        return len(places)

    def _lines(self, blocks: range, chosen: Ints, first_row: int) -> list[bytes]:
        """Return the lines of the chosen rows, counted from the first one of the blocks."""
        tables = self._index.tables
        shard = int(tables.blocks.shard[blocks.start])
        path = self._index.data_root / self._paths[shard]
        reader = load_format(tables.shards.format[shard]).open(path, None, self._cache)
        # All formats whose files are decoded as a whole are compressed JSON lines.
        if not isinstance(reader, CompressedJsonlReader):
            raise TypeError(f"{path} is read by {type(reader).__name__}")
        lines: list[bytes] = []
        try:
            for block in blocks:
                begin, end = (self._first_rows[block : block + 2] - first_row).tolist()
                rows = chosen[np.searchsorted(chosen, begin) : np.searchsorted(chosen, end)] - begin
                found = reader.lines(BlockRef.of(tables.blocks, block), rows)
                lines += [bytes(line).strip() + b"\n" for line in found]
        finally:
            reader.close()
        return lines


def _frames(order: Ints, combos: Ints, lines: list[bytes]) -> Iterator[Ints]:
    """Cut rows, sorted by combo, into frames: consecutive rows of one combo of about `FRAME_BYTES`."""
    if not len(order):
        return
    sizes = np.array([len(lines[i]) for i in order.tolist()], np.int64)
    before = np.cumsum(sizes) - sizes
    is_first = np.diff(combos, prepend=combos[0] - 1) != 0
    in_combo = before - np.maximum.accumulate(np.where(is_first, before, 0))
    number = in_combo // FRAME_BYTES
    borders = np.flatnonzero(is_first | (np.diff(number, prepend=-1) != 0))
    for first, last in pairwise([*borders.tolist(), len(order)]):
        yield order[first:last]


def _explain_disk_errors(files: RowStoreFiles) -> AbstractContextManager[None]:
    """Say what to do if the disk does not take the data."""
    return explain_disk_errors(
        ConfigError,
        files.folder,
        f"The row store cannot be written to {files.folder}",
        "Everything that was scanned, and all units that are finished, stay. Make room, or make the folder and its "
        "files writable, and run the same command again: it continues with what is missing. Or set "
        "data.materialize=never.",
    )
