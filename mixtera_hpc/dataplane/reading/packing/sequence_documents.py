"""The parts of documents that a sequence consists of, for every way of packing.

With `dataplane.pack=best_fit`, `dataplane.pack_group` consecutive sequences of one domain and epoch form a group; the
last group of an epoch holds the rest. A sequence that lies in two epochs is a group of its own. Price: packing a group
costs 3 to 4 µs per document in every process that serves some of its sequences; groups in use stay in memory.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.lanes import cut_spans
from mixtera_hpc.core.packing.best_fit import Fragments, pack_best_fit
from mixtera_hpc.dataplane.reading.domain_streams import Documents, DomainStreams, equal_runs
from mixtera_hpc.dataplane.reading.packing.sample_costs import SampleCosts
from mixtera_hpc.dataplane.reading.source import Source

__all__ = ["PackedGroup", "SequenceDocuments"]

Ints = NDArray[np.int64]

MAX_FRAGMENTS_IN_MEMORY = 1 << 22
"""Parts of documents of packed groups that stay in memory, 16 bytes each."""


@dataclass(frozen=True, slots=True)
class PackedGroup:
    """The tokens of consecutive sequences, in the order in which they are packed."""

    first: int
    """Number of the first sequence in the stream."""
    count: int
    """Sequences of the group."""
    starts: Ints
    """First token of every fragment of a document, counted in the group, and the tokens of the group; (n + 1,)."""
    items: Ints
    """Item of the stream at which each fragment begins; shape (n,)."""

    @classmethod
    def of_documents(cls, first: int, count: int, start: int, lengths: Ints, fragments: Fragments) -> "PackedGroup":
        """Return the group that begins at item `start` of the stream, where its documents have these lengths."""
        document_starts = start + np.cumsum(lengths) - lengths
        return cls(first, count, fragments.starts, document_starts[fragments.document] + fragments.first)

    def spans(self, begins: Ints, ends: Ints) -> tuple[Ints, Ints]:
        """Return first and last item, in the stream, of the parts of documents in ranges of tokens of the group."""
        begin, end, fragment = cut_spans(begins, ends, self.starts)
        shift = self.items[fragment] - self.starts[fragment]
        return begin + shift, end + shift


class SequenceDocuments:
    """The look-up of the documents of sequences. Not thread-safe: one per reading thread."""

    def __init__(self, source: Source, streams: DomainStreams) -> None:
        """Use the streams of the same thread."""
        self._source = source
        self._streams = streams
        plane = source.config.dataplane
        self.is_packed = source.layout.in_tokens and plane.pack == "best_fit"
        """True if documents are not in stream order, so that neighbouring sequences are not one span of the stream."""
        self._group_size = plane.pack_group
        self._groups: OrderedDict[tuple[int, int], PackedGroup] = OrderedDict()
        """(domain, first sequence) → group, the one used last at the end."""
        self._num_fragments = 0
        self._costs = SampleCosts(source)

    def sample_costs(self, documents: Documents) -> NDArray[np.float64]:
        """Return the `dataplane.sample_cost` of every document; shape (n,)."""
        return self._costs.of_documents(documents)

    def documents(self, domain: NDArray[np.integer[Any]], numbers: Ints) -> Documents:
        """Return the documents of sequences, one sequence after the other.

        Args:
            domain: of each sequence.
            numbers: number of each sequence in the stream of its domain.
        """
        if self.is_packed and len(domain):
            return self._packed_documents(domain, numbers)
        grid = self._source.grid
        starts = self._source.stream_version.origins[domain] + numbers * grid.stride
        return self._streams.documents_of_spans(domain.astype(np.int64), starts, starts + grid.length)

    def _packed_documents(self, domain: NDArray[np.integer[Any]], numbers: Ints) -> Documents:
        # Neighbouring sequences of a group are cut together.
        order = np.lexsort((numbers, domain))
        runs = [order[first:last] for first, last in equal_runs(domain[order])]
        # Groups are packed first, which looks up documents itself.
        packed = [self._packed_spans(int(domain[run[0]]), numbers[run]) for run in runs]
        starts, stops = (np.concatenate(ends) for ends in zip(*packed, strict=True))
        # Every sequence has the same number of items, so the position of a span tells its sequence.
        first_items = np.cumsum(stops - starts) - (stops - starts)
        sequence = order[first_items // self._source.grid.length]
        in_order = np.argsort(sequence, kind="stable")
        of_spans = domain[sequence[in_order]].astype(np.int64)
        return self._streams.documents_of_spans(of_spans, starts[in_order], stops[in_order])

    def spans(self, domain: int, sequence: int) -> list[tuple[int, int]]:
        """Return the items of the stream that a sequence consists of, as (first, one past the last), in its order."""
        if not self.is_packed:
            return [self._source.span(domain, sequence, 1)]
        starts, stops = self._packed_spans(domain, np.array([sequence]))
        return list(zip(starts.tolist(), stops.tolist(), strict=True))

    def group(self, domain: int, sequence: int) -> PackedGroup:
        """Return the packed group that a sequence belongs to."""
        first_whole, num_whole = (
            int(value[0]) for value in self._source.lanes.whole_sequences(domain, np.array([sequence]))
        )
        first = sequence
        count = 1
        if first_whole <= sequence < first_whole + num_whole:
            first -= (sequence - first_whole) % self._group_size
            count = min(self._group_size, first_whole + num_whole - first)
        key = (domain, first)
        if key not in self._groups:
            self._add(key, self._pack(domain, first, count))
        self._groups.move_to_end(key)
        return self._groups[key]

    def in_stream_order(self, domain: int, first: int, count: int) -> Documents:
        """Return the documents that consecutive sequences cover together, as `dataplane.pack=concat` serves them."""
        return self._streams.documents(domain, *self._source.span(domain, first, count))

    def served_items(self, domain: int, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the items of the stream in ranges of sequences, given as items of the stream without packing.

        Args:
            domain: domain_id.
            ranges: first item and one past the last. They begin and end where sequences begin; what lies in front of
                the first whole sequence of an epoch stays.
        """
        if not self.is_packed:
            return ranges
        served = [items for start, stop in ranges for items in self._served_range(domain, start, stop)]
        # The first range tells where the epoch, or the part of it since a drop, begins; it may be empty.
        return [(ranges[0][0], ranges[0][0]), *served]

    def _served_range(self, domain: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
        stride = self._source.grid.stride
        origin = int(self._source.stream_version.origins[domain])
        sequence = -((origin - start) // stride)  # Division that rounds up.
        if sequence * stride + origin > start:
            yield start, min(sequence * stride + origin, stop)
        last = (stop - origin) // stride
        while sequence < last:
            group = self.group(domain, sequence)
            end = min(group.first + group.count, last)
            if sequence == group.first and end == group.first + group.count:
                yield origin + sequence * stride, origin + end * stride
            else:
                # Without the token that the last sequence shares with the next one.
                bounds = np.array([[sequence], [end]]) - group.first
                starts, stops = group.spans(*(bounds * stride))
                yield from zip(starts.tolist(), stops.tolist(), strict=True)
            sequence = end

    def _packed_spans(self, domain: int, numbers: Ints) -> tuple[Ints, Ints]:
        """Return the parts of documents that sequences consist of, as spans of the stream."""
        grid = self._source.grid
        spans = []
        position = 0
        # Neighbours that belong to one group are cut together.
        while position < len(numbers):
            group = self.group(domain, int(numbers[position]))
            rest = numbers[position:]
            outside = np.flatnonzero((rest < group.first) | (rest >= group.first + group.count))
            own = rest[: outside[0]] if len(outside) else rest
            begins = (own - group.first) * grid.stride
            spans.append(group.spans(begins, begins + grid.length))
            position += len(own)
        starts, stops = (np.concatenate(parts) for parts in zip(*spans, strict=True))
        return starts, stops

    def _pack(self, domain: int, first: int, count: int) -> PackedGroup:
        grid = self._source.grid
        documents = self.in_stream_order(domain, first, count)
        start, _ = self._source.span(domain, first, count)
        lengths = documents.last - documents.first
        fragments = pack_best_fit(lengths, grid.stride, grid.length - grid.stride)
        return PackedGroup.of_documents(first, count, start, lengths, fragments)

    def _add(self, key: tuple[int, int], group: PackedGroup) -> None:
        """Keep a group, and forget those that were not used for longest."""
        self._groups[key] = group
        self._num_fragments += len(group.items)
        while self._num_fragments > MAX_FRAGMENTS_IN_MEMORY and len(self._groups) > 1:
            _, oldest = self._groups.popitem(last=False)
            self._num_fragments -= len(oldest.items)
