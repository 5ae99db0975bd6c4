"""From documents to tokens for shards that hold text: every document of a read is tokenized once, in disk order.

The tokens of all documents of a read lie in one array, from which they are copied to the batches as those of stored
documents are (`stored.token_copy`). Documents in which a later sequence begins stay in memory.
Price: beside reading, decoding and encoding about 0.3 µs per document.
"""

from collections import OrderedDict
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
from mixtera_hpc.dataplane.watchdog.progress import PACK
from mixtera_hpc.tokens.tokenizer import Tokenizer

__all__ = ["TextGather", "row_keys"]

KEPT_BYTES = 32 << 20
"""Tokens of documents that stay in memory, because a later sequence begins inside them."""

Ints = NDArray[np.int64]
Tokens = NDArray[np.uint32]


class TextGather:
    """Reads documents of text as tokens. Not thread-safe: one per reading thread."""

    def __init__(self, source: Source, rows: RowReader) -> None:
        """Read nothing yet; `rows` reads the texts."""
        self._source = source
        self._rows = rows
        self._kept: OrderedDict[int, Tokens] = OrderedDict()
        """Row key → tokens of documents in which later sequences begin, the newest at the end."""
        self._kept_bytes = 0

    def prepare(self, documents: Documents, sizes: Sequence[int]) -> TokenWriter:
        """Return the wanted tokens of documents, special tokens included, ready to be copied.

        Tokens of conversations have the bit `NOT_TRAINED` where they are not trained. A document that occurs twice is
        read once.

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
        read = _DistinctDocuments(
            keys[first],
            documents.select(disk_order[first]),
            begin=np.minimum.reduceat(documents.first[disk_order], first),
            end=np.maximum.reduceat(documents.last[disk_order], first),
        )
        memory, starts = self._read(read)
        self._keep(read, memory, starts)

        number = np.empty_like(disk_order)
        number[disk_order] = np.cumsum(is_first) - 1
        # Documents are in memory as they are served: with their special tokens.
        return TokenCopies(memory, starts[number], documents, sizes)

    def _read(self, read: "_DistinctDocuments") -> tuple[Tokens, Ints]:
        """Return an array with the tokens of documents, and the position of the first token of each."""
        documents = read.documents
        starts = np.empty(len(read.keys), np.int64)
        kept = [i for i in np.flatnonzero(read.is_cut).tolist() if int(read.keys[i]) in self._kept]
        is_kept = np.zeros(len(starts), np.bool_)
        is_kept[kept] = True
        unread = np.flatnonzero(~is_kept)
        encoded = _EncodedTexts(self._source.tokenizer)
        if len(unread):
            texts = documents.select(unread)
            rows = self._rows.read(texts, raw=False, convert=encoded.add)
            self._rows.place.enter(PACK)
            numbers = np.array(rows.rows, np.intp)
            # A wrong count would shift every later sequence of the stream without a sign.
            sizes = encoded.sizes()[numbers]
            wrong = np.flatnonzero(sizes != texts.size[rows.positions])
            if len(wrong):
                raise token_count_error(self._source, texts, int(rows.positions[wrong[0]]), int(sizes[wrong[0]]))
            starts[unread[rows.positions]] = encoded.starts()[numbers]

        tokens = [self._kept[int(read.keys[i])] for i in kept]
        starts[kept] = encoded.num_tokens + np.cumsum([0, *map(len, tokens)])[:-1]
        return np.concatenate([*encoded.parts, *tokens]), starts

    def _keep(self, read: "_DistinctDocuments", memory: Tokens, starts: Ints) -> None:
        """Keep the tokens of documents in which later sequences begin, and forget the oldest ones beyond the budget."""
        size = read.documents.size
        for i in np.flatnonzero(read.end < size).tolist():
            key = int(read.keys[i])
            if self._kept.pop(key, None) is None:
                self._kept_bytes += int(size[i]) * memory.itemsize
            self._kept[key] = memory[starts[i] : starts[i] + size[i]].copy()
        while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.nbytes


class _DistinctDocuments(NamedTuple):
    """Different documents, in disk order; shape (n,) each."""

    keys: Ints
    documents: Documents
    begin: Ints
    """First token that is wanted."""
    end: Ints
    """One past the last token that is wanted."""

    @property
    def is_cut(self) -> NDArray[np.bool_]:
        """Mask of the documents of which earlier or later sequences have other tokens."""
        return (self.begin > 0) | (self.end < self.documents.size)


class _EncodedTexts:
    """The tokens of texts that were encoded one group after the other."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        if tokenizer is None:
            raise no_tokenizer_error()
        self._encode = tokenizer.encode_documents
        self.parts: list[Tokens] = []
        """The tokens of each group."""
        self.num_tokens = 0
        self._starts: list[Ints] = []
        self._sizes: list[Ints] = []
        self._num_documents = 0

    def add(self, texts: Sequence[str]) -> Sequence[int]:
        """Encode a group of texts; return their numbers."""
        encoded = self._encode(texts)
        self.parts.append(encoded.tokens)
        self._starts.append(encoded.starts + self.num_tokens)
        self._sizes.append(encoded.sizes)
        self.num_tokens += len(encoded.tokens)
        first = self._num_documents
        self._num_documents += len(texts)
        return range(first, self._num_documents)

    def starts(self) -> Ints:
        """Return the position of the first token of each text, where all groups follow each other."""
        return np.concatenate(self._starts)

    def sizes(self) -> Ints:
        """Return the number of tokens of each text."""
        return np.concatenate(self._sizes)


def row_keys(documents: Documents) -> Ints:
    """Return one integer per document, ascending as rows lie on disk."""
    return documents.block.astype(np.int64) << 32 | documents.row
