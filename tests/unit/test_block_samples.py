"""Samples of blocks in memory: read once, sorted by domain, within a byte budget."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.core.index_tables import SampleColumns
from mixtera_hpc.dataplane.reading.lookup.block_samples import BlockSamples
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.dataplane.sample_subset import SampleSubset
from mixtera_hpc.index.build.build import build_index


@pytest.fixture(scope="module")
def source(collection: list[str]) -> Source:
    return open_source(compose(collection), Local())


class CountedReads:
    """Reads blocks of a source, and counts how often each is read."""

    def __init__(self, source: Source) -> None:
        self.counts = np.zeros(len(source.blocks), np.int64)
        self._read = source.samples.make_block_reader()

    def __call__(self, blocks: NDArray[np.int32], /, *, only_sizes: bool = False) -> SampleColumns:
        self.counts[blocks] += 1
        return self._read(blocks, only_sizes=only_sizes)


def visits(source: Source) -> list[NDArray[np.int32]]:
    """Return groups of blocks, every block several times."""
    random = np.random.default_rng(0)
    return [random.integers(0, len(source.blocks), 6).astype(np.int32) for _ in range(60)]


def test_blocks_in_memory_are_not_read_again(source: Source) -> None:
    read = CountedReads(source)
    samples = BlockSamples(source.layout, read, source.samples.domain_of, None, 1 << 20)
    for blocks in visits(source):
        samples.load(blocks)
    assert set(read.counts[np.concatenate(visits(source))].tolist()) == {1}


@pytest.mark.parametrize("num_blocks", [0, 1, 20])
def test_memory_is_bounded_and_every_domain_is_found(source: Source, num_blocks: int) -> None:
    block_rows = int(source.blocks.rows.max())
    probe = BlockSamples(source.layout, source.samples.make_block_reader(), source.samples.domain_of, None, 1)
    max_bytes = num_blocks * block_rows * probe.columns.row_bytes
    read = CountedReads(source)
    samples = BlockSamples(source.layout, read, source.samples.domain_of, None, max_bytes)
    single = source.samples.make_block_reader()
    for blocks in visits(source):
        samples.load(blocks)
        # Blocks that are requested together are in memory together.
        assert len(samples.columns) <= max(num_blocks, len(blocks)) * block_rows
        for block in blocks.tolist():
            columns = single(np.array([block], np.int32))
            domain = source.samples.domain_of(columns)
            wanted = np.arange(source.num_domains)
            first, stop = samples.locate(np.full(len(wanted), block), wanted)
            for own in wanted.tolist():
                rows = samples.columns["row"][first[own] : stop[own]]
                assert np.array_equal(rows, np.flatnonzero(domain == own))
                assert np.array_equal(samples.columns["length"][first[own] : stop[own]], columns.length[rows])
    # Blocks are read again only where they do not fit.
    assert (read.counts.max() > 1) == (num_blocks < 2)


def test_domains_of_blocks_with_one_domain_are_not_read(tmp_path: Path) -> None:
    """Blocks of `a` and `b` have one domain each, those of `mixed` have both, and one sample of `b` is dropped."""
    for name, sources in {"a": "aaaaaa", "b": "bbbbbb", "mixed": "abababab"}.items():
        rows = [{"text": f"{name} {row}", "s": source, "n": row} for row, source in enumerate(sources)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"data.root={tmp_path}", f"index.path={tmp_path / 'i.h5'}", "index.block_rows=4", "mixture.unit=samples"]
    words += ["data.properties.s=s", "data.properties.n={path:n,kind:number}", "mixture.group_by=[s]"]
    config = compose([*words, "dataplane.global_batch_size=1"])
    build_index(config)
    drop = SampleSubset(drop=("s == 'b' and n == 5",))
    source = open_source(config, Local(), subset=drop)
    # Blocks: a 4 and 2 rows, b 4 and 2, mixed 4 and 4.
    assert source.layout.only_domains().tolist() == [0, 0, 1, -1, -1, -1]

    read = source.samples.make_block_reader()
    sizes_of: dict[int, bool] = {}

    def counted(blocks: NDArray[np.int32], /, *, only_sizes: bool = False) -> SampleColumns:
        sizes_of.update(dict.fromkeys(blocks.tolist(), only_sizes))
        return read(blocks, only_sizes=only_sizes)

    samples = BlockSamples(source.layout, counted, source.samples.domain_of, source.samples.is_not_dropped, 1 << 20)
    block, domain, row = samples.samples_of(np.arange(6, dtype=np.int32))
    assert sizes_of == {0: True, 1: True, 2: True, 3: False, 4: False, 5: False}
    served = set(zip(block.tolist(), domain.tolist(), row.tolist(), strict=True))
    whole = {(number, 0, row) for number, rows in ((0, 4), (1, 2)) for row in range(rows)}
    whole |= {(2, 1, row) for row in range(4)} | {(3, 1, 0)}
    mixed = {(number, row % 2, row) for number in (4, 5) for row in range(4)}
    # Row 1 of block 3 and row 1 of block 5 have n = 5.
    assert served == whole | mixed - {(5, 1, 1)}
