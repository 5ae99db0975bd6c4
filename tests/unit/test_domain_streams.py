"""Lookups in streams: what they return, what they read of the index, and what they refuse."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.core.index_tables import SampleColumns
from mixtera_hpc.dataplane.reading import domain_streams
from mixtera_hpc.dataplane.reading.domain_streams import DomainStreams
from mixtera_hpc.dataplane.reading.lookup import columns
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.errors import DataError


@pytest.fixture
def source(collection: list[str]) -> Source:
    return open_source(compose([*collection, "dataplane.shuffle=block"]), Local())


def visits(source: Source) -> Iterator[int]:
    """Yield the first items of the first two windows of domain 0, for ever."""
    order = source.layout.epoch_order(0, 0)
    while True:
        yield from order.starts[:2].tolist()


@pytest.mark.parametrize(("budget_bytes", "num_reads"), [(1 << 20, 2), (1, 6)])
def test_the_window_cache_stays_within_its_budget(
    source: Source, budget_bytes: int, num_reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(domain_streams, "WINDOW_CACHE_BYTES", budget_bytes)
    read = source.samples.make_block_reader()
    reads = []

    def counted(blocks: NDArray[np.int32], /, *, only_sizes: bool = False) -> SampleColumns:
        reads.append(blocks)
        return read(blocks, only_sizes=only_sizes)

    streams = DomainStreams(source.layout, counted, source.samples.domain_of)
    for _, item in zip(range(6), visits(source), strict=False):
        assert len(streams.documents(0, item, item + 1).block) == 1
    assert len(reads) == num_reads


def test_windows_of_past_epochs_are_dropped(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domain_streams, "MIN_TABLE_BYTES", 1)
    items = int(source.layout.epoch_items()[0])
    streams = source.streams()
    sizes = [streams.documents(0, epoch * items, (epoch + 1) * items).windows.num_bytes for epoch in range(20)]
    # Up to three epochs of garbage beside each epoch that can be asked for.
    assert max(sizes) < 8 * sizes[0]


def test_windows_that_are_needed_soon_are_built_with_those_that_are_missing(source: Source) -> None:
    read = source.samples.make_block_reader()
    reads = []

    def counted(blocks: NDArray[np.int32], /, *, only_sizes: bool = False) -> SampleColumns:
        reads.append(len(blocks))
        return read(blocks, only_sizes=only_sizes)

    end = int(source.layout.epoch_order(0, 0).starts[1])
    # Windows are blocks. After the first items, most of the window remains; after its last item, nothing does.
    for start, stop, num_blocks in ((0, 1, 1), (end - 1, end, 2)):
        reads.clear()
        streams = DomainStreams(source.layout, counted, source.samples.domain_of)
        streams.documents(0, start, stop)
        assert sum(reads) == num_blocks
        streams.documents(0, end, end + 1)
        assert sum(reads) == 2


def test_epochs_of_permuted_sequences_share_their_windows(collection: list[str]) -> None:
    source = open_source(compose([*collection, "dataplane.shuffle=sequence"]), Local())
    items = int(source.layout.epoch_items()[0])
    documents = source.streams().documents(0, 0, 3 * items)
    first, second, third = np.split(documents.number, 3)
    assert first.tolist() == second.tolist() == third.tolist()


def test_samples_that_differ_from_the_counts_of_the_index_are_refused(source: Source) -> None:
    read = source.samples.make_block_reader()

    def wrong(blocks: NDArray[np.int32], /, *, only_sizes: bool = False) -> SampleColumns:
        columns = read(blocks, only_sizes=only_sizes)
        return replace(columns, tokens=columns.tokens + 1)

    streams = DomainStreams(source.layout, wrong, source.samples.domain_of)
    with pytest.raises(DataError, match=r"items, the index counted \d+: the index file is damaged"):
        streams.documents(0, 0, 1)


def base_order(source: Source, domain: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield block, row, size, offset and length of every document of a stream, computed row by row."""
    layout = source.layout
    read = source.samples.make_block_reader()
    for epoch in count():
        order = layout.epoch_order(domain, epoch)
        for window in range(len(order.first_block) - 1):
            rows = []
            for block in layout.table.block[layout.entries(domain)][order.blocks_of(window)].tolist():
                samples = read(np.array([block], np.int32))
                offsets = np.cumsum(samples.length) - samples.length
                sizes = samples.tokens + layout.added_tokens(np.full(len(samples.tokens), block, np.int32))
                places = zip(sizes.tolist(), offsets.tolist(), samples.length.tolist(), strict=True)
                of_block = [(block, row, *place) for row, place in enumerate(places)]
                rows += [of_block[row] for row in np.flatnonzero(source.samples.domain_of(samples) == domain).tolist()]
            yield from (rows[i] for i in layout.order.rows(domain, epoch, window, len(rows)).tolist())


SETTINGS = ["shuffle=none", "shuffle=sequence", "shuffle=block", "window_bytes=5000", "window_bytes=10000000"]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("window_bytes", [1, 3000, 1 << 20])
def test_a_lookup_of_many_streams_follows_the_order_of_each(
    collection: list[str], setting: str, window_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spans of all domains, of up to four epochs, with windows that are dropped and built again meanwhile."""
    monkeypatch.setattr(domain_streams, "WINDOW_CACHE_BYTES", window_bytes)
    monkeypatch.setattr(domain_streams, "MIN_TABLE_BYTES", 1)
    source = open_source(compose([*collection, f"dataplane.{setting}"]), Local())
    items = source.layout.epoch_items()
    expected = []
    for domain in range(source.num_domains):
        wanted = 0
        documents = base_order(source, domain)
        of_domain = []
        while wanted < 4 * items[domain]:
            of_domain.append(next(documents))
            wanted += of_domain[-1][2]
        expected.append(of_domain)

    streams = source.streams()
    # In ascending pieces, so that later lookups return to windows of earlier ones.
    found: list[list[tuple[int, ...]]] = [[] for _ in items]
    domains = np.arange(len(items))
    for piece in range(3):
        starts = items * 4 * piece // 3
        stops = items * 4 * (piece + 1) // 3
        documents = streams.documents_of_spans(domains, starts, stops)
        ends = np.cumsum(documents.last - documents.first)
        owner = np.searchsorted(np.cumsum(stops - starts), ends)
        # A document may be cut by a border of pieces; then it begins in the first of them.
        columns = (documents.block, documents.row, documents.size, documents.offset, documents.length)
        places = zip(*(column.tolist() for column in columns), strict=True)
        for domain, first, place in zip(owner.tolist(), documents.first.tolist(), places, strict=True):
            if first == 0:
                found[domain].append(place)
    for domain, of_domain in enumerate(expected):
        assert found[domain] == [place for place in of_domain if place[2]]


@pytest.mark.parametrize("min_sorted_search", [0, 1 << 15])
def test_spans_of_several_samples_hold_the_samples_one_by_one(
    collection: list[str], min_sorted_search: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "MIN_SORTED_SEARCH", min_sorted_search)
    source = open_source(compose([*collection, "mixture.unit=samples"]), Local())
    streams = source.streams()
    num_items = int(source.layout.epoch_items()[0])
    # Several samples of an epoch, one sample, and samples of two epochs.
    starts = np.array([num_items // 2, 1, num_items - 2])
    stops = np.array([num_items // 2 + 3, 2, num_items + 3])
    found = streams.documents_of(0, starts, stops)
    items = [item for span in zip(starts, stops, strict=True) for item in range(*span)]
    alone = [streams.documents(0, item, item + 1) for item in items]
    for name in ("block", "row", "offset", "length", "wanted", "size"):
        assert getattr(found, name).tolist() == [int(getattr(one, name)[0]) for one in alone]
    # A selection has the same columns, whether or not they are in memory.
    chosen = np.array([3, 0])
    fresh = streams.documents_of(0, starts, stops).select(chosen)
    assert found.select(chosen).row.tolist() == fresh.row.tolist() == found.row[chosen].tolist()
