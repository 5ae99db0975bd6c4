"""Tokenize all documents of an index into a token store, with any number of ranks.

Rank 0 prepares the files; all ranks then take units through a shared counter and write every document to its place. The
bytes are the same for any number of ranks. A unit is logged after its tokens are on disk, so that a job that is killed
at any moment continues with the units that are not in a log.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import msgspec
import numpy as np

from mixtera_hpc.comm.communicator import Communicator, bcast_bytes
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError, PropertyIndexError
from mixtera_hpc.formats.chat_rows import is_chat
from mixtera_hpc.index.chat_check import check_chat_template
from mixtera_hpc.index.disk_errors import explain_disk_errors
from mixtera_hpc.index.read.configured import open_written
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.read.verify import check_fresh
from mixtera_hpc.index.scan.parallel_scan import ProgressCallback
from mixtera_hpc.index.scan.scan_log import build_lock
from mixtera_hpc.index.scan.shared_units import share_units
from mixtera_hpc.index.scan.token_spool import SpooledTokens
from mixtera_hpc.index.store_folder import log_unit
from mixtera_hpc.index.token_store.store_files import StoreFiles, store_folder
from mixtera_hpc.index.token_store.store_layout import StoreLayout
from mixtera_hpc.index.token_store.store_state import KeptRows, StoreJob, StorePlan, complete_store, prepare_store
from mixtera_hpc.index.token_store.unit_writer import SpooledBlocks, UnitWriter
from mixtera_hpc.tokens.slow_encoding import warn_of_slow_encoding
from mixtera_hpc.tokens.tokenizer import Tokenizer, load_vocabulary

__all__ = ["SpooledResult", "StoreReport", "StoreSources", "write_store"]


class StoreReport(msgspec.Struct, kw_only=True):
    """The result of a job."""

    folder: str
    tokens: int
    num_bytes: int
    units_written: int
    """Units that this job wrote; the others were there."""
    kept_tokens: int
    """Tokens that were there before the index was refreshed."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SpooledResult:
    """The blocks of one scan result, and its tokens if the scan has kept them."""

    num_blocks: int
    tokens: SpooledTokens | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSources:
    """The tokens that exist before a job begins; on rank 0."""

    results: Sequence[SpooledResult] = ()
    """All scan results of the last blocks of the index, in order."""
    kept: KeptRows | None = None
    """The rows of the store that the index still has after a refresh."""


def write_store(
    config: Config,
    comm: Communicator,
    announce: Callable[[StorePlan], None] = lambda plan: None,
    progress: ProgressCallback | None = None,
    sources: StoreSources | None = None,
) -> StoreReport:
    """Write the token store of `index.path`, or finish an interrupted one. **Collective.**

    Args:
        config: names the index, the tokenizer and the store (`data.tokens`).
        comm: the ranks that share the work.
        announce: called on rank 0 before anything is written.
        progress: called on rank 0 while units are written.
        sources: given on rank 0 if some tokens need not be made again.

    Raises:
        ConfigError: the disk has too little room, or the folder is no token store.
        PropertyIndexError: the index is missing or stale, or was built with another tokenizer or without one.
        DataError: a document cannot be read, or has other tokens than the index counted.
    """
    began_s = time.monotonic()
    vocabulary = load_vocabulary(config.dataplane)
    with open_written(config, announce=comm.rank == 0) as index:
        files = StoreFiles(store_folder(config, config.index.path))
        tokenizer = _checked_tokenizer(index, vocabulary)
        if comm.rank > 0:
            job = msgspec.json.decode(bcast_bytes(comm, None), type=StoreJob)
            _write_units(_UnitQueue(index, tokenizer, files, job), comm, None)
        else:
            check_fresh(index)
            if sources is None:
                # A build, which has sources, has warned when it began.
                warn_of_slow_encoding(tokenizer)
                sources = StoreSources()
            _make_folder(files)
            lock = build_lock(files.folder, "writing this token store", "data.tokens")
            with _explain_disk_errors(files), lock:
                job = prepare_store(index, files, tokenizer, _chat_loss(config, index), sources.kept, announce)
                job.spooled = _spooled_blocks(files, sources.results, len(index.tables.blocks))
                bcast_bytes(comm, msgspec.json.encode(job))
                _write_units(_UnitQueue(index, tokenizer, files, job), comm, progress)
                complete_store(files)
        comm.Barrier()
    return StoreReport(
        folder=str(files.folder),
        tokens=job.header.tokens,
        num_bytes=job.header.num_bytes,
        units_written=len(job.missing),
        kept_tokens=job.header.kept_tokens,
        seconds=time.monotonic() - began_s,
    )


def _chat_loss(config: Config, index: PropertyIndex) -> str:
    """Return the setting that decides the marks in the store; empty without conversations."""
    return config.dataplane.chat_loss if any(map(is_chat, index.shard_texts())) else ""


def _spooled_blocks(files: StoreFiles, results: Sequence[SpooledResult], num_blocks: int) -> list[SpooledBlocks]:
    """Return the blocks whose tokens are on disk as a scan wrote them."""
    # Results are those of the last blocks: a refresh leaves the others in front.
    ends = np.cumsum([result.num_blocks for result in results])
    first_block = num_blocks - int(ends[-1]) if len(results) else num_blocks
    sizes: dict[str, int] = {}
    spooled = []
    for result, end in zip(results, ends.tolist(), strict=True):
        if result.tokens is None:
            continue
        path = files.spool / result.tokens.file
        if result.tokens.file not in sizes:
            sizes[result.tokens.file] = path.stat().st_size if path.is_file() else 0
        last_id = result.tokens.start + result.tokens.count
        # A spool that was removed, or lost its end in a crash, is replaced by reading the documents again.
        if last_id * np.dtype(result.tokens.dtype).itemsize <= sizes[result.tokens.file]:
            last_block = first_block + end
            spooled.append(
                SpooledBlocks(
                    first_block=last_block - result.num_blocks,
                    last_block=last_block,
                    path=str(path),
                    start=result.tokens.start,
                )
            )
    return spooled


class _UnitQueue:
    """The units of a job, and how this rank writes them."""

    def __init__(self, index: PropertyIndex, tokenizer: Tokenizer, files: StoreFiles, job: StoreJob) -> None:
        layout = StoreLayout.of(index.tables, job.header.kept_blocks, job.header.kept_tokens)
        units = layout.units()
        self.units = [units[number] for number in job.missing]
        self.files = files
        self.job = job
        self.writer = UnitWriter(index, tokenizer, layout, np.dtype(job.header.dtype), job.spooled)


def _write_units(queue: _UnitQueue, comm: Communicator, progress: ProgressCallback | None) -> None:
    """Take units and write them until none is left. **Collective.**"""
    units = queue.units
    if not units:
        return
    with _explain_disk_errors(queue.files), _open_files(queue, comm.rank) as (tokens, starts, log):

        def write(position: int) -> int:
            rows = queue.writer.write(units[position], tokens, starts)
            # The log must not reach the disk before the tokens.
            os.fdatasync(tokens)
            os.fdatasync(starts)
            log_unit(log, queue.job.missing[position])
            return rows

        share_units([unit.num_bytes for unit in units], write, comm, progress)


@contextmanager
def _open_files(queue: _UnitQueue, rank: int) -> Iterator[tuple[int, int, int]]:
    """Yield descriptors of the tokens, the starts and a new log."""
    files = queue.files
    paths = (files.tokens, files.starts(queue.job.header))
    descriptors = [os.open(path, os.O_WRONLY | os.O_CLOEXEC) for path in paths]
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptors.append(os.open(files.log(queue.job.attempt, rank), flags, 0o666))
    try:
        yield descriptors[0], descriptors[1], descriptors[2]
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _make_folder(files: StoreFiles) -> None:
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The token store cannot be written to {files.folder}: {error.strerror}.\n"
            "  Set data.tokens to a writable folder."
        ) from None


def _explain_disk_errors(files: StoreFiles) -> AbstractContextManager[None]:
    """Say what to do if the disk does not take the data."""
    return explain_disk_errors(
        ConfigError,
        files.folder,
        f"The token store cannot be written to {files.folder}",
        "The index and all units that are finished stay. Make room, or make the folder and its files writable, and run "
        "the same command again: it continues with what is missing. Or set data.tokens to another folder.",
    )


def _checked_tokenizer(index: PropertyIndex, tokenizer: Tokenizer | None) -> Tokenizer:
    """Return the tokenizer if it counted the tokens of the index.

    Raises:
        ConfigError: there is no tokenizer.
        PropertyIndexError: the index was built with another tokenizer, with another chat template or without any.
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
    check_chat_template(index, tokenizer)
    return tokenizer
