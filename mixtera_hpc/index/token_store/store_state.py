"""Decide what a job has to write: a new store, the rest of an interrupted one, or what a refresh has added."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import ConfigError
from mixtera_hpc.formats.chat_rows import is_chat
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.token_store.store_files import StoreFiles, StoreHeader, token_type
from mixtera_hpc.index.token_store.store_layout import StoreLayout
from mixtera_hpc.index.token_store.unit_writer import SpooledBlocks
from mixtera_hpc.tokens.tokenizer import Tokenizer

__all__ = ["KeptRows", "StoreJob", "StorePlan", "complete_store", "prepare_store"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StorePlan:
    """The work of a job, before it begins."""

    folder: Path
    tokens: int
    dtype: str
    num_bytes: int
    """Size of the complete store."""
    kept_tokens: int
    """Tokens that are there from before a refresh."""
    free_bytes: int
    missing_units: int
    num_units: int

    @property
    def needed_bytes(self) -> int:
        """Bytes that are still to be written."""
        new_bytes = self.num_bytes - self.kept_tokens * np.dtype(self.dtype).itemsize
        return new_bytes * self.missing_units // max(self.num_units, 1)


class StoreJob(msgspec.Struct, kw_only=True):
    """The work that rank 0 broadcasts to all ranks."""

    header: StoreHeader
    missing: list[int]
    """Units to write, by number."""
    attempt: int
    spooled: list[SpooledBlocks] = []
    """Blocks whose tokens need not be made again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptRows:
    """Rows of an older index that come first in the present one, in the same order."""

    index: str
    """Fingerprint of the older index."""
    rows: list[tuple[int, int]]
    """Ranges [first, last) of rows of the older index."""
    blocks: int
    """Number of blocks that they are in."""


def prepare_store(
    index: PropertyIndex,
    files: StoreFiles,
    tokenizer: Tokenizer,
    chat_loss: str,
    kept: KeptRows | None,
    announce: Callable[[StorePlan], None],
) -> StoreJob:
    """Create the files, or find out what an interrupted job has written.

    Args:
        index: the index.
        files: of the store.
        tokenizer: that of the index.
        chat_loss: see `StoreHeader`.
        kept: rows of a complete store of the index before a refresh.
        announce: called before anything is written.

    Raises:
        ConfigError: the disk has too little room, or the folder is no token store.
    """
    old = files.read_header()
    unfinished = files.unfinished_headers()
    foreign = set(files.folder.iterdir()) - {files.folder / "lock", files.spool, *unfinished}
    if old is None and foreign:
        raise ConfigError(
            f"{files.folder} is not empty and holds no token store.\n  Set data.tokens to a new folder, or empty it."
        )
    wanted = _header_of(index, tokenizer, chat_loss)
    same = old is not None and _origin(old) == _origin(wanted)
    kept = _kept_rows(index, old, wanted, kept)
    if old is not None and same:
        header = msgspec.structs.replace(old, complete=False)
    elif old is not None and kept is not None:
        header = _extended(index, old, wanted, kept)
    else:
        header = wanted

    num_units = len(StoreLayout.of(index.tables, header.kept_blocks, header.kept_tokens).units())
    done = files.logged_units() if same else set()
    missing = [number for number in range(num_units) if number not in done]
    if old is not None and same and old.complete:
        missing = []
    plan = StorePlan(
        folder=files.folder,
        tokens=header.tokens,
        dtype=header.dtype,
        num_bytes=header.num_bytes,
        kept_tokens=header.kept_tokens,
        free_bytes=shutil.disk_usage(files.folder).free,
        missing_units=len(missing),
        num_units=num_units,
    )
    announce(plan)
    _check_room(plan)
    if not same:
        _begin(files, header, old if kept is not None else None, kept)
    elif old is not None and not old.complete:
        _set_sizes(files, header)
    # What killed jobs have left, and the starts of another index.
    for path in (*unfinished, *(set(files.folder.glob("starts-*.bin")) - {files.starts(header)})):
        path.unlink(missing_ok=True)
    attempts = [int(path.stem.split("-")[1]) for path in files.logs()]
    return StoreJob(header=header, missing=missing, attempt=1 + max(attempts, default=0))


def complete_store(files: StoreFiles) -> None:
    """Mark the store as complete; the logs are not needed any more."""
    header = files.read_header()
    if header is not None and not header.complete:
        files.write_header(msgspec.structs.replace(header, complete=True))
    for path in files.logs():
        path.unlink()
    shutil.rmtree(files.spool, ignore_errors=True)


def _header_of(index: PropertyIndex, tokenizer: Tokenizer, chat_loss: str) -> StoreHeader:
    """Return the header of a store that is written as a whole."""
    layout = StoreLayout.of(index.tables)
    return StoreHeader(
        index=index.fingerprint,
        tokenizer=tokenizer.fingerprint,
        dtype=token_type(tokenizer.vocab_size, has_chats=any(map(is_chat, index.shard_texts()))).str,
        chat_loss=chat_loss,
        rows=int(layout.first_rows[-1]),
        tokens=layout.num_tokens,
        starts=f"starts-{index.fingerprint[:16]}.bin",
        generations=[generation.fingerprint for generation in index.generations],
    )


def _origin(header: StoreHeader) -> list[Any]:
    """Return everything that decides which tokens a store has to hold."""
    return [header.index, *_encoding(header)]


def _encoding(header: StoreHeader) -> list[Any]:
    return [header.version, header.tokenizer, header.dtype, header.chat_loss]


def _kept_rows(
    index: PropertyIndex, old: StoreHeader | None, wanted: StoreHeader, kept: KeptRows | None
) -> KeptRows | None:
    """Return which rows of a store stay; None if it is written as a whole."""
    if old is None or not old.complete or _encoding(old) != _encoding(wanted):
        return None
    if kept is not None and kept.index == old.index:
        return kept
    # The caller may not know that the index was refreshed: the index begins with its earlier states.
    for generation in index.generations[:-1]:
        if generation.fingerprint == old.index:
            return KeptRows(index=old.index, rows=[(0, old.rows)], blocks=generation.blocks)
    return None


def _extended(index: PropertyIndex, old: StoreHeader, wanted: StoreHeader, kept: KeptRows) -> StoreHeader:
    """Return the header of a store that keeps its tokens; those of new rows come behind them."""
    layout = StoreLayout.of(index.tables, kept.blocks, old.tokens)
    return msgspec.structs.replace(wanted, tokens=layout.num_tokens, kept_blocks=kept.blocks, kept_tokens=old.tokens)


def _check_room(plan: StorePlan) -> None:
    """Refuse to begin what the disk cannot take."""
    if plan.needed_bytes > plan.free_bytes:
        raise ConfigError(
            f"The token store needs {plan.needed_bytes / 1e9:,.3g} GB in {plan.folder}, but "
            f"{plan.free_bytes / 1e9:,.3g} GB are free.\n  Make room, set data.tokens to a folder on another file "
            "system, or set data.materialize=never. The index is complete and stays."
        )


def _begin(files: StoreFiles, header: StoreHeader, old: StoreHeader | None, kept: KeptRows | None) -> None:
    """Begin a store. Tokens of `kept` rows stay; what else another index or tokenizer left is removed."""
    starts = files.starts(header)
    if old is not None and kept is not None:
        before = np.memmap(files.starts(old), "<i8", "r") if old.rows else np.zeros(0, np.int64)
        _write_starts(starts, [before[first:last] for first, last in kept.rows])
    # The units of earlier logs are others now. A kill may come between any two calls. So the logs go before the new
    # header, and the tokens after it: no run takes what is left for a store, and the next job begins anew.
    for path in files.logs():
        path.unlink()
    files.write_header(header)
    if old is None:
        files.tokens.unlink(missing_ok=True)
    _set_sizes(files, header)


def _write_starts(path: Path, parts: list[NDArray[Any]]) -> None:
    with path.open("wb") as file:
        for part in parts:
            file.write(np.ascontiguousarray(part).data)
        file.flush()
        os.fsync(file.fileno())


def _set_sizes(files: StoreFiles, header: StoreHeader) -> None:
    """Give the files their final sizes; what is not written yet has no bytes on disk."""
    sizes = {files.tokens: header.tokens * np.dtype(header.dtype).itemsize, files.starts(header): 8 * header.rows}
    for path, size in sizes.items():
        with path.open("ab") as file:
            file.truncate(size)
