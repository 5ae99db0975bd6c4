"""From documents of a stream to what the trainer gets: tokens of whole sequences, or raw samples.

The documents of several steps and domains are read together, each once, in the order of the disk. The last document of
each domain stays in memory, because the next sequence of that domain begins inside it. Price per document: one
positioned read, one JSON decode, one encode, and about a microsecond of this module.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.stored.read_errors import no_tokenizer_error, token_count_error
from mixtera_hpc.dataplane.reading.stored.stored_sequences import StoredSequences, read_sequences
from mixtera_hpc.dataplane.reading.stored.token_gather import TokenGather
from mixtera_hpc.formats.base import BlockRef, RangeReader, ShardReader, TokenReader
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.seek_points import seek_folder_of
from mixtera_hpc.formats.composed_text import open_reader
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.tokens.chat_tokens import split_marks
from mixtera_hpc.tokens.definition import AddedTokens

__all__ = ["DocumentReader", "PackedTokens", "take"]

MAX_OPEN_SHARDS = 64
DOCUMENTS_PER_ENCODE = 512
"""Documents that are in memory as text at the same time."""

Ints = NDArray[np.int64]
Tokens = NDArray[np.uint32]
_NO_TOKENS: Tokens = np.zeros(0, np.uint32)


class PackedTokens(NamedTuple):
    """The wanted tokens of consecutive documents, one after the other; shape (n,) each."""

    tokens: NDArray[np.int32]
    document: NDArray[np.int32]
    """Number of the document of each token, ascending from 0."""
    continues_document: NDArray[np.bool_]
    """False for the first token of a document."""
    trained: NDArray[np.bool_] | None
    """False for the tokens of a conversation that are not trained; None if there are no conversations."""


class _OpenShard(NamedTuple):
    """An open data file. The fields after the first are the same reader, where it can do more."""

    reader: ShardReader
    range_reader: RangeReader | None
    """Set for formats whose rows have a byte range of their own."""
    token_reader: TokenReader | None
    """Set for formats whose rows are token ids."""


class DocumentReader:
    """Reads documents. Keeps shards open and the last document of every domain tokenized. One per reading thread."""

    def __init__(self, source: Source) -> None:
        """Open nothing yet; shards are opened when they are needed."""
        self._source = source
        self._shards: OrderedDict[int, _OpenShard] = OrderedDict()
        index = source.config.index
        self._cache = BlockCache(seek_folders=[seek_folder_of(path) for path in index.paths_to_read])
        self._last_documents: dict[int, tuple[int, Tokens]] = {}
        """Domain → row key and tokens of the document in which its next sequence begins."""
        added = source.tokenizer.added if source.tokenizer else AddedTokens()
        self._before: Tokens = np.array(added.before, np.uint32)
        self._after: Tokens = np.array(added.after, np.uint32)
        self._gather = TokenGather(source)

    def read(self, documents: Documents, last_of_domain: Mapping[int, int]) -> PackedTokens:
        """Return the tokens of `documents`, special tokens included. A document that occurs twice is read once.

        Args:
            last_of_domain: domain → position of the last document of its stream in `documents`.

        Raises:
            DataError: a document cannot be read, or has other tokens than the index counted.
        """
        is_stored = self._gather.is_stored(documents)
        if not is_stored.any():
            return self._packed(documents, self._read_texts(documents, last_of_domain))

        # A collection may mix shards of text with shards of token ids.
        is_stored_token = np.repeat(is_stored, documents.last - documents.first)
        of_stored = np.empty(int(is_stored_token.sum()), np.int32)
        self._gather.read_into(documents.select(np.flatnonzero(is_stored)), of_stored)
        if is_stored.all():
            return self._packed(documents, of_stored)
        position_of_text = np.cumsum(~is_stored) - 1
        last_texts = {d: int(position_of_text[last]) for d, last in last_of_domain.items() if not is_stored[last]}
        tokens = np.empty(len(is_stored_token), np.int32)
        tokens[is_stored_token] = of_stored
        tokens[~is_stored_token] = self._read_texts(documents.select(np.flatnonzero(~is_stored)), last_texts)
        return self._packed(documents, tokens)

    @property
    def holds_all_tokens(self) -> bool:
        """Whether every document is stored as token ids, so that `read_sequences` can be used."""
        return self._source.layout.in_tokens and self._gather.holds_all

    def read_sequences(self, documents: Documents, rows: Ints, shape: tuple[int, int]) -> StoredSequences:
        """Return whole sequences of documents that are all stored; see `stored_sequences.read_sequences`."""
        across = self._source.config.dataplane.predict_across_documents
        return read_sequences(self._gather, documents, rows, shape, predict_across_documents=across)

    def payloads(self, documents: Documents) -> list[Any]:
        """Return the raw rows of `documents`."""
        return self._rows_in_stream_order(documents, raw=True)

    def texts(self, documents: Documents) -> list[Any]:
        """Return the texts of `documents`, or their token ids where a shard holds these."""
        return self._rows_in_stream_order(documents, raw=False)

    def close(self) -> None:
        """Close every shard."""
        for shard in self._shards.values():
            shard.reader.close()
        self._shards.clear()
        self._gather.close()

    def _rows_in_stream_order(self, documents: Documents, *, raw: bool) -> list[Any]:
        # Rows are read in the order of the disk.
        disk_order = np.lexsort((documents.row, documents.block))
        rows = self._read_rows(documents.select(disk_order), raw=raw)
        place_of = np.empty_like(disk_order)
        place_of[disk_order] = np.arange(len(disk_order))
        return take(rows, place_of)

    def _read_texts(self, documents: Documents, last_of_domain: Mapping[int, int]) -> NDArray[np.int32]:
        """Tokenize documents, and return their wanted tokens, special tokens and marks of conversations included."""
        tokens = self._tokenize(documents)
        for domain, last in last_of_domain.items():
            key = int(_row_key(documents.block[last], documents.row[last]))
            self._last_documents[domain] = key, tokens[last]
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

        lengths = documents.last - documents.first
        starts = np.cumsum(lengths) - lengths
        # A sequence may begin inside a document; that token continues it.
        continues_document = np.ones(len(tokens), np.bool_)
        continues_document[starts[documents.first == 0]] = False
        document = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        return PackedTokens(tokens, document, continues_document, trained)

    def _tokenize(self, documents: Documents) -> list[Tokens]:
        """Return all tokens of each document, without specials."""
        keys, chosen, position = np.unique(
            _row_key(documents.block, documents.row), return_index=True, return_inverse=True
        )
        # The documents in memory are few, one per domain at most.
        in_memory = dict(self._last_documents.values())
        is_missing = ~np.isin(keys, list(in_memory))

        # Keys ascend as rows lie on disk, so the unread documents are sorted by block and row.
        distinct = self._read_tokens(documents.select(chosen[is_missing])) if is_missing.any() else []
        for i in np.flatnonzero(~is_missing).tolist():
            distinct.insert(i, in_memory[int(keys[i])])
        return take(distinct, position)

    def _read_tokens(self, documents: Documents) -> list[Tokens]:
        """Read and tokenize documents that are sorted by block and row, some at a time."""
        tokenizer = self._source.tokenizer
        if tokenizer is None:
            raise no_tokenizer_error()
        tokens: list[Tokens] = []
        for first in range(0, len(documents.block), DOCUMENTS_PER_ENCODE):
            group = documents.select(slice(first, first + DOCUMENTS_PER_ENCODE))
            tokens += tokenizer.encode_each(self._read_rows(group, raw=False))

        # A wrong count would shift every later sequence of the stream without a sign.
        sizes = np.fromiter(map(len, tokens), np.int64, len(tokens)) + self._source.layout.added_tokens(documents.block)
        wrong = np.flatnonzero(sizes != documents.size)
        if len(wrong):
            raise token_count_error(self._source, documents, int(wrong[0]), int(sizes[wrong[0]]))
        return tokens

    def _read_rows(self, documents: Documents, *, raw: bool) -> list[Any]:
        """Read rows that are sorted by block and row: raw samples, texts, or token ids if the format holds them."""
        blocks = self._source.blocks
        shards = blocks.shard[documents.block]
        starts = blocks.offset[documents.block] + documents.offset
        rows: list[Any] = []
        for first, last in _equal_runs(shards):
            shard = self._shard(int(shards[first]))
            of_shard = slice(first, last)
            # Formats with byte ranges read only the rows. The others decode the whole block, so its rows are read
            # together.
            if shard.range_reader is None:
                rows += self._read_by_block(shard, documents.select(of_shard), raw=raw)
            elif raw:
                rows += shard.range_reader.payloads_at(starts[of_shard], documents.length[of_shard])
            else:
                rows += shard.range_reader.documents_at(starts[of_shard], documents.length[of_shard])
        return rows

    def _read_by_block(self, shard: _OpenShard, documents: Documents, *, raw: bool) -> Iterator[Any]:
        """Read rows of a format without byte ranges, those of one block together."""
        for first, last in _equal_runs(documents.block):
            number = int(documents.block[first])
            block = BlockRef.of(self._source.blocks, number)
            lengths = documents.lengths[number]
            # A row may occur twice, when two sequences need it.
            rows, position = np.unique(documents.row[first:last].astype(np.int64), return_inverse=True)
            results: Sequence[Any]
            if raw:
                results = shard.reader.payloads(block, lengths, rows)
            elif shard.token_reader is not None:
                results = shard.token_reader.tokens(block, rows)
            else:
                results = shard.reader.documents(block, lengths, rows)
            yield from (results[i] for i in position.tolist())

    def _shard(self, number: int) -> _OpenShard:
        """Return an open shard; the one that was not used for longest is closed when there are too many."""
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]

        index = self._source.index
        fmt = load_format(index.shard_formats[number])
        path = Path(index.data_root) / index.shard_paths[number]
        tokenizer = self._source.tokenizer
        chat = tokenizer.chat if tokenizer is not None else None
        reader = open_reader(fmt, path, index.shard_texts[number], self._cache, chat)
        range_reader = reader if isinstance(reader, RangeReader) else None
        token_reader = cast(TokenReader, reader) if fmt.holds_tokens else None
        shard = _OpenShard(reader, range_reader, token_reader)
        self._shards[number] = shard
        # Each open shard costs a file descriptor; a run may have many thousands of shards.
        if len(self._shards) > MAX_OPEN_SHARDS:
            _, oldest = self._shards.popitem(last=False)
            oldest.reader.close()
        return shard


def take(items: Sequence[Any], positions: NDArray[np.intp]) -> list[Any]:
    """Return the items at `positions`."""
    return list(map(items.__getitem__, positions.tolist()))


def _row_key(block: Any, row: Any) -> Any:
    """Return one integer per row, ascending as rows lie on disk; for arrays or for single numbers."""
    return np.int64(block) << 32 | row


def _equal_runs(values: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of each run of equal neighbours."""
    borders = np.flatnonzero(values[1:] != values[:-1]) + 1
    return pairwise([0, *borders.tolist(), len(values)])
