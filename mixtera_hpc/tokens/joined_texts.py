"""Encode many documents in one call of gigatoken: their texts are joined by a special token that no vocabulary has.

A byte-level BPE cuts a text at special tokens before everything else, and encodes what lies between them by itself. So
the tokens of a document do not depend on its neighbours, and the borders are found in the result. Price: a copy of the
texts and of the tokens, and a search of the tokens, 0.2 µs per kB. A call per document would cost 0.6 µs more for each,
and leave arrays that have to be joined.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.tokens.definition import AddedTokens
from mixtera_hpc.tokens.token_memory import TokenMemory

__all__ = ["BORDER", "CannotJoin", "Encode", "Encoded", "EncodedDocuments", "JoinedTexts", "with_border"]

BORDER = "\x1dmixtera-hpc: border of documents\x1e"
"""The text of the special token. It begins with a character that is rare in texts."""
CHARACTERS_PER_CALL = 1 << 13
"""Characters that one call encodes, about 2,048 tokens. It holds the interpreter's lock, for about 0.05 ms."""
MAX_JOINED_CHARACTERS = 1 << 24
"""Length of the longest text that is copied to be joined."""
_PROBES = ["", " ", "  a", "a  ", "\n", "\n\nThe", "'s", "12", "\u0301e\u0301", "\u00a0", "漢字", "🙂", "\r\n/", "a"]
"""Texts whose tokens would depend on their neighbours if borders did not cut the text."""

Tokens = NDArray[np.uint32]
Ints = NDArray[np.int64]
Encode = Callable[[str | bytes], Tokens]
"""A function from a text, or its UTF-8, to its tokens."""
Encoded = tuple[NDArray[np.uint32], NDArray[np.int64]]
"""The tokens of several documents, concatenated, and their offsets; shapes (num_tokens,) and (num_documents + 1,)."""


class CannotJoin(Exception):
    """Documents must be encoded one by one: a text contains that of a border, is very long, or has lone surrogates."""


class EncodedDocuments(NamedTuple):
    """The tokens of documents, with the special tokens that begin and end a document."""

    tokens: Tokens
    """The tokens of all documents, possibly with others before and between them."""
    starts: Ints
    """Position of the first token of each document; shape (num_documents,)."""
    sizes: Ints
    """Tokens of each document."""


def with_border(content: Mapping[str, Any], border_id: int) -> dict[str, Any] | None:
    """Return a `tokenizer.json` with the border as one more token; None if tokens may look across it.

    Args:
        content: the file, parsed.
        border_id: an id that no token has.
    """
    added: list[Mapping[str, Any]] = content.get("added_tokens") or []
    flags = ("lstrip", "rstrip", "single_word")
    # With `byte_fallback`, a text may begin with a space that is added once.
    if content["model"].get("byte_fallback") or any(token.get(flag) for token in added for flag in flags):
        return None
    border = {"id": border_id, "content": BORDER, "special": True, "normalized": False, **dict.fromkeys(flags, False)}
    return {**content, "added_tokens": [*added, border]}


class JoinedTexts:
    """An encoder of many documents in one call."""

    def __init__(self, encode: Encode, border_id: int, added: AddedTokens) -> None:
        """Take a function that encodes a text with borders.

        Args:
            encode: it may be called in several threads.
            border_id: the token that stands for a border.
            added: special tokens that begin and end a document.
        """
        self._encode = encode
        self._border_id = border_id
        # Each document gets a border in place of each added token, at least one. All but those in front follow it.
        self._added = np.array([*added.before, *added.after], np.uint32)
        self._num_borders = max(len(self._added), 1)
        self._num_before = len(added.before)
        self._num_behind = self._num_borders - self._num_before

    def encode(self, documents: Sequence[str], memory: TokenMemory) -> EncodedDocuments:
        """Append the tokens of documents to `memory`, with the added tokens of each.

        If no tokens are added to documents, an unused token follows each of them.

        Raises:
            CannotJoin: the documents must be encoded one by one; nothing was appended.
        """
        first = memory.size
        try:
            for texts in _calls(documents):
                tokens = self._encode(_joined(texts, BORDER * self._num_borders))
                # A call begins and ends with all borders. Documents of two calls follow each other like others.
                memory.append(tokens[self._num_behind : len(tokens) - self._num_before])
            tokens = memory.tokens[first:]
            borders = self._borders(tokens, self._num_borders * len(documents)).reshape(-1, self._num_borders)
        except CannotJoin:
            memory.truncate(first)
            raise
        if len(self._added):
            tokens[borders] = self._added
        if self._num_behind:
            stops = borders[:, -1] + 1
            starts = np.append(0, stops)[:-1]
        else:
            starts = borders[:, 0]
            stops = np.append(starts, len(tokens))[1:]
        num_unused = self._num_borders - len(self._added)
        return EncodedDocuments(memory.tokens, starts + first, stops - starts - num_unused)

    def encode_batch(self, documents: Sequence[str]) -> tuple[Tokens, Ints]:
        """Return the tokens of documents without added tokens, and how many each has.

        Returns:
            Two arrays of shapes (num_tokens,), which is read-only, and (num_documents,).

        Raises:
            CannotJoin: the documents must be encoded one by one.
        """
        parts: list[Any] = []
        counts = [np.zeros(0, np.int64)]
        for tokens, borders in self._encoded_calls(documents):
            view = tokens.data
            parts += [view[before + 1 : behind] for before, behind in pairwise(borders.tolist())]
            counts.append(np.diff(borders) - 1)
        return np.frombuffer(b"".join(parts), np.uint32), np.concatenate(counts)

    def count(self, documents: Sequence[str]) -> Ints:
        """Return the number of tokens of each document, without added tokens; shape (num_documents,).

        Raises:
            CannotJoin: the documents must be encoded one by one.
        """
        counts = [np.diff(borders) - 1 for _, borders in self._encoded_calls(documents)]
        return np.concatenate([np.zeros(0, np.int64), *counts])

    def agrees(self) -> bool:
        """Return True if probes have the same tokens together as one by one."""
        try:
            tokens, sizes = self.encode_batch(_PROBES)
        except CannotJoin:
            return False
        each = list(map(self._encode, _PROBES))
        return sizes.tolist() == list(map(len, each)) and np.array_equal(tokens, np.concatenate(each))

    def _encoded_calls(self, documents: Sequence[str]) -> Iterator[tuple[Tokens, Ints]]:
        """Yield the tokens of some documents, and the positions of the borders around each of them."""
        for texts in _calls(documents):
            tokens = self._encode(_joined(texts, BORDER))
            yield tokens, self._borders(tokens, len(texts) + 1)

    def _borders(self, tokens: Tokens, count: int) -> Ints:
        """Return the positions of the borders; raise CannotJoin if there are not `count` of them."""
        borders = np.flatnonzero(tokens == self._border_id)
        if len(borders) != count:
            raise CannotJoin
        return borders


def _calls(documents: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield consecutive documents that are encoded in one call; raise CannotJoin if a document is too long."""
    lengths = np.fromiter(map(len, documents), np.int64, len(documents))
    if lengths.max(initial=0) > MAX_JOINED_CHARACTERS:
        raise CannotJoin
    call = np.cumsum(lengths) // CHARACTERS_PER_CALL
    borders = np.flatnonzero(call[1:] != call[:-1]) + 1
    for begin, end in pairwise([0, *borders.tolist(), len(documents)]):
        yield documents[begin:end]


def _joined(texts: Sequence[str], border: str) -> str | bytes:
    """Return texts with borders before and after each of them."""
    # Empty texts at both ends, so that there are borders there too.
    texts = ["", *texts, ""]
    # A single character outside of ASCII would make all texts up to four times as large.
    if all(map(str.isascii, texts)):
        return border.join(texts)
    try:
        return border.encode().join(map(str.encode, texts))
    except UnicodeEncodeError:
        raise CannotJoin from None
