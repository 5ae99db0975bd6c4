"""Streams of one domain: what a lookup reads of the index, and what it refuses."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.core.index_tables import SampleColumns
from mixtera_hpc.dataplane.reading import domain_streams
from mixtera_hpc.dataplane.reading.domain_streams import DomainStreams
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
    read = source.make_block_reader()
    reads = []

    def counted(blocks: NDArray[np.int32]) -> SampleColumns:
        reads.append(blocks)
        return read(blocks)

    streams = DomainStreams(source.layout, counted, source.domain_of)
    for _, item in zip(range(6), visits(source), strict=False):
        assert len(streams.documents(0, item, item + 1).block) == 1
    assert len(reads) == num_reads


def test_samples_that_differ_from_the_counts_of_the_index_are_refused(source: Source) -> None:
    read = source.make_block_reader()

    def wrong(blocks: NDArray[np.int32]) -> SampleColumns:
        columns = read(blocks)
        return replace(columns, tokens=columns.tokens + 1)

    streams = DomainStreams(source.layout, wrong, source.domain_of)
    with pytest.raises(DataError, match=r"items, the index counted \d+: the index file is damaged"):
        streams.documents(0, 0, 1)
