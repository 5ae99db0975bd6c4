"""Reading sample columns: only the requested ones, adjacent blocks in one read, with a count of the bytes."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.config.compose import compose
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.read.column_cache import ENTRY_BYTES, ColumnCache
from mixtera_hpc.index.read.open import PropertyIndex, open_index
from mixtera_hpc.index.read.sample_reader import SampleReader


@pytest.fixture
def index(tmp_path: Path) -> PropertyIndex:
    """Return an index of 1,000 samples in blocks of 64: 15 full blocks and a short one."""
    rows = [{"text": "a" * (i % 7), "s": str(i % 3), "n": i, "m": -i} for i in range(1000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    numbers = [f"data.properties.{name}={{path:{name},kind:number}}" for name in "nm"]
    words = [f"data.root={tmp_path}", f"index.path={tmp_path / 'i.h5'}", "mixture.unit=samples", "index.block_rows=64"]
    build_index(compose([*words, *numbers, "data.properties.s=s"]))
    return open_index(tmp_path / "i.h5")


@pytest.mark.parametrize("blocks", [[0], [3, 4, 5], [9, 2, 3, 15, 0], [15, 14], list(range(16))])
def test_blocks_are_returned_in_the_requested_order(index: PropertyIndex, blocks: list[int]) -> None:
    columns = index.read_blocks(np.array(blocks, np.int32))
    single = [index.read_block(block) for block in blocks]
    assert np.array_equal(columns.numbers["n"], np.concatenate([part.numbers["n"] for part in single]))
    assert np.array_equal(columns.length, np.concatenate([part.length for part in single]))


def test_a_column_that_is_not_requested_is_not_read(index: PropertyIndex) -> None:
    columns = index.read_blocks(np.arange(2, dtype=np.int32), {"combo", "numbers/n"})
    assert columns.numbers["n"].tolist() == list(range(128)) and columns.combo.tolist() == [i % 3 for i in range(128)]
    assert not columns.numbers["m"].any() and not columns.length.any()
    assert index.samples.bytes_read == 128 * (1 + 8)


def test_no_blocks_give_no_samples(index: PropertyIndex) -> None:
    columns = index.read_blocks(np.zeros(0, np.int32))
    assert len(columns.combo) == len(columns.numbers["n"]) == 0


def test_cached_blocks_are_equal_and_not_read_again(index: PropertyIndex) -> None:
    bounds = index.tables.blocks.first_sample
    rows = index.tables.blocks.rows
    reader = SampleReader(index.path, cache_bytes=1 << 20)
    for blocks in ([9, 2, 3, 15, 0], [3, 15, 7]):
        columns = reader.read_many(bounds[blocks].tolist(), rows[blocks].tolist())
        assert np.array_equal(columns.numbers["n"], index.read_blocks(np.array(blocks, np.int32)).numbers["n"])
    once = reader.bytes_read
    reader.read_many(bounds[[7, 15, 2]].tolist(), rows[[7, 15, 2]].tolist())
    assert reader.bytes_read == once == index.samples.bytes_read * (4 * 64 + 40 + 64) // (6 * 64 + 2 * 40)


@pytest.mark.parametrize("max_bytes", [0, 100, 1000, 5000])
def test_the_cache_is_bounded_and_evicts_the_oldest_entry(max_bytes: int) -> None:
    cache = ColumnCache(max_bytes)
    read: list[int] = []
    capacity = max_bytes // (64 + ENTRY_BYTES)

    def values(number: int) -> np.ndarray:
        read.append(number)
        return np.full(64, number, np.uint8)

    for number in range(20):
        assert cache.get(("c", number, 64), partial(values, number))[0] == number
    assert read == list(range(20))
    for number in reversed(range(20 - capacity, 20)):
        cache.get(("c", number, 64), partial(values, number))
    assert read == list(range(20))
    cache.get(("c", 19 - capacity, 64), partial(values, 19 - capacity))
    assert read[-1] == 19 - capacity and len(read) == 21


def test_ranges_with_less_than_a_chunk_between_them_share_a_read(index: PropertyIndex) -> None:
    """The samples between two ranges are read, too, but not returned."""
    reader = SampleReader(index.path)
    columns = reader.read_many([0, 40, 124, 900], [10, 20, 6, 5], {"numbers/n"})
    wanted = [*range(10), *range(40, 60), *range(124, 130), *range(900, 905)]
    assert columns.numbers["n"].tolist() == wanted
    assert reader.bytes_read == (60 + 6 + 5) * 8
