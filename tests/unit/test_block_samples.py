"""Samples of blocks in memory: read once, sorted by domain, within a byte budget."""

import numpy as np
import pytest
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.core.index_tables import SampleColumns
from mixtera_hpc.dataplane.reading.lookup.block_samples import BlockSamples
from mixtera_hpc.dataplane.reading.source import Source, open_source


@pytest.fixture(scope="module")
def source(collection: list[str]) -> Source:
    return open_source(compose(collection), Local())


class CountedReads:
    """Reads blocks of a source, and counts how often each is read."""

    def __init__(self, source: Source) -> None:
        self.counts = np.zeros(len(source.blocks), np.int64)
        self._read = source.make_block_reader()

    def __call__(self, blocks: NDArray[np.int32]) -> SampleColumns:
        self.counts[blocks] += 1
        return self._read(blocks)


def visits(source: Source) -> list[NDArray[np.int32]]:
    """Return groups of blocks, every block several times."""
    random = np.random.default_rng(0)
    return [random.integers(0, len(source.blocks), 6).astype(np.int32) for _ in range(60)]


def test_blocks_in_memory_are_not_read_again(source: Source) -> None:
    read = CountedReads(source)
    samples = BlockSamples(source.layout, read, source.domain_of, None, 1 << 20)
    for blocks in visits(source):
        samples.load(blocks)
    assert set(read.counts[np.concatenate(visits(source))].tolist()) == {1}


@pytest.mark.parametrize("num_blocks", [0, 1, 20])
def test_memory_is_bounded_and_every_domain_is_found(source: Source, num_blocks: int) -> None:
    block_rows = int(source.blocks.rows.max())
    probe = BlockSamples(source.layout, source.make_block_reader(), source.domain_of, None, 1)
    max_bytes = num_blocks * block_rows * probe.columns.row_bytes
    read = CountedReads(source)
    samples = BlockSamples(source.layout, read, source.domain_of, None, max_bytes)
    single = source.make_block_reader()
    for blocks in visits(source):
        samples.load(blocks)
        # Blocks that are requested together are in memory together.
        assert len(samples.columns) <= max(num_blocks, len(blocks)) * block_rows
        for block in blocks.tolist():
            columns = single(np.array([block], np.int32))
            domain = source.domain_of(columns)
            wanted = np.arange(source.num_domains)
            first, stop = samples.locate(np.full(len(wanted), block), wanted)
            for own in wanted.tolist():
                rows = samples.columns["row"][first[own] : stop[own]]
                assert np.array_equal(rows, np.flatnonzero(domain == own))
                assert np.array_equal(samples.columns["length"][first[own] : stop[own]], columns.length[rows])
    # Blocks are read again only where they do not fit.
    assert (read.counts.max() > 1) == (num_blocks < 2)
