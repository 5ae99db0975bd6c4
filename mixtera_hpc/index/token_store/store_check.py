"""Compare the tokens in a store with those of the documents, for the blocks that `index verify --deep` reads.

A run trusts its store: a store that was copied incompletely or overwritten would be served as it is. Price: the sampled
blocks of every shard are read and tokenized once more.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import DataError, pluralize
from mixtera_hpc.formats.base import BlockRef
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.read.verify import SampledShard, sampled_shards
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
    if not checks:
        return []
    shards = sampled_shards(index)
    check_of = {shard.number: check for shard in shards for check in checks if check.holds(shard)}
    rows = np.full(len(shards), -1, np.int64)
    for shard in shards[comm.rank :: comm.size]:
        if shard.number in check_of:
            rows[shard.number] = check_of[shard.number].differing_row(shard, tokenizer)
    rows = comm.Allreduce(rows, "max")
    if comm.rank > 0:
        return []
    paths = index.shard_paths()
    return [
        StoreProblem(store=check_of[number].folder, path=paths[number], row=int(rows[number]))
        for number in np.flatnonzero(rows >= 0).tolist()
    ]


def refuse_changed_stores(problems: list[StoreProblem]) -> None:
    """Raise an error if a store has other tokens than the documents.

    Raises:
        DataError: names the first few documents.
    """
    if not problems:
        return
    shards = pluralize(len(problems), "shard")
    folders = ", ".join(dict.fromkeys(problem.store for problem in problems))
    listed = "".join(f"\n    {problem.path} row {problem.row}" for problem in problems[:MAX_LISTED])
    more = f"\n    and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    raise DataError(
        f"Tokens in {folders} differ from those of the documents in {shards}:{listed}{more}\n"
        f"  Remove {folders} and run mixtera-hpc tokenize again, or set data.tokens=off."
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

    def holds(self, shard: SampledShard) -> bool:
        """Return True if the store has documents of a shard."""
        has_documents = shard.text is not None and shard.first_block < shard.stop_block
        return has_documents and self._store.first_block <= shard.first_block < self._store.last_block

    def differing_row(self, shard: SampledShard, tokenizer: Tokenizer) -> int:
        """Return the first sampled row of a shard with other tokens in the store; -1 without one.

        A shard that cannot be read is reported by the check of shards.
        """
        index = self._index
        try:
            with shard.opened(index, tokenizer) as reader:
                for block in shard.blocks:
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
        return -1

    def _has(self, expected: NDArray[Any], row: int) -> bool:
        start = int(self._starts[row])
        if not len(expected):
            return True  # The place of a row without tokens has no meaning.
        stored = self._tokens[start : start + len(expected)] if start >= 0 else expected[:0]
        return len(stored) == len(expected) and not ((stored ^ expected) & ~self._ignored).any()
