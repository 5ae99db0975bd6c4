"""From documents of a stream to what the trainer gets: tokens of whole sequences, or raw samples.

The documents of several steps and domains are read together, each once, in the order of the disk. The documents in
which a run of sequences ends stay in memory, because the next sequence of that lane begins inside them. Price per
document: one positioned read, one JSON decode, one encode, and about a microsecond of this module.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents, equal_runs
from mixtera_hpc.dataplane.reading.residency.open_shards import ShardPaths, max_open_shards
from mixtera_hpc.dataplane.reading.residency.resident_rows import MAX_ROW_SHARE, PackedRows, ResidentRows
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.stored.read_errors import no_tokenizer_error, token_count_error
from mixtera_hpc.dataplane.reading.stored.stored_rows import ShardFormats
from mixtera_hpc.dataplane.reading.stored.stored_sequences import StoredSequences, read_sequences
from mixtera_hpc.dataplane.reading.stored.token_gather import TokenGather
from mixtera_hpc.dataplane.reading.unchanged.shard_guard import ShardGuard
from mixtera_hpc.dataplane.watchdog.progress import PACK, READ, TOKENIZE, ReadPlace
from mixtera_hpc.formats.base import BlockRef, RangeReader, ShardReader, TokenReader
from mixtera_hpc.formats.batching.json_payloads import decode_payloads
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.seek_points import seek_folder_of
from mixtera_hpc.formats.composed_text import open_reader
from mixtera_hpc.formats.readers.compressed_jsonl import CompressedJsonlReader
from mixtera_hpc.tokens.chat_tokens import split_marks
from mixtera_hpc.tokens.definition import AddedTokens

__all__ = ["DocumentReader", "PackedTokens", "take"]

DOCUMENTS_PER_ENCODE = 512
"""Documents that are in memory as text at the same time."""
LAST_DOCUMENTS_BYTES = 32 << 20
"""Tokens of documents that stay in memory, because a later sequence begins inside them."""

Ints = NDArray[np.int64]
Tokens = NDArray[np.uint32]
# How a shard is read: not known yet, row by row, or by decoding whole blocks.
_UNKNOWN, _ROWS, _BLOCKS = range(3)
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


class _OpenShard(NamedTuple):
    """An open data file. The fields after the first are the same reader, where it can do more."""

    reader: ShardReader
    range_reader: RangeReader | None
    """Set for formats whose rows have a byte range of their own."""
    token_reader: TokenReader | None
    """Set for formats whose rows are token ids."""


class DocumentReader:
    """Reads documents. Keeps shards open and the last documents of runs tokenized. One per reading thread."""

    def __init__(self, source: Source) -> None:
        """Open nothing yet; shards are opened when they are needed."""
        self._source = source
        self.place = ReadPlace()
        """Where this reader is, for the watchdog."""
        index = source.index
        self.guard = ShardGuard(index.data_root, index.shard_paths, source.tables.shard_states)
        """Knows which shards were read."""
        self._shards: OrderedDict[int, _OpenShard] = OrderedDict()
        self._max_open_shards = max_open_shards()
        self._paths = ShardPaths(index.data_root, index.shard_paths)
        self._formats = ShardFormats(source)
        self._is_range_reader: dict[type, bool] = {}
        """Class of a reader → whether it is a `RangeReader`: the check of a protocol is slow."""
        seek_folders = [seek_folder_of(path) for path in source.config.index.paths_to_read]
        largest_block = source.config.data.largest_block_bytes()
        self._cache = BlockCache(source.cache_bytes, seek_folders, largest_block)
        self._resident_rows: dict[bool, ResidentRows] = {}
        """Whether rows are raw → rows of windows in use."""
        self._shard_kinds = np.zeros(len(index.shard_paths), np.int8)
        self._last_documents: OrderedDict[int, Tokens] = OrderedDict()
        """Row key → tokens of documents in which later sequences begin, the newest at the end."""
        self._last_documents_bytes = 0
        added = source.tokenizer.added if source.tokenizer else AddedTokens()
        self._before: Tokens = np.array(added.before, np.uint32)
        self._after: Tokens = np.array(added.after, np.uint32)
        self._gather = TokenGather(source, self.guard)

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
        self._gather.read_into(documents.select(np.flatnonzero(is_stored)), of_stored)
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

    def read_sequences(self, documents: Documents, rows: Ints, shape: tuple[int, int]) -> StoredSequences:
        """Return whole sequences of documents that are all stored; see `stored_sequences.read_sequences`."""
        self.place.enter(READ)
        return read_sequences(self._source, self._gather, documents, rows, shape)

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
        for shard in self._shards.values():
            shard.reader.close()
        self._shards.clear()
        self._gather.close()

    def _rows_in_stream_order(self, documents: Documents, *, raw: bool) -> list[Any]:
        # Rows are read in the order of the disk.
        disk_order = np.lexsort((documents.row, documents.block))
        rows = self._read_rows(documents.select(disk_order), raw=raw)
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
            texts = self._read_rows(group, raw=False)
            self.place.enter(TOKENIZE)
            tokens += tokenizer.encode_each(texts)
        self.place.enter(PACK)

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
        # Formats with byte ranges read only the rows. The others decode whole blocks, so the other rows of a block stay
        # in memory; but not if it has only one.
        is_decoded = self._decodes_blocks(documents, shards) & (blocks.rows[documents.block] > 1)
        if not is_decoded.any():
            return self._read_from_shards(documents, shards, raw=raw)
        rows: list[Any] = [None] * len(shards)
        resident = self._resident(raw)
        for chosen in (np.flatnonzero(is_decoded), np.flatnonzero(~is_decoded)):
            part = documents.select(chosen)
            read = (
                resident.read(part)
                if is_decoded[chosen].any()
                else self._read_from_shards(part, shards[chosen], raw=raw)
            )
            for number, row in zip(chosen.tolist(), read, strict=True):
                rows[number] = row
        return rows

    def _read_from_shards(self, documents: Documents, shards: NDArray[np.int32], *, raw: bool) -> list[Any]:
        """Read rows that are sorted by block and row, without keeping others."""
        starts = self._source.blocks.offset[documents.block] + documents.offset
        rows: list[Any] = []
        for first, last in equal_runs(shards) if len(shards) else ():
            self._enter_shard(documents, first, last)
            shard = self._shard(int(shards[first]))
            of_shard = slice(first, last)
            if shard.range_reader is None:
                rows += self._read_by_block(shard, documents.select(of_shard), raw=raw)
            elif raw:
                rows += shard.range_reader.payloads_at(starts[of_shard], documents.length[of_shard])
            else:
                rows += shard.range_reader.documents_at(starts[of_shard], documents.length[of_shard])
        return rows

    def _enter_shard(self, documents: Documents, first: int, last: int) -> None:
        """Record that rows of one shard are read, those of documents `first` to `last` - 1."""
        blocks = self._source.blocks
        ends = [int(blocks.first_row[documents.block[i]]) + int(documents.row[i]) for i in (first, last - 1)]
        self.place.enter(READ, int(blocks.shard[documents.block[first]]), *ends)

    def _decodes_blocks(self, documents: Documents, shards: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return whether each shard is read by decoding whole blocks. A shard is opened when it is first asked for."""
        for number in np.unique(shards[self._shard_kinds[shards] == _UNKNOWN]).tolist():
            of_shard = np.flatnonzero(shards == number)
            self._enter_shard(documents, int(of_shard[0]), int(of_shard[-1]) + 1)
            shard = self._shard(number)
            is_decoded = shard.range_reader is None and shard.token_reader is None
            self._shard_kinds[number] = _BLOCKS if is_decoded else _ROWS
        decoded: NDArray[np.bool_] = self._shard_kinds[shards] == _BLOCKS
        return decoded

    def _resident(self, raw: bool) -> ResidentRows:
        """Return the rows in memory; texts and whole rows are kept apart."""
        if raw not in self._resident_rows:
            max_bytes = int(self._source.cache_bytes * MAX_ROW_SHARE)
            self._resident_rows[raw] = ResidentRows(
                max_bytes, partial(self._decode_block, raw), partial(self._pack_block, raw)
            )
        # Rows come first. The rest is for blocks, which domains at the same speed need at about the same time.
        rows_bytes = sum(rows.num_bytes for rows in self._resident_rows.values())
        self._cache.max_bytes = max(self._source.cache_bytes - rows_bytes, 0)
        return self._resident_rows[raw]

    def _decode_block(self, raw: bool, number: int, rows: NDArray[np.int64]) -> Sequence[Any]:
        """Decode a block and return the named rows; the lengths of rows have no meaning here."""
        block, reader = self._enter_block(number)
        lengths = np.zeros(block.rows, np.int64)
        return reader.payloads(block, lengths, rows) if raw else reader.documents(block, lengths, rows)

    def _pack_block(self, raw: bool, number: int, rows: NDArray[np.int64]) -> PackedRows:
        """Decode a block and return the named rows as they stay in memory: as lines, where the reader has them."""
        block, reader = self._enter_block(number)
        if isinstance(reader, CompressedJsonlReader):
            return PackedRows(reader.lines(block, rows), decode_payloads if raw else reader.unpack_documents)
        return PackedRows(self._decode_block(raw, number, rows), None)

    def _enter_block(self, number: int) -> tuple[BlockRef, ShardReader]:
        """Record that a block is read, and return it with the reader of its shard."""
        block = BlockRef.of(self._source.blocks, number)
        shard = int(self._source.blocks.shard[number])
        first_row = int(self._source.blocks.first_row[number])
        self.place.enter(READ, shard, first_row, first_row + block.rows - 1)
        return block, self._shard(shard).reader

    def _read_by_block(self, shard: _OpenShard, documents: Documents, *, raw: bool) -> Iterator[Any]:
        """Read rows of a format without byte ranges, those of one block together."""
        for first, last in equal_runs(documents.block):
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
        self.guard.use(number)
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]

        index = self._source.index
        fmt = self._formats.of(number)
        path = self._paths.get(number)
        tokenizer = self._source.tokenizer
        chat = tokenizer.chat if tokenizer is not None else None
        reader = open_reader(fmt, path, index.shard_texts[number], self._cache, chat)
        if type(reader) not in self._is_range_reader:
            self._is_range_reader[type(reader)] = isinstance(reader, RangeReader)
        range_reader = cast(RangeReader, reader) if self._is_range_reader[type(reader)] else None
        token_reader = cast(TokenReader, reader) if fmt.holds_tokens else None
        shard = _OpenShard(reader, range_reader, token_reader)
        self._shards[number] = shard
        # Each open shard costs a file descriptor; a run may have many thousands of shards.
        if len(self._shards) > self._max_open_shards:
            _, oldest = self._shards.popitem(last=False)
            oldest.reader.close()
        return shard


def take(items: Sequence[Any], positions: NDArray[np.intp]) -> list[Any]:
    """Return the items at `positions`."""
    return list(map(items.__getitem__, positions.tolist()))


def _row_key(block: Any, row: Any) -> Any:
    """Return one integer per row, ascending as rows lie on disk; for arrays or for single numbers."""
    return np.int64(block) << 32 | row
