"""Tokenize the documents of shards that hold text, every document of a read once.

Texts are read in disk order and encoded in the order in which they are served. So the tokens of most sequences follow
each other in memory, and are copied to the batches as those of stored documents are (`stored.token_copy`). Documents in
which a later sequence begins stay in memory.

Price: beside reading, decoding and encoding about 0.3 µs per document.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.rows.row_reader import RowReader
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.stored.read_errors import no_tokenizer_error, token_count_error
from mixtera_hpc.dataplane.reading.stored.token_copy import TokenCopies
from mixtera_hpc.dataplane.reading.stored.token_gather import TokenWriter
from mixtera_hpc.dataplane.reading.texts.cut_documents import UNREAD, CutDocuments
from mixtera_hpc.dataplane.watchdog.progress import PACK, TOKENIZE
from mixtera_hpc.tokens.token_memory import TokenMemory

__all__ = ["TextGather", "row_keys"]

Ints = NDArray[np.int64]


class TextGather:
    """A reader of documents of text as tokens. Not thread-safe: one per reading thread."""

    def __init__(self, source: Source, rows: RowReader) -> None:
        """Read nothing yet; `rows` reads the texts."""
        self._source = source
        self._rows = rows
        self._cut_documents = CutDocuments()
        self._memory = TokenMemory()

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
        number = np.empty_like(disk_order)
        number[disk_order] = np.cumsum(is_first) - 1
        # `number` has the distinct document of each part. Memory holds special tokens, too, so none are missing.
        return TokenCopies(self._memory.tokens, starts[number], documents, sizes)

    def _read(self, read: "_DistinctDocuments") -> Ints:
        """Write the tokens of documents to memory; return the position of the first token of each."""
        self._memory.clear()
        documents = read.documents
        starts = np.full(len(read.keys), UNREAD)
        cut = np.flatnonzero((read.begin > 0) | (read.end < documents.size))
        starts[cut] = self._cut_documents.take(read.keys[cut], read.begin[cut], self._memory)
        unread = np.flatnonzero(starts == UNREAD)
        if len(unread):
            texts = documents if len(unread) == len(starts) else documents.select(unread)
            starts[unread] = self._encode(texts, read.position[unread])
        self._store_cut(read, starts)
        return starts

    def _store_cut(self, read: "_DistinctDocuments", starts: Ints) -> None:
        """Copy the rest of the documents in which later sequences begin, because the next read clears the memory."""
        sizes = read.documents.size
        cut = np.flatnonzero(read.end < sizes)
        # Neighbouring sequences may share one token.
        firsts = np.maximum(read.end[cut] - 1, read.begin[cut])
        begins = starts[cut]
        self._cut_documents.store(read.keys[cut], firsts, self._memory.tokens, begins + firsts, begins + sizes[cut])

    def _encode(self, documents: Documents, position: Ints) -> Ints:
        """Read documents in disk order and write their tokens to memory in the order of `position`.

        Returns:
            The position in memory of the first token of each document.
        """
        tokenizer = self._source.tokenizer
        if tokenizer is None:
            raise no_tokenizer_error()
        read = self._rows.texts(documents)
        self._rows.place.enter(TOKENIZE)
        # The positions differ, so they are sorted without comparisons.
        document_at = np.full(int(position.max()) + 1, -1)
        document_at[position] = np.arange(len(position))
        order = document_at[document_at >= 0]
        row_of_document = np.empty_like(order)
        row_of_document[read.positions] = np.arange(len(order))
        texts = list(map(read.rows.__getitem__, row_of_document[order].tolist()))
        encoded = tokenizer.encode_documents(texts, self._memory)
        self._rows.place.enter(PACK)

        # A wrong count would shift every later sequence of the stream without a sign.
        wrong = np.flatnonzero(encoded.sizes != documents.size[order])
        if len(wrong):
            raise token_count_error(self._source, documents, int(order[wrong[0]]), int(encoded.sizes[wrong[0]]))
        starts = np.empty_like(encoded.starts)
        starts[order] = encoded.starts
        return starts


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


def row_keys(documents: Documents) -> Ints:
    """Return one integer per document, ascending as rows lie on disk."""
    return documents.block.astype(np.int64) << 32 | documents.row
