"""Copy the wanted tokens of documents from memory to the arrays of several batches.

What is copied is computed for all batches together. The bytes of many documents are joined in one call, which then
become the integers of the output. Documents that follow each other in memory, such as those of a sequence of
`dataplane.shuffle=sequence`, are copied as one segment. Price: about 1 ns per token and 0.25 µs per segment. One index
array over all tokens costs 2 to 3 times as much for documents of 250 tokens, and the same for documents of 60.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.tokens.definition import AddedTokens

__all__ = ["TextTokens", "TokenCopies"]

TOKENS_PER_COPY = 1 << 16
"""Tokens that are copied in one call: large enough to hide its cost, and small enough for the processor's cache."""

Ints = NDArray[np.int64]
Tokens = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class TextTokens:
    """Positions of the tokens of documents in memory, without special tokens at their borders; shape (n,) each."""

    first: Ints
    """Position of the first token in memory."""
    count: Ints
    """Number of tokens."""
    ends_with_eos: NDArray[np.bool_]
    """True where `eos_id` is stored behind the text."""
    eos_id: int | None
    """The token that ends a document."""


class _Segments(NamedTuple):
    """Ranges of memory that are copied one after the other; shape (n,) each."""

    begin: Ints
    """Position in memory of the first token."""
    end: Ints
    before: Ints
    """Tokens that are left free in front of each segment."""
    after: Ints
    stop: Ints
    """Position in the output behind each segment and the tokens that are left free."""


class TokenCopies:
    """The wanted tokens of documents, ready to be copied to one output after the other."""

    def __init__(
        self, memory: Tokens, texts: TextTokens, documents: Documents, added: AddedTokens, sizes: Sequence[int]
    ) -> None:
        """Compute what is copied.

        Args:
            memory: all tokens.
            texts: the place of each document in memory.
            documents: says which tokens are wanted; their parts follow each other in the outputs.
            added: special tokens that are not part of the text.
            sizes: tokens of each output. Each output begins with the first token of a document's part.
        """
        self._memory = memory
        self._borders = np.cumsum([0, *sizes])
        is_eos_stored = added.after == (texts.eos_id,)
        stored_eos = texts.ends_with_eos if is_eos_stored else np.zeros(len(texts.count), np.bool_)
        segments = _segments_of(texts, documents, added, stored_eos, self._borders[1:])
        self._begins: list[int] = segments.begin.tolist()
        self._ends: list[int] = segments.end.tolist()
        self._copies = _copies(segments.stop, self._borders)
        self._gaps: tuple[list[int], list[int]] | None = None
        if segments.before.any() or segments.after.any():
            self._gaps = segments.before.tolist(), segments.after.tolist()
        self._zeros = [bytes(n * memory.itemsize) for n in range(max(len(added.before), len(added.after)) + 1)]
        self._added = [
            (positions, np.searchsorted(positions, self._borders).tolist(), token)
            for positions, token in _added_positions(texts, documents, added, stored_eos)
        ]

    def write(self, number: int, output: Tokens) -> None:
        """Copy the tokens of an output, and write the special tokens that begin and end documents."""
        written = 0
        first = self._copies[number - 1][-1] if number else 0
        for last in self._copies[number]:
            if last == first:  # The next segment is longer than a copy.
                continue
            copied = np.frombuffer(b"".join(self._parts(first, last)), self._memory.dtype)
            output[written : written + len(copied)] = copied
            written += len(copied)
            first = last
        for positions, borders, token in self._added:
            own = positions[borders[number] : borders[number + 1]]
            if len(own):
                output[own - self._borders[number]] = token

    def _parts(self, first: int, last: int) -> list[Any]:
        """Return the bytes of segments, with what is left free before and after each."""
        view = self._memory.data
        own = slice(first, last)
        parts: list[Any] = [view[begin:end] for begin, end in zip(self._begins[own], self._ends[own], strict=True)]
        if self._gaps is None:
            return parts
        before, after = self._gaps
        spaced: list[Any] = [b""] * (3 * len(parts))
        spaced[0::3] = [self._zeros[count] for count in before[own]]
        spaced[1::3] = parts
        spaced[2::3] = [self._zeros[count] for count in after[own]]
        return spaced


def _segments_of(
    texts: TextTokens, documents: Documents, added: AddedTokens, stored_eos: NDArray[np.bool_], output_stops: Ints
) -> _Segments:
    """Return the ranges of memory that hold the wanted tokens; neighbours in memory and in an output are joined.

    Args:
        texts: see `TokenCopies`, as `documents` and `added`.
        documents: says which tokens are wanted.
        added: special tokens that are not part of the text.
        stored_eos: mask of the documents whose token after the text is stored there.
        output_stops: position behind each output.
    """
    num_before = len(added.before)
    lengths = documents.last - documents.first
    # The wanted part of the text. The wanted tokens before and after it are written later.
    text_first = np.minimum(np.maximum(documents.first - num_before, 0), texts.count)
    text_last = np.minimum(np.maximum(documents.last - num_before, 0), texts.count)
    begin = texts.first + text_first
    end = texts.first + text_last
    before = np.minimum(np.maximum(num_before - documents.first, 0), lengths)
    after = lengths - before - (text_last - text_first)
    # A stored token that ends the document is copied with the text.
    in_place = stored_eos & (after == 1)
    end = end + in_place
    after = after - in_place

    stop = np.cumsum(lengths)
    is_border = (end[:-1] != begin[1:]) | (after[:-1] > 0) | (before[1:] > 0)
    # The last document of each output.
    is_border[np.searchsorted(stop, output_stops[output_stops < stop[-1]])] = True
    if is_border.all():
        return _Segments(begin, end, before, after, stop)
    first = np.append(0, np.flatnonzero(is_border) + 1)
    last = np.append(first[1:], len(begin)) - 1
    return _Segments(begin[first], end[last], before[first], after[last], stop[last])


def _copies(segment_stops: Ints, borders: Ints) -> list[list[int]]:
    """Return, for every output, the number of the segment behind each copy; `borders` has the borders of outputs."""
    targets = [
        np.append(np.arange(begin + TOKENS_PER_COPY, end, TOKENS_PER_COPY), end)
        for begin, end in pairwise(borders.tolist())
    ]
    numbers = np.searchsorted(segment_stops, np.concatenate(targets), side="right").tolist()
    ends = itertools.accumulate(map(len, targets), initial=0)
    return [numbers[begin:end] for begin, end in pairwise(ends)]


def _added_positions(
    texts: TextTokens, documents: Documents, added: AddedTokens, stored_eos: NDArray[np.bool_]
) -> Iterator[tuple[Ints, int]]:
    """Yield every added token that is not stored, with its ascending positions in all outputs together."""
    if not added.before and stored_eos.all():
        return
    lengths = documents.last - documents.first
    starts = np.cumsum(lengths) - lengths
    # Item of each added token inside its document: first those before the text, then those after it.
    items = [(np.full(len(starts), k), token) for k, token in enumerate(added.before)]
    items += [(len(added.before) + texts.count + k, token) for k, token in enumerate(added.after)]
    for number, (item, token) in enumerate(items, 1):
        is_wanted = (documents.first <= item) & (item < documents.last)
        if number == len(items):
            # A stored token is the only one after the text, and the last of the items.
            is_wanted &= ~stored_eos
        yield (starts + item - documents.first)[is_wanted], token
