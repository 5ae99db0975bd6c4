"""Copy the wanted tokens of documents from memory to the arrays of several batches.

The bytes of many documents are joined in one call, which then become the integers of the output. Documents that follow
each other in memory, such as those of a sequence of `dataplane.shuffle=sequence`, are copied as one segment. Price:
about 1 ns per token and 0.25 µs per segment. One index array over all tokens costs 2 to 3 times as much for documents
of 250 tokens, and the same for documents of 60.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.tokens.definition import AddedTokens

__all__ = ["TextTokens", "copy_tokens", "write_parts"]

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
    """True where the token that ends a document is stored behind the text."""


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


def copy_tokens(
    memory: Tokens, texts: TextTokens, documents: Documents, added: AddedTokens, outputs: Sequence[Tokens]
) -> None:
    """Copy the wanted tokens of each document, and write the special tokens that begin and end it.

    Args:
        memory: all tokens.
        texts: the place of each document in memory.
        documents: says which tokens are wanted.
        added: special tokens that are not part of the text.
        outputs: flat arrays that are filled one after the other. Each begins with the first token of a document's part.
    """
    segments = _segments_of(texts, documents, added, np.cumsum(list(map(len, outputs))))
    view = memory.data
    begins = segments.begin.tolist()
    ends = segments.end.tolist()
    has_gaps = bool(segments.before.any() or segments.after.any())
    gaps = [bytes(count * memory.itemsize) for count in range(max(len(added.before), len(added.after)) + 1)]
    first = 0
    for output, stops in zip(outputs, _copies(segments.stop, outputs), strict=True):
        written = 0
        for last in stops:
            parts: list[Any] = [
                view[begin:end] for begin, end in zip(begins[first:last], ends[first:last], strict=True)
            ]
            if has_gaps:
                parts = _with_gaps(parts, segments.before[first:last], segments.after[first:last], gaps)
            copied = np.frombuffer(b"".join(parts), memory.dtype)
            output[written : written + len(copied)] = copied
            written += len(copied)
            first = last
    _write_added(texts, documents, added, outputs)


def write_parts(values: Tokens, outputs: Sequence[Tokens]) -> None:
    """Copy consecutive parts of `values` to the outputs."""
    begin = 0
    for output in outputs:
        output[:] = values[begin : begin + len(output)]
        begin += len(output)


def _segments_of(texts: TextTokens, documents: Documents, added: AddedTokens, output_stops: Ints) -> _Segments:
    """Return the ranges of memory that hold the wanted tokens; neighbours in memory and in an output are joined."""
    num_before = len(added.before)
    lengths = documents.last - documents.first
    # The wanted part of the text. The wanted tokens before and after it are written later.
    text_first = np.minimum(np.maximum(documents.first - num_before, 0), texts.count)
    text_last = np.minimum(np.maximum(documents.last - num_before, 0), texts.count)
    begin = texts.first + text_first
    end = texts.first + text_last
    before = np.minimum(np.maximum(num_before - documents.first, 0), lengths)
    after = lengths - before - (text_last - text_first)
    if len(added.after) == 1:
        # The stored token that ends the document is copied with the text.
        in_place = texts.ends_with_eos & (after == 1)
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


def _copies(segment_stops: Ints, outputs: Sequence[Tokens]) -> list[list[int]]:
    """Return, for every output, the number of the segment behind each copy."""
    copies = []
    begin = 0
    for output in outputs:
        end = begin + len(output)
        targets = np.arange(begin + TOKENS_PER_COPY, end + TOKENS_PER_COPY, TOKENS_PER_COPY)
        copies.append(np.searchsorted(segment_stops, np.minimum(targets, end), side="right").tolist())
        begin = end
    return copies


def _with_gaps(segments: list[Any], before: Ints, after: Ints, gaps: list[bytes]) -> list[Any]:
    """Return the segments with a gap of so many tokens before and after each; `gaps` has one of every size."""
    spaced: list[Any] = [b""] * (3 * len(segments))
    spaced[0::3] = [gaps[count] for count in before.tolist()]
    spaced[1::3] = segments
    spaced[2::3] = [gaps[count] for count in after.tolist()]
    return spaced


def _write_added(texts: TextTokens, documents: Documents, added: AddedTokens, outputs: Sequence[Tokens]) -> None:
    """Write the special tokens that begin and end documents."""
    borders = np.cumsum([0, *map(len, outputs)])
    for positions, token in _added_positions(texts, documents, added):
        first = np.searchsorted(positions, borders).tolist()
        for output, offset, (begin, end) in zip(outputs, borders[:-1].tolist(), pairwise(first), strict=True):
            output[positions[begin:end] - offset] = token


def _added_positions(texts: TextTokens, documents: Documents, added: AddedTokens) -> Iterator[tuple[Ints, int]]:
    """Yield every added token with its positions in all outputs together, ascending."""
    lengths = documents.last - documents.first
    starts = np.cumsum(lengths) - lengths
    # Item of each added token inside its document: first those before the text, then those after it.
    items = [(np.full(len(starts), k), token) for k, token in enumerate(added.before)]
    items += [(len(added.before) + texts.count + k, token) for k, token in enumerate(added.after)]
    for item, token in items:
        is_wanted = (documents.first <= item) & (item < documents.last)
        yield (starts + item - documents.first)[is_wanted], token
