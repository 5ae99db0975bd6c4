"""From documents of a stream to what the trainer gets: tokens of whole sequences, or raw payloads.

The spans of several steps and domains are read together: every document once, in the order of the disk, and the last of each
domain is kept for the next time. Price per document: one positioned read, one JSON decode, one encode, a microsecond of our own.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import BlockRef, RangeReader, ShardReader, TokenReader
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.seek_points import seek_folder_of
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.tokens.tokenizer import Tokenizer

__all__ = ["DocumentReader", "PackedTokens"]

MAX_OPEN_SHARDS = 64
ENCODED_TOGETHER = 128
"""Documents in memory as text at once."""

Tokens = NDArray[np.uint32]
_NO_TOKENS: Tokens = np.zeros(0, np.uint32)


class PackedTokens:
    """Items of streams in a row, and the documents they come from."""

    def __init__(self, tokens: NDArray[np.int32], document: NDArray[np.int32], goes_on: NDArray[np.bool_]) -> None:
        self.tokens = tokens
        """Shape (n,)."""
        self.document = document
        """Which document each token belongs to, numbers ascending by one; shape (n,)."""
        self.goes_on = goes_on
        """Whether a token is any but the first of its document; shape (n,)."""


class _Open(NamedTuple):
    """An open shard."""

    reader: ShardReader
    ranged: RangeReader | None
    """The same, where rows have bytes of their own."""
    tokens: TokenReader | None
    """The same, where rows are token ids."""


class _What(NamedTuple):
    """What is read of a row."""

    at: Callable[[RangeReader, NDArray[np.int64], NDArray[np.int64]], list[Any]]
    of_block: Callable[[ShardReader, BlockRef, NDArray[np.int64], NDArray[np.int64]], list[Any]]


_DOCUMENTS = _What(lambda reader, *where: reader.documents_at(*where), lambda reader, *at: reader.documents(*at))
_TOKENS = _What(_DOCUMENTS.at, lambda reader, block, lengths, rows: cast(TokenReader, reader).tokens(block, rows))
_PAYLOADS = _What(lambda reader, *where: reader.payloads_at(*where), lambda reader, *at: reader.payloads(*at))


class DocumentReader:
    """Reads documents; keeps shards open and the last document of every domain tokenized. One per reading thread."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._readers: OrderedDict[int, _Open] = OrderedDict()
        indexes = source.config.index
        self._cache = BlockCache(seek_folders=[seek_folder_of(path) for path in (indexes.path, *indexes.paths)])
        self._kept: dict[int, tuple[int, Tokens]] = {}
        """Domain → key and tokens of the document it was read to."""
        ends = source.tokenizer.eos_id if source.tokenizer and source.layout.num_specials else None
        self._special: Tokens = _NO_TOKENS if ends is None else np.array([ends], np.uint32)

    def read(self, documents: Documents, read_to: Mapping[int, int]) -> PackedTokens:
        """The tokens of `documents`, of one stream or several, special tokens included; one that comes twice is read once.

        Args:
            read_to: domain → position of the document that its stream will go on with.

        Raises:
            DataError: a document cannot be read, or has other tokens than the index counted.
        """
        tokens = self._tokenized(documents)
        for domain, last in read_to.items():
            self._kept[domain] = int(_key(documents.block[last], documents.row[last])), tokens[last]
        return self._cut(documents, tokens)

    def payloads(self, documents: Documents) -> list[Any]:
        """The raw rows of `documents`."""
        order = np.lexsort((documents.row, documents.block))
        results: list[Any] = [None] * len(order)
        for at, found in zip(order.tolist(), self._read(documents.only(order), _PAYLOADS), strict=True):
            results[at] = found
        return results

    def close(self) -> None:
        """Close every shard."""
        for opened in self._readers.values():
            opened.reader.close()
        self._readers.clear()

    def _cut(self, documents: Documents, tokens: list[Tokens]) -> PackedTokens:
        """What is wanted of each document, in a row; the specials of those that are wanted to their end."""
        first, last = documents.first, documents.last
        lengths = last - first
        pieces = [_NO_TOKENS] * (2 * len(tokens))
        pieces[0::2] = tokens
        pieces[1::2] = [self._special] * len(tokens)
        for i in np.flatnonzero((first > 0) | (last < documents.size)).tolist():
            pieces[2 * i] = tokens[i][first[i] : last[i]]
            pieces[2 * i + 1] = self._special if last[i] == documents.size[i] else _NO_TOKENS
        flat = np.concatenate(pieces).view(np.int32)
        goes_on = np.ones(len(flat), np.bool_)
        goes_on[(np.cumsum(lengths) - lengths)[first == 0]] = False
        return PackedTokens(flat, np.repeat(np.arange(len(lengths), dtype=np.int32), lengths), goes_on)

    def _tokenized(self, documents: Documents) -> list[Tokens]:
        """The tokens of each document, whole, without specials."""
        key, chosen, position = np.unique(_key(documents.block, documents.row), return_index=True, return_inverse=True)
        kept = dict(self._kept.values())
        known = [kept.get(k) for k in key.tolist()]
        missing = [i for i, tokens in enumerate(known) if tokens is None]
        if missing:
            unread = documents.only(chosen[missing])
            for i, tokens in zip(missing, self._encoded(unread), strict=True):
                known[i] = tokens
        return [known[i] for i in position.tolist()]

    def _encoded(self, documents: Documents) -> list[Tokens]:
        """Read and tokenize documents that are sorted by block and row, some at a time."""
        tokenizer = self._source.tokenizer
        if tokenizer is None:
            raise DataError(
                "Tokens were asked for without a tokenizer.\n  Set dataplane.tokenizer, or mixture.unit=samples."
            )
        tokens: list[Tokens] = []
        for first in range(0, len(documents.block), ENCODED_TOGETHER):
            part = documents.only(slice(first, first + ENCODED_TOGETHER))
            tokens += _ids(tokenizer, self._read(part, _DOCUMENTS))
        sizes = np.fromiter(map(len, tokens), np.int64, len(tokens)) + self._source.layout.num_specials
        wrong = np.flatnonzero(sizes != documents.size)
        if len(wrong):
            raise self._other_tokens(documents, int(wrong[0]), int(sizes[wrong[0]]))
        return tokens

    def _read(self, documents: Documents, what: "_What") -> list[Any]:
        """Read rows that are sorted by block and row."""
        blocks = self._source.blocks
        shards, starts = blocks.shard[documents.block], blocks.offset[documents.block] + documents.offset
        results: list[Any] = []
        for first, last in _runs(shards):
            reader, ranged, ids = self._reader(int(shards[first]))
            some = slice(first, last)
            if ranged is not None:
                results += what.at(ranged, starts[some], documents.length[some])
            else:
                of_block = _TOKENS if ids and what is _DOCUMENTS else what
                results += self._by_block(reader, documents.only(some), of_block)
        return results

    def _by_block(self, reader: ShardReader, documents: Documents, what: "_What") -> Iterator[Any]:
        """Read the rows of each block together."""
        blocks = self._source.blocks
        for first, last in _runs(documents.block):
            block = int(documents.block[first])
            rows, position = np.unique(documents.row[first:last].astype(np.int64), return_inverse=True)
            found = what.of_block(reader, BlockRef.of(blocks, block), documents.lengths[block], rows)
            yield from (found[i] for i in position.tolist())

    def _reader(self, shard: int) -> "_Open":
        if shard in self._readers:
            self._readers.move_to_end(shard)
            return self._readers[shard]
        facts = self._source.facts
        path = Path(facts.data_root) / facts.shard_paths[shard]
        fmt = load_format(facts.shard_formats[shard])
        reader = fmt.open(path, facts.text, self._cache)
        ids = cast(TokenReader, reader) if fmt.holds_tokens else None
        self._readers[shard] = _Open(reader, reader if isinstance(reader, RangeReader) else None, ids)
        if len(self._readers) > MAX_OPEN_SHARDS:
            self._readers.popitem(last=False)[1].reader.close()
        return self._readers[shard]

    def _other_tokens(self, documents: Documents, number: int, got: int) -> DataError:
        blocks, block = self._source.blocks, int(documents.block[number])
        shard = self._source.facts.shard_paths[int(blocks.shard[block])]
        row = int(blocks.first_row[block]) + int(documents.row[number])
        return DataError(
            f"{shard} row {row} has {got} tokens, the index counted {int(documents.size[number])}: the file changed, or the "
            "tokenizer is another one.\n  Run mixtera-hpc index verify, and build the index again."
        )


def _ids(tokenizer: Tokenizer, documents: Sequence[Any]) -> list[Tokens]:
    """The tokens of documents, of which some may be ids already; these without an end-of-text token at their end."""
    texts = [d for d in documents if isinstance(d, str)]
    encoded = tokenizer.encode_each(texts) if texts else []
    if len(texts) == len(documents):
        return encoded
    rest = iter(encoded)
    return [next(rest) if isinstance(d, str) else _without_eos(d, tokenizer.eos_id) for d in documents]


def _without_eos(ids: NDArray[Any], eos_id: int | None) -> Tokens:
    ends = eos_id is not None and len(ids) > 0 and int(ids[-1]) == eos_id
    return ids[: len(ids) - ends].astype(np.uint32)


def _key(block: Any, row: Any) -> Any:
    """One integer per row, ascending as rows lie on disk; of arrays or of single numbers."""
    return np.int64(block) << 32 | row


def _runs(values: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Slices of equal neighbours."""
    borders = np.flatnonzero(values[1:] != values[:-1]) + 1
    return pairwise([0, *borders.tolist(), len(values)])
