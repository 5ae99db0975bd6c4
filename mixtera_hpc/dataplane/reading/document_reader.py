"""From documents of a stream to what the trainer gets: tokens of whole sequences, or raw samples.

The documents of several steps and domains are read together, each once, in the order of the disk. The documents in
which a run of sequences ends stay in memory, because the next sequence of that lane begins inside them. Price per
document: one positioned read, one JSON decode, one encode, and about a microsecond of this module.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.processes.batch_memory import TokenArrays
from mixtera_hpc.dataplane.reading.rows.row_reader import RowReader
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.stored.read_errors import no_tokenizer_error, token_count_error
from mixtera_hpc.dataplane.reading.stored.stored_sequences import read_sequences
from mixtera_hpc.dataplane.reading.stored.token_gather import TokenGather
from mixtera_hpc.dataplane.reading.unchanged.shard_guard import ShardGuard
from mixtera_hpc.dataplane.watchdog.progress import PACK, READ, TOKENIZE, ReadPlace
from mixtera_hpc.tokens.chat_tokens import split_marks
from mixtera_hpc.tokens.definition import AddedTokens

__all__ = ["DocumentReader", "PackedTokens", "take"]

DOCUMENTS_PER_ENCODE = 512
"""Documents that are in memory as text at the same time."""
LAST_DOCUMENTS_BYTES = 32 << 20
"""Tokens of documents that stay in memory, because a later sequence begins inside them."""

Ints = NDArray[np.int64]
Tokens = NDArray[np.uint32]
_NO_TOKENS: Tokens = np.zeros(0, np.uint32)


class PackedTokens(NamedTuple):
    """The wanted tokens of consecutive documents, one after the other; shape (n,) each."""

    tokens: NDArray[np.int32]
    document: NDArray[np.int32]
    """Number of the document of each token, ascending from 0."""
    continues_document: NDArray[np.bool_]
    """False for the first token of a document, or of the part of it that is wanted."""
    trained: NDArray[np.bool_] | None
    """False for the tokens of a conversation that are not trained; None if there are no conversations."""


class DocumentReader:
    """Reads documents. Keeps shards open and the last documents of runs tokenized. One per reading thread."""

    def __init__(self, source: Source) -> None:
        """Open nothing yet; shards are opened when they are needed."""
        self._source = source
        index = source.index
        self.guard = ShardGuard(index.data_root, index.shard_paths, source.tables.shard_states)
        """The guard that records the shards that were read."""
        self._rows = RowReader(source, self.guard)
        self._last_documents: OrderedDict[int, Tokens] = OrderedDict()
        """Row key → tokens of documents in which later sequences begin, the newest at the end."""
        self._last_documents_bytes = 0
        added = source.tokenizer.added if source.tokenizer else AddedTokens()
        self._before: Tokens = np.array(added.before, np.uint32)
        self._after: Tokens = np.array(added.after, np.uint32)
        self._gather = TokenGather(source, self.guard)

    @property
    def place(self) -> ReadPlace:
        """The place of this reader in the data, for the watchdog."""
        return self._rows.place

    @place.setter
    def place(self, place: ReadPlace) -> None:
        self._rows.place = place

    def read(self, documents: Documents, last_of_run: Sequence[int]) -> PackedTokens:
        """Return the tokens of `documents`, special tokens included. A document that occurs twice is read once.

        Args:
            last_of_run: positions in `documents` of those in which later sequences may begin.

        Raises:
            DataError: a document cannot be read, or has other tokens than the index counted.
        """
        is_stored = self._gather.is_stored(documents)
        self.place.enter(READ)
        if not is_stored.any():
            return self._packed(documents, self._read_texts(documents, last_of_run))

        # A collection may mix shards of text with shards of token ids.
        is_stored_token = np.repeat(is_stored, documents.last - documents.first)
        of_stored = np.empty(int(is_stored_token.sum()), np.int32)
        self._gather.read_into(documents.select(np.flatnonzero(is_stored)), [of_stored])
        if is_stored.all():
            return self._packed(documents, of_stored)
        position_of_text = np.cumsum(~is_stored) - 1
        last_texts = [int(position_of_text[last]) for last in last_of_run if not is_stored[last]]
        tokens = np.empty(len(is_stored_token), np.int32)
        tokens[is_stored_token] = of_stored
        tokens[~is_stored_token] = self._read_texts(documents.select(np.flatnonzero(~is_stored)), last_texts)
        return self._packed(documents, tokens)

    @property
    def holds_all_tokens(self) -> bool:
        """Whether every document is stored as token ids, so that `read_sequences` can be used."""
        return self._source.layout.in_tokens and self._gather.holds_all

    def read_sequences(self, documents: Documents, rows: Ints, batches: Sequence[TokenArrays]) -> None:
        """Write whole sequences of documents that are all stored; see `stored_sequences.read_sequences`."""
        self.place.enter(READ)
        read_sequences(self._source, self._gather, documents, rows, batches)

    def _remember(self, key: int, tokens: Tokens) -> None:
        """Keep the tokens of a document, and forget the oldest ones beyond the budget."""
        if self._last_documents.pop(key, None) is None:
            self._last_documents_bytes += tokens.nbytes
        self._last_documents[key] = tokens
        while self._last_documents_bytes > LAST_DOCUMENTS_BYTES and len(self._last_documents) > 1:
            _, oldest = self._last_documents.popitem(last=False)
            self._last_documents_bytes -= oldest.nbytes

    def payloads(self, documents: Documents) -> list[Any]:
        """Return the raw rows of `documents`."""
        return self._rows_in_stream_order(documents, raw=True)

    def texts(self, documents: Documents) -> list[Any]:
        """Return the texts of `documents`, or their token ids where a shard holds these."""
        return self._rows_in_stream_order(documents, raw=False)

    def close(self) -> None:
        """Close every shard."""
        self._rows.close()
        self._gather.close()

    def _rows_in_stream_order(self, documents: Documents, *, raw: bool) -> list[Any]:
        # Rows are read in the order of the disk.
        disk_order = np.lexsort((documents.row, documents.block))
        rows = self._rows.read(documents.select(disk_order), raw=raw)
        self.place.enter(PACK)
        place_of = np.empty_like(disk_order)
        place_of[disk_order] = np.arange(len(disk_order))
        return take(rows, place_of)

    def _read_texts(self, documents: Documents, last_of_run: Sequence[int]) -> NDArray[np.int32]:
        """Tokenize documents, and return their wanted tokens, special tokens and marks of conversations included."""
        tokens = self._tokenize(documents)
        for last in last_of_run:
            self._remember(int(_row_key(documents.block[last], documents.row[last])), tokens[last])
        return self._concatenate(documents, tokens)

    def _concatenate(self, documents: Documents, tokens: list[Tokens]) -> NDArray[np.int32]:
        """Concatenate the wanted tokens of each document, with the special tokens that begin and end it."""
        first = documents.first
        last = documents.last
        # Three segments per document. Most documents are wanted whole; only the others are sliced in Python.
        segments = [_NO_TOKENS] * (3 * len(tokens))
        segments[0::3] = [self._before] * len(tokens)
        segments[1::3] = tokens
        segments[2::3] = [self._after] * len(tokens)
        chat_blocks = self._source.layout.chat_blocks
        if chat_blocks is not None:
            # A chat template writes all special tokens itself.
            for i in np.flatnonzero(chat_blocks[documents.block]).tolist():
                segments[3 * i] = segments[3 * i + 2] = _NO_TOKENS
        for i in np.flatnonzero((first > 0) | (last < documents.size)).tolist():
            begin = int(first[i])
            end = int(last[i])
            for segment in range(3 * i, 3 * i + 3):
                whole = segments[segment]
                segments[segment] = whole[max(begin, 0) : max(end, 0)]
                begin -= len(whole)
                end -= len(whole)
        return np.concatenate(segments).view(np.int32)

    def _packed(self, documents: Documents, tokens: NDArray[np.int32]) -> PackedTokens:
        """Return the wanted tokens of `documents`, with the document of each."""
        trained = None
        if self._source.layout.chat_blocks is not None:
            unmarked, trained = split_marks(tokens.view(np.uint32))
            tokens = unmarked.view(np.int32)
            # A token store may have marks that this run ignores.
            if self._source.config.dataplane.chat_loss == "all":
                trained = np.ones_like(trained)

        lengths = documents.last - documents.first
        starts = np.cumsum(lengths) - lengths
        # No part of a document continues the part in front of it.
        continues_document = np.ones(len(tokens), np.bool_)
        continues_document[starts] = False
        document = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        return PackedTokens(tokens, document, continues_document, trained)

    def _tokenize(self, documents: Documents) -> list[Tokens]:
        """Return all tokens of each document, without specials."""
        keys, chosen, position = np.unique(
            _row_key(documents.block, documents.row), return_index=True, return_inverse=True
        )
        in_memory = list(map(self._last_documents.get, keys.tolist()))
        is_missing = np.fromiter((tokens is None for tokens in in_memory), np.bool_, len(in_memory))

        # Keys ascend as rows lie on disk, so the unread documents are sorted by block and row.
        unread = iter(self._read_tokens(documents.select(chosen[is_missing])) if is_missing.any() else [])
        distinct = [next(unread) if tokens is None else tokens for tokens in in_memory]
        return take(distinct, position)

    def _read_tokens(self, documents: Documents) -> list[Tokens]:
        """Read and tokenize documents that are sorted by block and row, some at a time."""
        tokenizer = self._source.tokenizer
        if tokenizer is None:
            raise no_tokenizer_error()
        tokens: list[Tokens] = []
        for first in range(0, len(documents.block), DOCUMENTS_PER_ENCODE):
            group = documents.select(slice(first, first + DOCUMENTS_PER_ENCODE))
            texts = self._rows.read(group, raw=False)
            self.place.enter(TOKENIZE)
            tokens += tokenizer.encode_each(texts)
        self.place.enter(PACK)

        # A wrong count would shift every later sequence of the stream without a sign.
        sizes = np.fromiter(map(len, tokens), np.int64, len(tokens)) + self._source.layout.added_tokens(documents.block)
        wrong = np.flatnonzero(sizes != documents.size)
        if len(wrong):
            raise token_count_error(self._source, documents, int(wrong[0]), int(sizes[wrong[0]]))
        return tokens


def take(items: Sequence[Any], positions: NDArray[np.intp]) -> list[Any]:
    """Return the items at `positions`."""
    return list(map(items.__getitem__, positions.tolist()))


def _row_key(block: Any, row: Any) -> Any:
    """Return one integer per row, ascending as rows lie on disk; for arrays or for single numbers."""
    return np.int64(block) << 32 | row
