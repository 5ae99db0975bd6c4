"""Tokenize all documents of an index into a token store, with any number of ranks.

Rank 0 prepares the files; all ranks then take units through a shared counter, tokenize them and write every document to
its place. The bytes are the same for any number of ranks. A unit is logged after its tokens are on disk, so that a job
that is killed at any moment continues with the units that are not in a log.
"""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Communicator, bcast_bytes
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError, DataError, PropertyIndexError
from mixtera_hpc.formats.base import BlockRef, ShardReader
from mixtera_hpc.formats.chat_rows import is_chat
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.seek_points import seek_folder_of
from mixtera_hpc.formats.composed_text import open_reader
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.index.read.configured import open_written
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.read.verify import check_fresh
from mixtera_hpc.index.scan.parallel_scan import ProgressCallback, ScanProgress
from mixtera_hpc.index.scan.scan_log import build_lock
from mixtera_hpc.index.token_store.store_files import (
    StoreFiles,
    StoreHeader,
    read_header,
    store_folder,
    token_type,
)
from mixtera_hpc.index.token_store.store_layout import StoreLayout, StoreUnit
from mixtera_hpc.tokens.tokenizer import Tokenizer, load_vocabulary

__all__ = ["StorePlan", "StoreReport", "write_store"]

NEXT_UNIT, UNITS_DONE, ROWS_DONE, BYTES_DONE = range(4)
"""The shared counters."""
WAIT_S = 0.05
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True, slots=True, kw_only=True)
class StorePlan:
    """The work of a job, before it begins."""

    folder: Path
    tokens: int
    dtype: str
    num_bytes: int
    """Size of the complete store."""
    free_bytes: int
    missing_units: int
    num_units: int


class StoreReport(msgspec.Struct, kw_only=True):
    """The result of a job."""

    folder: str
    tokens: int
    num_bytes: int
    units_written: int
    """Units that this job wrote; the others were there."""
    seconds: float


class _Job(msgspec.Struct):
    """What rank 0 broadcasts to all ranks."""

    missing: list[int]
    attempt: int


def write_store(
    config: Config,
    comm: Communicator,
    announce: Callable[[StorePlan], None] = lambda plan: None,
    progress: ProgressCallback | None = None,
) -> StoreReport:
    """Write the token store of `index.path`, or finish an interrupted one. **Collective.**

    Args:
        config: names the index, the tokenizer and the store (`data.tokens`).
        comm: the ranks that share the work.
        announce: called on rank 0 before anything is written.
        progress: called on rank 0 while units are written.

    Raises:
        ConfigError: the disk has too little room, the folder is no token store, or documents are conversations.
        PropertyIndexError: the index is missing or stale, or was built with another tokenizer or without one.
        DataError: a document cannot be read, or has other tokens than the index counted.
    """
    began_s = time.monotonic()
    tokenizer = load_vocabulary(config.dataplane)
    with open_written(config, announce=comm.rank == 0) as index:
        files = StoreFiles(store_folder(config, config.index.path))
        writer = _UnitWriter(index, _checked_tokenizer(index, tokenizer), files)
        if comm.rank > 0:
            job = msgspec.json.decode(bcast_bytes(comm, None), type=_Job)
            _write_units(writer, job, comm, None)
        else:
            check_fresh(index)
            _make_folder(files)
            with build_lock(files.folder), _explained(files):
                job = _prepare(writer, announce)
                bcast_bytes(comm, msgspec.json.encode(job))
                _write_units(writer, job, comm, progress)
                _complete(writer)
        comm.Barrier()
    return StoreReport(
        folder=str(files.folder),
        tokens=writer.layout.num_tokens,
        num_bytes=writer.num_bytes,
        units_written=len(job.missing),
        seconds=time.monotonic() - began_s,
    )


class _UnitWriter:
    """Tokenizes units and writes their documents to their places; one per rank."""

    def __init__(self, index: PropertyIndex, tokenizer: Tokenizer, files: StoreFiles) -> None:
        self.files = files
        self.layout = StoreLayout.of(index.tables)
        self.units = self.layout.units()
        self._index = index
        self._tokenizer = tokenizer
        self._dtype = token_type(tokenizer.vocab_size)
        self._cache = BlockCache(seek_folders=[seek_folder_of(index.path)])
        self._paths = index.shard_paths()
        self._texts = index.shard_texts()

    @property
    def header(self) -> StoreHeader:
        """The header of the store, not yet complete."""
        return StoreHeader(
            index=self._index.fingerprint,
            tokenizer=self._tokenizer.fingerprint,
            dtype=self._dtype.str,
            rows=int(self.layout.first_rows[-1]),
            tokens=self.layout.num_tokens,
        )

    @property
    def num_bytes(self) -> int:
        """Size of the complete store."""
        return self.layout.num_tokens * self._dtype.itemsize + 8 * int(self.layout.first_rows[-1])

    def write(self, unit: StoreUnit, tokens_file: int, starts_file: int) -> int:
        """Tokenize one unit and write it to two open files; return its rows.

        Raises:
            DataError: a document cannot be read, or has other tokens than the index counted.
        """
        samples = self._index.read_blocks(np.arange(unit.first_block, unit.last_block, dtype=np.int32))
        starts = self.layout.row_starts(unit, samples)
        is_good = samples.combo != self._index.tables.combos.bad
        chosen = np.flatnonzero(is_good)
        encoded = self._encode(unit, is_good, samples.length)
        counts = np.fromiter(map(len, encoded), np.int64, len(encoded))
        wrong = np.flatnonzero(counts != samples.tokens[chosen])
        if len(wrong):
            raise self._count_error(unit, int(chosen[wrong[0]]), int(counts[wrong[0]]))

        # Documents whose places follow each other are written in one call.
        order = np.argsort(starts[chosen], kind="stable")
        begins = starts[chosen][order]
        borders = np.flatnonzero(begins[1:] != (begins + counts[order])[:-1]) + 1
        for run in np.split(order, borders):
            if len(run):
                tokens = np.concatenate([encoded[i] for i in run.tolist()]).astype(self._dtype)
                _write_all(tokens_file, tokens.tobytes(), int(starts[chosen[run[0]]]) * self._dtype.itemsize)
        _write_all(starts_file, starts.tobytes(), 8 * int(self.layout.first_rows[unit.first_block]))
        return len(starts)

    def _encode(
        self, unit: StoreUnit, is_good: NDArray[np.bool_], lengths: NDArray[np.int64]
    ) -> list[NDArray[np.uint32]]:
        """Return the tokens of every good row of a unit."""
        blocks = self._index.tables.blocks
        reader = self._open(int(blocks.shard[unit.first_block]))
        encoded: list[NDArray[np.uint32]] = []
        first_row = int(self.layout.first_rows[unit.first_block])
        try:
            for number in range(unit.first_block, unit.last_block):
                own = slice(*(self.layout.first_rows[number : number + 2] - first_row).tolist())
                rows = np.flatnonzero(is_good[own])
                texts = reader.documents(BlockRef.of(blocks, number), lengths[own], rows)
                encoded += self._tokenizer.encode_each(texts)
        finally:
            reader.close()
        return encoded

    def _open(self, shard: int) -> ShardReader:
        path = self._index.data_root / self._paths[shard]
        return open_reader(load_format(self._index.tables.shards.format[shard]), path, self._texts[shard], self._cache)

    def _count_error(self, unit: StoreUnit, row: int, num_tokens: int) -> DataError:
        blocks = self._index.tables.blocks
        shard = self._paths[int(blocks.shard[unit.first_block])]
        return DataError(
            f"{shard} row {int(blocks.first_row[unit.first_block]) + row} has {num_tokens} tokens, which is not what "
            "the index counted: the file has changed.\n  Run mixtera-hpc index verify, and build the index again."
        )


def _prepare(writer: _UnitWriter, announce: Callable[[StorePlan], None]) -> _Job:
    """Create the files on rank 0, or find out what an interrupted job has written.

    Raises:
        ConfigError: the disk has too little room, or the folder is no token store.
    """
    files = writer.files
    header = read_header(files)
    wanted = writer.header
    same = header is not None and msgspec.structs.replace(header, complete=False) == wanted
    if header is None and any(path.name != "lock" for path in files.folder.iterdir()):
        raise ConfigError(
            f"{files.folder} is not empty and holds no token store.\n  Set data.tokens to a new folder, or empty it."
        )
    done = _logged_units(files) if same else set()
    missing = [number for number in range(len(writer.units)) if number not in done]
    if header is not None and same and header.complete:
        missing = []

    free_bytes = shutil.disk_usage(files.folder).free
    plan = StorePlan(
        folder=files.folder,
        tokens=wanted.tokens,
        dtype=wanted.dtype,
        num_bytes=writer.num_bytes,
        free_bytes=free_bytes,
        missing_units=len(missing),
        num_units=len(writer.units),
    )
    announce(plan)
    _check_room(plan)
    if missing or not same:
        _create(files, wanted, same=same)
    attempts = [int(path.stem.split("-")[1]) for path in files.logs()]
    return _Job(missing=missing, attempt=1 + max(attempts, default=0))


def _check_room(plan: StorePlan) -> None:
    """Refuse to begin what the disk cannot take."""
    needed = plan.num_bytes * plan.missing_units // max(plan.num_units, 1)
    if needed > plan.free_bytes:
        raise ConfigError(
            f"The token store needs {needed / 1e9:,.3g} GB in {plan.folder}, but {plan.free_bytes / 1e9:,.3g} GB are "
            "free.\n  Make room, or set data.tokens to a folder on another file system."
        )


def _create(files: StoreFiles, header: StoreHeader, *, same: bool) -> None:
    """Begin a store, or continue one with the `same` header; what another index or tokenizer left is removed."""
    if not same:
        # The header goes first: without it, no run takes what is left for a store.
        for path in (files.header, *files.logs(), files.tokens, files.starts):
            path.unlink(missing_ok=True)
    files.write_header(header)
    for path, size in (
        (files.tokens, header.tokens * np.dtype(header.dtype).itemsize),
        (files.starts, 8 * header.rows),
    ):
        with path.open("ab") as file:
            file.truncate(size)


def _write_units(writer: _UnitWriter, job: _Job, comm: Communicator, progress: ProgressCallback | None) -> None:
    """Take units and write them until none is left. **Collective.**"""
    if not job.missing:
        return
    counters = comm.Allocate_counters(4)
    units = [writer.units[number] for number in job.missing]
    total = sum(unit.num_bytes for unit in units)

    def report() -> int:
        done, rows, num_bytes = (counters.Fetch_and_add(i, 0) for i in (UNITS_DONE, ROWS_DONE, BYTES_DONE))
        if progress is not None:
            progress(ScanProgress(rows=rows, bytes_done=num_bytes, bytes_total=total))
        return done

    with (
        _explained(writer.files),
        _open_files(writer.files, f"done-{job.attempt}-{comm.rank}.log") as (tokens, starts, log),
    ):
        while (position := counters.Fetch_and_add(NEXT_UNIT, 1)) < len(units):
            rows = writer.write(units[position], tokens, starts)
            # The log must not reach the disk before the tokens.
            os.fdatasync(tokens)
            os.fdatasync(starts)
            os.write(log, b"%d\n" % job.missing[position])
            for counter, value in ((ROWS_DONE, rows), (BYTES_DONE, units[position].num_bytes), (UNITS_DONE, 1)):
                counters.Fetch_and_add(counter, value)
            if comm.rank == 0:
                report()
    # Rank 0 reports for the others until they are done.
    while comm.rank == 0 and report() < len(units):
        time.sleep(WAIT_S)
    comm.Barrier()
    counters.Free()


def _complete(writer: _UnitWriter) -> None:
    """Mark the store as complete; the logs are not needed any more."""
    files = writer.files
    header = read_header(files)
    if header is not None and not header.complete:
        files.write_header(msgspec.structs.replace(header, complete=True))
    for path in files.logs():
        path.unlink()


def _logged_units(files: StoreFiles) -> set[int]:
    """Return the units that earlier jobs have written."""
    # The text after the last newline is a number that was cut short.
    return {int(line) for path in files.logs() for line in path.read_bytes().split(b"\n")[:-1]}


@contextmanager
def _open_files(files: StoreFiles, log: str) -> Iterator[tuple[int, int, int]]:
    """Yield descriptors of the tokens, the starts and a new log."""
    descriptors = [os.open(path, os.O_WRONLY | os.O_CLOEXEC) for path in (files.tokens, files.starts)]
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptors.append(os.open(files.folder / log, flags, 0o666))
    try:
        yield descriptors[0], descriptors[1], descriptors[2]
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    """Write all bytes at a position; one call may write only some of them."""
    view = memoryview(data)
    while len(view):
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written


def _make_folder(files: StoreFiles) -> None:
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The token store cannot be written to {files.folder}: {error.strerror}.\n"
            "  Set data.tokens to a writable folder."
        ) from None


@contextmanager
def _explained(files: StoreFiles) -> Iterator[None]:
    """Say what to do if the disk does not take the data."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise ConfigError(
            f"The token store cannot be written to {files.folder}: {os.strerror(error.errno)}.\n"
            "  Make room and run the same command again: it continues with what is missing."
        ) from None


def _checked_tokenizer(index: PropertyIndex, tokenizer: Tokenizer | None) -> Tokenizer:
    """Return the tokenizer if it counted the tokens of the index, and the index can have a store.

    Raises:
        ConfigError: there is no tokenizer, or documents are conversations.
        PropertyIndexError: the index was built with another tokenizer or without one.
    """
    if tokenizer is None:
        raise ConfigError(
            "mixtera-hpc tokenize needs a tokenizer.\n  Set dataplane.tokenizer to that of the index build."
        )
    if tokenizer.fingerprint != index.tokenizer_fingerprint:
        counted = (index.tokenizer_fingerprint or "none")[:12]
        raise PropertyIndexError(
            f"{index.path} was built with tokenizer {counted}, but the configured one is "
            f"{tokenizer.fingerprint[:12]}.\n  Set dataplane.tokenizer, dataplane.add_bos and "
            "dataplane.special_tokens_in_text as for the build, or run mixtera-hpc index build again with these."
        )
    if any(map(is_chat, index.shard_texts())):
        raise ConfigError(
            "data.text is a conversation; which of its tokens are trained depends on the chat template, so they are "
            "made while a run reads.\n  Run without a token store."
        )
    return tokenizer
