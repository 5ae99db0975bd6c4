"""Copy the wanted tokens of documents from memory to the arrays of several batches.

What is copied is computed for all batches together. The bytes of many documents are joined in one call, which then
become the integers of the output. Documents that follow each other in memory, such as those of a sequence of
`dataplane.shuffle=sequence`, are copied as one segment. Price: about 1 ns per token and 0.25 µs per segment. One index
array over all tokens costs 2 to 3 times as much for documents of 250 tokens, and the same for documents of 60. If all
segments have one length, they are rows of an array, which one index array per copy reaches without Python per segment.
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

__all__ = ["NO_SHARD", "TokenCopies"]

TOKENS_PER_COPY = 1 << 16
"""Tokens that are copied in one call: large enough to hide its cost, and small enough for the processor's cache."""

MAX_VIEW_BYTES = 1 << 62
"""Largest array that numpy can address. A view of all rows of memory has the bytes of memory times those of a row."""

NO_SHARD = -1
"""Stands for a document that is not in a shard."""
UNWANTED = -1
"""Stands for an item that is in memory."""
_NONE_ADDED = AddedTokens()

Ints = NDArray[np.int64]
Tokens = NDArray[np.integer[Any]]


class _Segments(NamedTuple):
    """Ranges of memory that are copied one after the other; shape (n,) each."""

    begin: Ints
    """Position in memory of the first token."""
    end: Ints
    stop: Ints
    """Position in the output behind each segment and the tokens that are left free after it."""
    before: Ints | None = None
    """Tokens that are left free in front of each segment; None if none are."""
    after: Ints | None = None
    """Tokens that are left free after each segment."""


class _EqualSegments:
    """Segments of one length without gaps, such as the sequences of `dataplane.shuffle=sequence`."""

    def __init__(self, memory: Tokens, begin: Ints, length: int, sizes: Sequence[int]) -> None:
        """Take segments that `of` has checked; `sizes` has the tokens of each output."""
        self._begin = begin
        self._length = length
        borders = np.cumsum([0, *sizes]) // length
        self._borders: list[int] = borders.tolist()
        # Row i has the tokens of memory from i on. No row is read whose tokens are not those of a segment.
        shape = (len(memory) - length + 1, length)
        self._rows: Tokens = np.ndarray(shape, memory.dtype, memory, strides=(memory.itemsize, memory.itemsize))

    @classmethod
    def of(cls, memory: Tokens, segments: _Segments, sizes: Sequence[int]) -> "_EqualSegments | None":
        """Return the segments if all have one length, and nothing is left free between them; else None."""
        if segments.before is not None or not len(segments.begin):
            return None
        lengths = segments.end - segments.begin
        length = int(lengths[0])
        if len(memory) * length * memory.itemsize > MAX_VIEW_BYTES or (lengths != length).any():
            return None
        return cls(memory, segments.begin, length, sizes)

    def write(self, number: int, output: Tokens) -> None:
        """Copy the tokens of an output, given its number, to a flat array."""
        first, last = self._borders[number : number + 2]
        rows = output.reshape(last - first, self._length)
        per_copy = max(TOKENS_PER_COPY // self._length, 1)
        for begin in range(0, last - first, per_copy):
            end = begin + per_copy
            rows[begin:end] = self._rows[self._begin[first:last][begin:end]]


class TokenCopies:
    """The wanted tokens of documents, ready to be copied to one output after the other."""

    def __init__(
        self,
        memory: Tokens,
        begin: Ints,
        documents: Documents,
        sizes: Sequence[int],
        added: AddedTokens = _NONE_ADDED,
        missing: NDArray[np.int8] | None = None,
    ) -> None:
        """Compute what is copied.

        Args:
            memory: all tokens.
            begin: position in memory of the first token of each document that is there.
            documents: says which tokens are wanted; their parts follow each other in the outputs.
            sizes: tokens of each output. Each output begins with the first token of a document's part.
            added: the special tokens that documents begin and end with.
            missing: how many of them are not in memory, for each document: none, all, or all that it begins with; None
                if all documents are in memory as a whole.
        """
        self._memory = memory
        self.shards: NDArray[np.integer[Any]] | None = None
        """The mapped shard of each document, or `NO_SHARD`, if they are to be compared with the index."""
        self._documents = documents
        self._borders = np.cumsum([0, *sizes])
        self._added: list[tuple[Ints, list[int], int]] = []
        if missing is None:
            begin = begin + documents.first
            segments = _Segments(begin, begin + documents.wanted, documents.wanted_stops)
        else:
            gaps = _Gaps.of(documents, added, missing)
            segments = gaps.segments(begin, documents)
            self._added = [
                (positions, np.searchsorted(positions, self._borders).tolist(), token)
                for positions, token in gaps.added_positions(documents, added)
            ]
        segments = _joined(segments, self._borders[1:])
        self._rows = _EqualSegments.of(memory, segments, sizes)
        if self._rows is not None:
            return
        self._begins: list[int] = segments.begin.tolist()
        self._ends: list[int] = segments.end.tolist()
        self._copies = _copies(segments.stop, self._borders)
        self._gaps: tuple[list[int], list[int]] | None = None
        if segments.before is not None and segments.after is not None:
            self._gaps = segments.before.tolist(), segments.after.tolist()
        self._zeros = [bytes(n * memory.itemsize) for n in range(max(len(added.before), len(added.after)) + 1)]

    def shards_of(self, numbers: range) -> NDArray[np.integer[Any]]:
        """Return the different shards, among `shards`, that `write` reads for some outputs, which follow each other."""
        if self.shards is None:
            return np.zeros(0, np.int64)
        borders = self._borders[[numbers.start, numbers.stop]]
        begin, end = self._documents.wanted_stops.searchsorted(borders, "right").tolist()
        # Without a sort: there may be thousands of documents of few shards.
        return np.flatnonzero(np.bincount(self.shards[begin:end] - NO_SHARD)[1:])

    def write(self, number: int, output: Tokens) -> None:
        """Copy the tokens of an output, and write the special tokens that begin and end documents."""
        if self._rows is not None:
            self._rows.write(number, output)
            return
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


@dataclass(frozen=True, slots=True)
class _Gaps:
    """The special tokens of documents that are not in memory; shape (n,) each."""

    before: Ints
    """Special tokens that each document begins with and that are not in memory."""
    stored: Ints
    """Tokens in memory."""

    @classmethod
    def of(cls, documents: Documents, added: AddedTokens, missing: NDArray[np.int8]) -> "_Gaps":
        """Return the gaps; see `TokenCopies`."""
        return cls(np.where(missing > 0, len(added.before), 0), documents.size - missing)

    def segments(self, begin: Ints, documents: Documents) -> _Segments:
        """Return the ranges of memory that hold the wanted tokens, and the wanted tokens around them."""
        lengths = documents.wanted
        first = np.minimum(np.maximum(documents.first - self.before, 0), self.stored)
        last = np.minimum(np.maximum(documents.last - self.before, 0), self.stored)
        before = np.minimum(np.maximum(self.before - documents.first, 0), lengths)
        after = lengths - before - (last - first)
        return _Segments(begin + first, begin + last, documents.wanted_stops, before, after)

    def added_positions(self, documents: Documents, added: AddedTokens) -> Iterator[tuple[Ints, int]]:
        """Yield every added token that is not in memory, with its ascending positions in all outputs together."""
        starts = documents.wanted_stops - documents.wanted
        stored_stop = self.before + self.stored
        for number, token in enumerate(added.before):
            yield self._wanted(documents, starts, np.where(self.before > 0, number, UNWANTED)), token
        for number, token in enumerate(added.after):
            item = documents.size - len(added.after) + number
            yield self._wanted(documents, starts, np.where(item >= stored_stop, item, UNWANTED)), token

    def _wanted(self, documents: Documents, starts: Ints, item: Ints) -> Ints:
        """Return the positions in the outputs of one item of each document, where it is wanted."""
        is_wanted = (documents.first <= item) & (item < documents.last)
        positions: Ints = (starts + item - documents.first)[is_wanted]
        return positions


def _joined(segments: _Segments, output_stops: Ints) -> _Segments:
    """Join neighbours in memory that lie in one output; `output_stops` has the position behind each output."""
    begin, end, stop, before, after = segments
    is_border = end[:-1] != begin[1:]
    if before is not None and after is not None:
        is_border |= (after[:-1] > 0) | (before[1:] > 0)
    # The last document of each output.
    is_border[np.searchsorted(stop, output_stops[output_stops < stop[-1]])] = True
    if is_border.all():
        return segments
    first = np.append(0, np.flatnonzero(is_border) + 1)
    last = np.append(first[1:], len(begin)) - 1
    if before is None or after is None:
        return _Segments(begin[first], end[last], stop[last])
    return _Segments(begin[first], end[last], stop[last], before[first], after[last])


def _copies(segment_stops: Ints, borders: Ints) -> list[list[int]]:
    """Return, for every output, the number of the segment behind each copy; `borders` has the borders of outputs."""
    targets: list[int] = []
    counts = []
    for begin, end in pairwise(borders.tolist()):
        count = max(round((end - begin) / TOKENS_PER_COPY), 1)
        targets += [begin + (end - begin) * number // count for number in range(1, count + 1)]
        counts.append(count)
    numbers = np.searchsorted(segment_stops, targets, side="right").tolist()
    ends = itertools.accumulate(counts, initial=0)
    return [numbers[begin:end] for begin, end in pairwise(ends)]
