"""From documents of a stream to what the trainer gets: tokens of whole sequences, or raw payloads.

Neighbouring sequences of a domain are read as one span, so a document is tokenized once however many of them it fills; the
last document of a span is kept for the next. Price per document: one positioned read, one JSON decode, one encode.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.expand import Documents
from mixtera_hpc.dataplane.source import Source
from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.cache import BlockCache
from mixtera_hpc.formats.format import BlockRef, ShardReader
from mixtera_hpc.formats.registry import load_format

__all__ = ["DocumentReader", "Span"]

MAX_OPEN_SHARDS = 64


class Span:
    """Consecutive items of one stream and the documents they come from."""

    def __init__(self, tokens: NDArray[np.int32], document: NDArray[np.int32], is_first: NDArray[np.bool_]) -> None:
        self.tokens = tokens
        """Shape (n,)."""
        self.document = document
        """Which document of the span each token belongs to; shape (n,)."""
        self.is_first = is_first
        """Whether a token is the first of its document; shape (n,)."""


class DocumentReader:
    """Reads documents; keeps shards open and the last document of every domain tokenized. One per reading thread."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._cache = BlockCache()
        self._last: dict[int, tuple[tuple[int, int], NDArray[np.int32]]] = {}

    def span(self, domain: int, documents: Documents) -> Span:
        """The tokens of `documents`, special tokens included.

        Raises:
            DataError: a document cannot be read, or has other tokens than the index counted.
        """
        pieces = self._tokenized(domain, documents)
        tokens = np.concatenate([t[a:b] for t, a, b in zip(pieces, documents.first, documents.last, strict=True)])
        lengths = documents.last - documents.first
        starts = np.cumsum(lengths) - lengths
        is_first = np.zeros(len(tokens), np.bool_)
        is_first[starts[documents.first == 0]] = True
        return Span(tokens, np.repeat(np.arange(len(lengths), dtype=np.int32), lengths), is_first)

    def payloads(self, documents: Documents) -> list[Any]:
        """The raw rows of `documents`."""
        return self._by_block(documents, lambda reader, *place: reader.payloads(*place))

    def close(self) -> None:
        """Close every shard."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def _tokenized(self, domain: int, documents: Documents) -> list[NDArray[np.int32]]:
        """The tokens of each document, whole."""
        place, kept = self._last.get(domain, ((-1, -1), None))
        skip = int(kept is not None and place == (int(documents.block[0]), int(documents.row[0])))
        pieces = [kept] if skip and kept is not None else []
        if skip < len(documents.block):
            texts = self._by_block(_tail(documents, skip), lambda reader, *at: reader.documents(*at))
            pieces += self._encoded(texts)
        for number, piece in enumerate(pieces):
            if len(piece) != documents.size[number]:
                raise self._other_tokens(documents, number, len(piece))
        self._last[domain] = (int(documents.block[-1]), int(documents.row[-1])), pieces[-1]
        return pieces

    def _encoded(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        tokenizer = self._source.tokenizer
        if tokenizer is None:
            raise DataError("Tokens were asked for without a tokenizer.")
        flat, offsets = tokenizer.encode_batch(texts)
        if not self._source.layout.num_specials:
            return [t.astype(np.int32) for t in np.split(flat, offsets[1:-1])]
        counts = np.diff(offsets) + 1
        ends = np.cumsum(counts)
        tokens = np.empty(int(ends[-1]), np.int32)
        is_text = np.ones(len(tokens), np.bool_)
        is_text[ends - 1] = False
        tokens[is_text] = flat
        tokens[ends - 1] = cast(int, tokenizer.eos_id)
        return np.split(tokens, ends[:-1])

    def _by_block(self, documents: Documents, read: Any) -> list[Any]:
        """Read the rows of each block together; results in stream order."""
        results: list[Any] = [None] * len(documents.block)
        by_row = np.lexsort((documents.row, documents.block))
        borders = np.flatnonzero(np.diff(documents.block[by_row])) + 1
        for group in np.split(by_row, borders):
            block = int(documents.block[group[0]])
            rows = documents.row[group].astype(np.int64)
            unique, position = np.unique(rows, return_inverse=True)
            with_rows = self._read(block, documents, unique, read)
            for index, where in zip(group.tolist(), position.tolist(), strict=True):
                results[index] = with_rows[where]
        return results

    def _read(self, block: int, documents: Documents, rows: NDArray[np.int64], read: Any) -> list[Any]:
        blocks = self._source.blocks
        reference = BlockRef(
            offset=int(blocks.offset[block]),
            length=int(blocks.length[block]),
            first_row=int(blocks.first_row[block]),
            rows=int(blocks.rows[block]),
        )
        found: list[Any] = read(self._reader(int(blocks.shard[block])), reference, documents.lengths[block], rows)
        return found

    def _reader(self, shard: int) -> ShardReader:
        if shard in self._readers:
            self._readers.move_to_end(shard)
            return self._readers[shard]
        facts = self._source.facts
        path = Path(facts.data_root) / facts.shard_paths[shard]
        reader = load_format(facts.shard_formats[shard]).open(path, facts.text, self._cache)
        self._readers[shard] = reader
        if len(self._readers) > MAX_OPEN_SHARDS:
            self._readers.popitem(last=False)[1].close()
        return reader

    def _other_tokens(self, documents: Documents, number: int, got: int) -> DataError:
        blocks, block = self._source.blocks, int(documents.block[number])
        shard = self._source.facts.shard_paths[int(blocks.shard[block])]
        row = int(blocks.first_row[block]) + int(documents.row[number])
        return DataError(
            f"{shard} row {row} has {got} tokens, the index counted {int(documents.size[number])}: the file changed, or the "
            "tokenizer is another one.\n  Run mixtera-hpc index verify, and build the index again."
        )


def _tail(documents: Documents, skip: int) -> Documents:
    if not skip:
        return documents
    return Documents(
        block=documents.block[skip:],
        row=documents.row[skip:],
        first=documents.first[skip:],
        last=documents.last[skip:],
        size=documents.size[skip:],
        lengths=documents.lengths,
    )
