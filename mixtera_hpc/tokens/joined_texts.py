"""Encode many documents in one call of gigatoken: their texts are joined by a special token that no vocabulary has.

A byte-level BPE cuts a text at special tokens before everything else, and encodes what lies between them by itself. So
the tokens of a document do not depend on its neighbours, and the borders are found in the result. Price: a copy of the
texts and a search of the tokens, 0.3 µs per kB. A call per document would cost 1 µs more for each, and leave arrays
that have to be joined.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.tokens.definition import AddedTokens

__all__ = ["BORDER", "Encode", "EncodedDocuments", "JoinedTexts", "with_border"]

BORDER = "\x1dmixtera-hpc: border of documents\x1e"
"""The text of the special token. It begins with a character that is rare in texts."""
MAX_JOINED_CHARACTERS = 1 << 20
"""Most characters that are joined. The copy and the tokenizer hold the interpreter's lock, for up to 6 ms."""
_PROBES = ["", " ", "  a", "a  ", "\n", "\n\nThe", "'s", "12", "\u0301e\u0301", "\u00a0", "漢字", "🙂", "\r\n/", "a"]
"""Texts whose tokens would depend on their neighbours if borders did not cut the text."""

Tokens = NDArray[np.uint32]
Ints = NDArray[np.int64]
Encode = Callable[[str | bytes], Tokens]
"""A function from a text, or its UTF-8, to its tokens."""


class EncodedDocuments(NamedTuple):
    """The tokens of documents, with the special tokens that begin and end a document."""

    tokens: Tokens
    """The tokens of all documents, possibly with others between two documents."""
    starts: Ints
    """Position of the first token of each document; shape (num_documents,)."""
    sizes: Ints
    """Tokens of each document."""


def with_border(definition: bytes, border_id: int) -> bytes | None:
    """Return a `tokenizer.json` with the border as one more token; None if tokens may look across it.

    Args:
        definition: the file.
        border_id: an id that no token has.
    """
    content: dict[str, Any] = json.loads(definition)
    added: list[Mapping[str, Any]] = content.get("added_tokens") or []
    flags = ("lstrip", "rstrip", "single_word")
    # With `byte_fallback`, a text may begin with a space that is added once.
    if content["model"].get("byte_fallback") or any(token.get(flag) for token in added for flag in flags):
        return None
    border = {"id": border_id, "content": BORDER, "special": True, "normalized": False, **dict.fromkeys(flags, False)}
    return json.dumps({**content, "added_tokens": [*added, border]}).encode()


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
        self._num_before = len(added.before)
        self._num_after = len(added.after)
        # Each border becomes one of the added tokens: those that end a document, then those that begin the next one.
        self._added = np.array([*added.after, *added.before], np.uint32)
        self._num_borders = max(len(self._added), 1)
        self._separator = BORDER * self._num_borders

    def encode(self, documents: Sequence[str], sizes: Ints | None = None) -> EncodedDocuments | None:
        """Return the tokens of documents; None if they must be encoded one by one.

        Args:
            documents: the texts.
            sizes: the expected tokens of each, with the special tokens. Borders where they are expected need no search.
        """
        if sum(map(len, documents)) > MAX_JOINED_CHARACTERS:
            return None
        # Empty texts at both ends, so that there are borders before and after every document.
        tokens = self._encode(self._join(["", *documents, ""]))
        is_border = tokens == self._border_id
        if np.count_nonzero(is_border) != self._num_borders * (len(documents) + 1):
            return None  # A document contains the text of a border.
        borders = None if sizes is None else self._expected_borders(is_border, sizes)
        if borders is None:
            borders = np.flatnonzero(is_border).reshape(-1, self._num_borders)
        if len(self._added):
            tokens[borders] = self._added
        starts = borders[:-1, -1] + 1 - self._num_before
        return EncodedDocuments(tokens, starts, borders[1:, 0] + self._num_after - starts)

    def _expected_borders(self, is_border: NDArray[np.bool_], sizes: Ints) -> Ints | None:
        """Return the positions of the borders before each document and at the end, if documents have these sizes."""
        # With smaller sizes, a border could count twice.
        if (sizes < len(self._added)).any():
            return None
        # Without special tokens, documents have a border between them all the same.
        steps = sizes - len(self._added) + self._num_borders
        first = np.append(0, np.cumsum(steps))
        borders = first[:, None] + np.arange(self._num_borders)
        if int(borders[-1, -1]) + 1 != len(is_border) or not is_border[borders].all():
            return None
        return borders

    def _join(self, texts: Sequence[str]) -> str | bytes:
        """Return the texts with borders between them."""
        # A single character outside of ASCII would make all texts up to four times as large.
        if all(map(str.isascii, texts)):
            return self._separator.join(texts)
        return self._separator.encode().join(map(str.encode, texts))

    def agrees(self) -> bool:
        """Return True if probes have the same tokens together as one by one."""
        encoded = self.encode(_PROBES)
        if encoded is None:
            return False
        firsts = encoded.starts + self._num_before
        lasts = encoded.starts + encoded.sizes - self._num_after
        return all(
            np.array_equal(encoded.tokens[first:last], self._encode(probe))
            for probe, first, last in zip(_PROBES, firsts.tolist(), lasts.tolist(), strict=True)
        )
