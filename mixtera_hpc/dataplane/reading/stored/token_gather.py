"""From documents to tokens for shards that hold token ids: one pass over all documents of a read.

What is wanted of every document is computed for all documents at once; then their tokens are copied, output by output
(`token_copy`).
Price: about 0.2 µs per document beside the copy, however many shards the documents lie in.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.stored.mapped_files import MappedFiles, map_array, max_mapped_files
from mixtera_hpc.dataplane.reading.stored.read_errors import (
    no_tokenizer_error,
    range_outside_error,
    token_count_error,
)
from mixtera_hpc.dataplane.reading.stored.store_rows import Places, StoreRows
from mixtera_hpc.dataplane.reading.stored.token_copy import TextTokens, TokenCopies
from mixtera_hpc.dataplane.reading.unchanged.shard_guard import ShardGuard
from mixtera_hpc.formats.base import TokenFormat
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.index.token_store.store_files import StoreFiles
from mixtera_hpc.tokens.definition import AddedTokens
from mixtera_hpc.tokens.tokenizer import Tokenizer

__all__ = ["ReadTokens", "TokenGather", "TokenWriter", "blocks_with_tokens", "empty_tokens"]

Ints = NDArray[np.int64]
Tokens = NDArray[np.integer[Any]]


class TokenWriter(Protocol):
    """The tokens of several outputs, which are copied one after the other."""

    def write(self, number: int, output: Tokens) -> None:
        """Copy the tokens of an output, given its number, to a flat array."""


class TokenGather:
    """Reads documents that are stored as token ids. Not thread-safe: one per reading thread."""

    def __init__(self, source: Source, guard: ShardGuard) -> None:
        """Map nothing yet; shards are mapped when they are needed, and recorded in `guard`."""
        self._source = source
        self._guard = guard
        self._is_stored = blocks_with_tokens(source)
        self._store_rows = StoreRows(source) if source.index.token_stores else None
        self._num_shards = len(source.index.shard_paths)
        self._max_files = max_mapped_files()
        # The files of the stores have the numbers after the shards.
        self._files = MappedFiles(self._num_shards + len(source.index.token_stores), self._map_file)

    @property
    def holds_all(self) -> bool:
        """Whether all blocks of the index are stored as token ids."""
        return bool(self._is_stored.all())

    def is_stored(self, documents: Documents) -> NDArray[np.bool_]:
        """Return which documents are stored as token ids; shape (n,)."""
        return self._is_stored[documents.block]

    def check_unchanged(self) -> None:
        """Raise DataError if a token store was written again since the run began."""
        if self._store_rows is not None:
            self._store_rows.check_unchanged()

    def prepare(self, documents: Documents, sizes: Sequence[int]) -> TokenWriter:
        """Return the wanted tokens of documents that are all stored, special tokens included, ready to be copied.

        They must be copied before the next call, which may unmap files.
        Tokens of conversations have the bit `NOT_TRAINED` where they are not trained.

        Args:
            documents: their parts follow each other in the outputs.
            sizes: tokens of each output. Each begins with the first token of a part.

        Raises:
            DataError: a shard cannot be read or has changed, or a document has other tokens than the index counted.
        """
        blocks = self._source.blocks
        places = Places(
            file=blocks.shard[documents.block].astype(np.int64),
            start=blocks.offset[documents.block] + documents.offset,
            length=documents.length.copy(),
            may_have_added=np.ones(len(documents.block), np.bool_),
        )
        if self._store_rows is None:
            self._guard.use(places.file)
        else:
            self._store_rows.locate(documents, self._num_shards, places)
            self._guard.use(places.file[places.file < self._num_shards])
        return self._prepare_places(documents, places, sizes)

    def close(self) -> None:
        """Unmap all shards."""
        self._files.close()

    def _prepare_places(self, documents: Documents, places: Places, sizes: Sequence[int]) -> TokenWriter:
        """Prepare documents whose places are known, as many files at a time as can be mapped."""
        shards = places.file
        limit = self._max_files
        if len(shards) > limit and len(np.unique(shards)) > limit:
            # As many documents at a time as files can be mapped.
            parts = []
            for first in range(0, len(shards), limit):
                chosen = slice(first, first + limit)
                own = documents.select(chosen)
                parts.append(empty_tokens(own))
                self._prepare_places(own, places.select(chosen), [len(parts[-1])]).write(0, parts[-1])
            return ReadTokens(np.concatenate(parts), sizes)

        types = self._files.map(shards)
        if (types == types[0]).all():
            return self._prepare_type(int(types[0]), documents, places, sizes)
        # Each integer type has an array of its own.
        tokens = empty_tokens(documents)
        for number in np.unique(types).tolist():
            self._read_chosen(number, documents, places, types == number, tokens)
        return ReadTokens(tokens, sizes)

    def _read_chosen(
        self, type_number: int, documents: Documents, places: Places, chosen: NDArray[np.bool_], tokens: Tokens
    ) -> None:
        """Read the documents where `chosen` is set, shape (n,), to their positions in the tokens of all documents."""
        chosen_documents = documents.select(np.flatnonzero(chosen))
        own = empty_tokens(chosen_documents)
        self._prepare_type(type_number, chosen_documents, places.select(chosen), [len(own)]).write(0, own)
        tokens[np.repeat(chosen, documents.last - documents.first)] = own

    def _prepare_type(
        self, type_number: int, documents: Documents, places: Places, sizes: Sequence[int]
    ) -> TokenWriter:
        """Prepare documents whose shards have the same integer type."""
        source = self._source
        tokenizer = source.tokenizer
        if tokenizer is None:
            raise no_tokenizer_error()
        chat_blocks = source.layout.chat_blocks
        is_chat = None if chat_blocks is None else chat_blocks[documents.block]
        if is_chat is not None and is_chat.any() and not is_chat.all():
            # A chat template writes all special tokens itself, so that nothing is added to conversations.
            tokens = empty_tokens(documents)
            for chosen in (is_chat, ~is_chat):
                self._read_chosen(type_number, documents, places, chosen, tokens)
            return ReadTokens(tokens, sizes)
        added = AddedTokens() if is_chat is not None and is_chat.all() else tokenizer.added
        first = self._files.first_tokens(places.file, places.start, places.length)
        if first is None:
            raise range_outside_error(source, documents)

        memory = self._files.span(type_number)
        texts = _without_added(memory, first, places.length // memory.itemsize, places.may_have_added, tokenizer)
        # A wrong count would shift every later sequence of the stream without a sign.
        counted = documents.size - source.layout.added_tokens(documents.block)
        wrong = np.flatnonzero(texts.count != counted)
        if len(wrong):
            size = int(texts.count[wrong[0]] + documents.size[wrong[0]] - counted[wrong[0]])
            raise token_count_error(source, documents, int(wrong[0]), size)
        return TokenCopies(memory, texts, documents, added, sizes)

    def _map_file(self, number: int) -> NDArray[Any]:
        """Map the tokens of a store, or a shard after a check that its blocks begin where the index says."""
        index = self._source.index
        if number >= self._num_shards:
            store = index.token_stores[number - self._num_shards]
            return map_array(StoreFiles(Path(store.folder)).tokens, np.dtype(store.dtype))
        blocks = self._source.blocks
        # The blocks of a shard follow each other.
        of_shard = slice(*np.searchsorted(blocks.shard, [number, number + 1]).tolist())
        token_format = cast(TokenFormat, load_format(index.shard_formats[number]))
        path = Path(index.data_root) / index.shard_paths[number]
        return token_format.map_tokens(path, blocks.first_row[of_shard], blocks.offset[of_shard])


def blocks_with_tokens(source: Source) -> NDArray[np.bool_]:
    """Return which blocks are in shards that hold token ids, or in a token store; shape (num_blocks,)."""
    formats = source.index.shard_formats
    holds_tokens = {name: load_format(name).holds_tokens for name in set(formats)}
    shard_holds_tokens = np.array([holds_tokens[name] for name in formats], np.bool_)
    is_stored: NDArray[np.bool_] = shard_holds_tokens[source.blocks.shard]
    for store in source.index.token_stores:
        is_stored[store.first_block : store.last_block] = True
    return is_stored


class ReadTokens:
    """Tokens that were read to an array of their own; a `TokenWriter`."""

    def __init__(self, tokens: Tokens, sizes: Sequence[int]) -> None:
        """Take the tokens of all outputs, one output after the other, and the tokens of each."""
        self._parts = np.split(tokens, np.cumsum(sizes)[:-1])

    def write(self, number: int, output: Tokens) -> None:
        """Copy the tokens of an output."""
        output[:] = self._parts[number]


def empty_tokens(documents: Documents) -> Tokens:
    """Return an array for the wanted tokens of documents and the marks of conversations."""
    return np.empty(int((documents.last - documents.first).sum()), np.uint32)


def _without_added(
    memory: Tokens, first: Ints, count: Ints, may_have_added: NDArray[np.bool_], tokenizer: Tokenizer
) -> TextTokens:
    """Leave out the special tokens that stored documents may begin and end with; the config says which are added.

    Args:
        memory: all tokens.
        first: position of the first token of each document.
        count: tokens of each document.
        may_have_added: which documents can have special tokens at their borders.
        tokenizer: names the special tokens.
    """
    ends_with_eos = np.zeros(len(count), np.bool_)
    if tokenizer.eos_id is not None:
        nonempty = np.flatnonzero((count > 0) & may_have_added)
        ends_with_eos[nonempty] = memory[first[nonempty] + count[nonempty] - 1] == tokenizer.eos_id
        count = count - ends_with_eos

    num_bos = len(tokenizer.bos_ids)
    if num_bos:
        long_enough = np.flatnonzero((count >= num_bos) & may_have_added)
        first_ids = memory[first[long_enough, None] + np.arange(num_bos)]
        begins_with_bos = (first_ids == np.array(tokenizer.bos_ids)).all(axis=1)
        first = first.copy()
        count = count.copy()
        first[long_enough] += num_bos * begins_with_bos
        count[long_enough] -= num_bos * begins_with_bos
    return TextTokens(first, count, ends_with_eos, tokenizer.eos_id)
