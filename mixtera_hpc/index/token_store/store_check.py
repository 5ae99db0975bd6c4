"""Compare the tokens in a store with those of the documents, for the blocks that `index verify --deep` reads.

A run trusts its store: a store that was copied incompletely or overwritten would be served as it is. Price: the sampled
blocks of every shard are read and tokenized once more.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import DataError, pluralize
from mixtera_hpc.formats.base import BlockRef
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.seek_points import seek_folder_of
from mixtera_hpc.formats.composed_text import open_reader
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.read.verify import sample_blocks
from mixtera_hpc.index.token_store.store_files import StoredRows, StoreFiles, configured_stores
from mixtera_hpc.tokens.chat_tokens import NOT_TRAINED
from mixtera_hpc.tokens.tokenizer import Tokenizer

__all__ = ["StoreProblem", "changed_stores", "refuse_changed_stores"]

MAX_LISTED = 5
"""Places that an error message lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreProblem:
    """A document whose tokens in a store are not those of the shard."""

    store: str
    """Folder of the store."""
    path: str
    """The shard, as in the index."""
    row: int


def changed_stores(
    config: Config, index: PropertyIndex, tokenizer: Tokenizer, comm: Communicator
) -> list[StoreProblem]:
    """Return a document of every shard whose sampled blocks have other tokens in the store. **Collective.**

    Every rank checks its share of the shards. Rank 0 returns the result; other ranks return nothing.

    Raises:
        ConfigError: a store is incomplete, or belongs to another index or tokenizer.
        DataError: a store is damaged.
    """
    checks = [_StoreCheck(index, store, config.dataplane.chat_loss) for store in configured_stores(config, index)]
    blocks = index.tables.blocks
    paths = index.shard_paths()
    borders = np.searchsorted(blocks.shard, np.arange(len(paths) + 1))
    rows = np.full(len(paths), -1, np.int64)
    for shard in range(comm.rank, len(paths), comm.size):
        for check in checks:
            if check.holds(int(borders[shard])):
                rows[shard] = check.differing_row(shard, np.arange(borders[shard], borders[shard + 1]), tokenizer)
    rows = comm.Allreduce(rows, "max")
    if comm.rank > 0:
        return []
    return [
        StoreProblem(store=check.folder, path=paths[shard], row=int(rows[shard]))
        for shard in np.flatnonzero(rows >= 0).tolist()
        for check in checks
        if check.holds(int(borders[shard]))
    ]


def refuse_changed_stores(problems: list[StoreProblem]) -> None:
    """Raise an error if a store has other tokens than the documents.

    Raises:
        DataError: names the first few documents.
    """
    if not problems:
        return
    shards = pluralize(len(problems), "shard")
    listed = "".join(f"\n    {problem.path} row {problem.row}" for problem in problems[:MAX_LISTED])
    more = f"\n    and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    raise DataError(
        f"The token store {problems[0].store} has other tokens than the documents of {shards}:{listed}"
        f"{more}\n  Remove {problems[0].store} and run mixtera-hpc tokenize again, or set data.tokens=off."
    )


class _StoreCheck:
    """Reads the tokens of rows from one store."""

    def __init__(self, index: PropertyIndex, store: StoredRows, chat_loss: str) -> None:
        self._index = index
        self._store = store
        files = StoreFiles(Path(store.folder))
        header = files.read_header()
        self._tokens: NDArray[Any] = np.fromfile(files.tokens, store.dtype, 0)
        if files.tokens.stat().st_size:
            self._tokens = np.memmap(files.tokens, store.dtype, "r")
        self._starts = np.memmap(store.starts, np.int64, "r")
        rows_before = np.concatenate([[0], np.cumsum(index.tables.blocks.rows, dtype=np.int64)])
        self._first_rows = rows_before - rows_before[store.first_block]
        # With another `chat_loss` the marks differ, and a run ignores them.
        has_other_marks = header is not None and header.chat_loss not in ("", chat_loss)
        self._ignored = NOT_TRAINED if has_other_marks else np.uint32(0)

    @property
    def folder(self) -> str:
        """The folder of the store."""
        return self._store.folder

    def holds(self, block: int) -> bool:
        """Return True if the store is that of the index of a block."""
        return self._store.first_block <= block < self._store.last_block

    def differing_row(self, shard: int, blocks: NDArray[np.int64], tokenizer: Tokenizer) -> int:
        """Return the first sampled row of a shard with other tokens in the store; -1 without one.

        A shard that cannot be read is reported by the check of shards.
        """
        index = self._index
        file_format = load_format(index.tables.shards.format[shard])
        text = index.shard_texts()[shard]
        if file_format.holds_tokens or text is None:
            return -1
        cache = BlockCache(seek_folders=[seek_folder_of(index.path)], max_block_bytes=sys.maxsize)
        path = index.data_root / index.shard_paths()[shard]
        try:
            reader = open_reader(file_format, path, text, cache, tokenizer.chat)
        except (OSError, DataError):
            return -1
        try:
            for block in sample_blocks(blocks).tolist():
                place = BlockRef.of(index.tables.blocks, block)
                samples = index.read_block(block)
                rows = np.flatnonzero(samples.combo != index.tables.combos.bad)
                tokens, ends = tokenizer.encode_batch(reader.documents(place, samples.length, rows))
                for position, row in enumerate(rows.tolist()):
                    expected = tokens[ends[position] : ends[position + 1]]
                    if not self._has(expected, int(self._first_rows[block]) + row):
                        return place.first_row + row
        except (OSError, DataError):
            return -1
        finally:
            reader.close()
        return -1

    def _has(self, expected: NDArray[Any], row: int) -> bool:
        start = int(self._starts[row])
        if not len(expected):
            return True  # The place of a row without tokens has no meaning.
        stored = self._tokens[start : start + len(expected)] if start >= 0 else expected[:0]
        return len(stored) == len(expected) and not ((stored ^ expected) & ~self._ignored).any()
