"""From documents to tokens for shards that hold text: every document of a read is tokenized once.

Texts are read in disk order and encoded in the order in which they are served. So the tokens of most sequences follow
each other in memory, and are copied to the batches as those of stored documents are (`stored.token_copy`). Documents in
which a later sequence begins stay in memory.

Price: beside reading, decoding and encoding about 0.3 µs per document.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.rows.row_reader import RowReader
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.stored.read_errors import no_tokenizer_error, token_count_error
from mixtera_hpc.dataplane.reading.stored.token_copy import TokenCopies
from mixtera_hpc.dataplane.reading.stored.token_gather import TokenWriter
from mixtera_hpc.dataplane.watchdog.progress import PACK, TOKENIZE

__all__ = ["TextGather", "row_keys"]

REMEMBERED_BYTES = 32 << 20
"""Most bytes of documents that stay in memory, because a later sequence begins inside them."""
FIRST_TOKENS = 1 << 16
"""Tokens for which memory is allocated at the beginning."""
MAX_TOKENS = 1 << 24
"""Most tokens for which memory stays allocated after a read."""
TOKENS_PER_CALL = 1 << 13
"""Tokens that one call encodes. It holds the interpreter's lock, for about 0.2 ms."""

Ints = NDArray[np.int64]
Tokens = NDArray[np.uint32]


class TextGather:
    """A reader of documents of text as tokens. Not thread-safe: one per reading thread."""

    def __init__(self, source: Source, rows: RowReader) -> None:
        """Read nothing yet; `rows` reads the texts."""
        self._source = source
        self._rows = rows
        self._remembered: OrderedDict[int, Tokens] = OrderedDict()
        """Row key → tokens of documents in which later sequences begin, the newest at the end."""
        self._remembered_bytes = 0
        self._memory = _TokenMemory()

    def prepare(self, documents: Documents, sizes: Sequence[int]) -> TokenWriter:
        """Return the wanted tokens of documents, special tokens included, ready to be copied.

        Tokens of conversations have the bit `NOT_TRAINED` where they are not trained. A document that occurs twice is
        read once. Copy the tokens before the next call, which uses the same memory.

        Args:
            documents: their parts follow each other in the outputs.
            sizes: tokens of each output. Each begins with the first token of a part.

        Raises:
            DataError: a document cannot be read, or has other tokens than the index counted.
        """
        keys = row_keys(documents)
        # Keys ascend as rows lie on disk. Equal keys are the same row.
        disk_order = np.argsort(keys)
        keys = keys[disk_order]
        is_first = np.ones(len(keys), np.bool_)
        is_first[1:] = keys[1:] != keys[:-1]
        first = np.flatnonzero(is_first)
        position = np.minimum.reduceat(disk_order, first)
        read = _DistinctDocuments(
            keys=keys[first],
            documents=documents.select(position),
            position=position,
            begin=np.minimum.reduceat(documents.first[disk_order], first),
            end=np.maximum.reduceat(documents.last[disk_order], first),
        )
        starts = self._read(read)
        self._remember(read, starts)

        number = np.empty_like(disk_order)
        number[disk_order] = np.cumsum(is_first) - 1
        # Documents are in memory as they are served: with their special tokens.
        return TokenCopies(self._memory.tokens, starts[number], documents, sizes)

    def _read(self, read: "_DistinctDocuments") -> Ints:
        """Write the tokens of documents to memory; return the position of the first token of each."""
        memory = self._memory
        memory.clear()
        documents = read.documents
        starts = np.empty(len(read.keys), np.int64)
        is_unread = np.ones(len(starts), np.bool_)
        cut = np.flatnonzero((read.begin > 0) | (read.end < documents.size))
        known = [
            number for number, key in zip(cut.tolist(), read.keys[cut].tolist(), strict=True) if key in self._remembered
        ]
        if known:
            tokens = [self._remembered[key] for key in read.keys[known].tolist()]
            stops = np.cumsum(documents.size[known])
            starts[known] = memory.append(np.concatenate(tokens)) + stops - documents.size[known]
            is_unread[known] = False
        unread = np.flatnonzero(is_unread)
        if len(unread):
            texts = documents if len(unread) == len(starts) else documents.select(unread)
            starts[unread] = self._encode(texts, read.position[unread])
        return starts

    def _encode(self, documents: Documents, position: Ints) -> Ints:
        """Read documents in disk order and write their tokens to memory in the order of `position`.

        Returns:
            The position in memory of the first token of each document.
        """
        tokenizer = self._source.tokenizer
        if tokenizer is None:
            raise no_tokenizer_error()
        read = self._rows.read(documents, raw=False)
        self._rows.place.enter(TOKENIZE)
        # The positions differ, so they are sorted without comparisons.
        document_at = np.full(int(position.max()) + 1, -1)
        document_at[position] = np.arange(len(position))
        order = document_at[document_at >= 0]
        row = np.empty_like(order)
        row[read.positions] = np.arange(len(order))
        texts = list(map(read.rows.__getitem__, row[order].tolist()))
        starts = np.empty(len(order), np.int64)
        expected = documents.size[order]
        sizes = np.empty(len(order), np.int64)
        # A group ends with the document in which it reaches its number of tokens.
        call = np.cumsum(expected) // TOKENS_PER_CALL
        borders = np.flatnonzero(call[1:] != call[:-1]) + 1
        for begin, end in pairwise([0, *borders.tolist(), len(texts)]):
            own = slice(begin, end)
            encoded = tokenizer.encode_documents(texts[own], expected[own])
            starts[own] = encoded.starts + self._memory.append(encoded.tokens)
            sizes[own] = encoded.sizes
        self._rows.place.enter(PACK)

        # A wrong count would shift every later sequence of the stream without a sign.
        wrong = np.flatnonzero(sizes != expected)
        if len(wrong):
            raise token_count_error(self._source, documents, int(order[wrong[0]]), int(sizes[wrong[0]]))
        of_documents = np.empty_like(starts)
        of_documents[order] = starts
        return of_documents

    def _remember(self, read: "_DistinctDocuments", starts: Ints) -> None:
        """Copy the tokens of documents in which later sequences begin, and forget the oldest ones beyond the budget."""
        sizes = read.documents.size
        chosen = np.flatnonzero(read.end < sizes)
        begins = starts[chosen]
        stops = begins + sizes[chosen]
        tokens = self._memory.tokens
        for key, begin, stop in zip(read.keys[chosen].tolist(), begins.tolist(), stops.tolist(), strict=True):
            if key in self._remembered:
                self._remembered.move_to_end(key)
                continue
            # The next read uses the memory of this one.
            self._remembered[key] = tokens[begin:stop].copy()
            self._remembered_bytes += self._remembered[key].nbytes
        while self._remembered_bytes > REMEMBERED_BYTES and len(self._remembered) > 1:
            _, oldest = self._remembered.popitem(last=False)
            self._remembered_bytes -= oldest.nbytes


class _DistinctDocuments(NamedTuple):
    """Different documents, in disk order; shape (n,) each."""

    keys: Ints
    documents: Documents
    position: Ints
    """Position of the first part of each document among the parts that are served."""
    begin: Ints
    """First token that is wanted."""
    end: Ints
    """One past the last token that is wanted."""


class _TokenMemory:
    """An array that grows. The next read uses the same memory, which is still in the processor's cache."""

    def __init__(self) -> None:
        self._array: Tokens = np.empty(FIRST_TOKENS, np.uint32)
        self._size = 0

    @property
    def tokens(self) -> Tokens:
        """All tokens."""
        return self._array[: self._size]

    def clear(self) -> None:
        """Forget all tokens."""
        if len(self._array) > MAX_TOKENS:
            self._array = np.empty(FIRST_TOKENS, np.uint32)
        self._size = 0

    def append(self, tokens: Tokens) -> int:
        """Add tokens; return the position of the first one."""
        first = self._size
        self._size += len(tokens)
        if self._size > len(self._array):
            larger = np.empty(2 * self._size, np.uint32)
            larger[:first] = self._array[:first]
            self._array = larger
        self._array[first : self._size] = tokens
        return first


def row_keys(documents: Documents) -> Ints:
    """Return one integer per document, ascending as rows lie on disk."""
    return documents.block.astype(np.int64) << 32 | documents.row
