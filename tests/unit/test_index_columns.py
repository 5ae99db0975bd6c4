"""Reading sample columns: only those asked for, neighbours in one go, and what was read is counted."""

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
    """1,000 samples in blocks of 64: 15 full ones and a short one."""
    rows = [{"text": "a" * (i % 7), "s": str(i % 3), "n": i, "m": -i} for i in range(1000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    numbers = [f"data.properties.{name}={{path:{name},kind:number}}" for name in "nm"]
    words = [f"data.root={tmp_path}", f"index.path={tmp_path / 'i.h5'}", "mixture.unit=samples", "index.block_rows=64"]
    build_index(compose([*words, *numbers, "data.properties.s=s"]))
    return open_index(tmp_path / "i.h5")


@pytest.mark.parametrize("blocks", [[0], [3, 4, 5], [9, 2, 3, 15, 0], [15, 14], list(range(16))])
def test_blocks_come_in_the_order_asked_for(index: PropertyIndex, blocks: list[int]) -> None:
    found = index.read_blocks(np.array(blocks, np.int32))
    parts = [index.read_block(block) for block in blocks]
    assert np.array_equal(found.numbers["n"], np.concatenate([part.numbers["n"] for part in parts]))
    assert np.array_equal(found.length, np.concatenate([part.length for part in parts]))


def test_a_column_that_is_not_asked_for_is_not_read(index: PropertyIndex) -> None:
    found = index.read_blocks(np.arange(2, dtype=np.int32), {"combo", "numbers/n"})
    assert found.numbers["n"].tolist() == list(range(128)) and found.combo.tolist() == [i % 3 for i in range(128)]
    assert not found.numbers["m"].any() and not found.length.any()
    assert index.samples.bytes_read == 128 * (1 + 8)


def test_no_blocks_are_no_samples(index: PropertyIndex) -> None:
    found = index.read_blocks(np.zeros(0, np.int32))
    assert len(found.combo) == len(found.numbers["n"]) == 0


def test_blocks_that_are_kept_are_the_same_and_not_read_again(index: PropertyIndex) -> None:
    bounds, rows = index.tables.blocks.first_sample, index.tables.blocks.rows
    reader = SampleReader(index.path, cache_bytes=1 << 20)
    for blocks in ([9, 2, 3, 15, 0], [3, 15, 7]):
        found = reader.read_many(bounds[blocks].tolist(), rows[blocks].tolist())
        assert np.array_equal(found.numbers["n"], index.read_blocks(np.array(blocks, np.int32)).numbers["n"])
    once = reader.bytes_read
    reader.read_many(bounds[[7, 15, 2]].tolist(), rows[[7, 15, 2]].tolist())
    assert reader.bytes_read == once == index.samples.bytes_read * (4 * 64 + 40 + 64) // (6 * 64 + 2 * 40)


@pytest.mark.parametrize("max_bytes", [0, 100, 1000, 5000])
def test_no_more_is_kept_than_allowed_and_the_oldest_leaves_first(max_bytes: int) -> None:
    kept, read = ColumnCache(max_bytes), []
    room = max_bytes // (64 + ENTRY_BYTES)

    def part(number: int) -> np.ndarray:
        read.append(number)
        return np.full(64, number, np.uint8)

    for number in range(20):
        assert kept.get(("c", number, 64), partial(part, number))[0] == number
    assert read == list(range(20))
    for number in reversed(range(20 - room, 20)):
        kept.get(("c", number, 64), partial(part, number))
    assert read == list(range(20))
    kept.get(("c", 19 - room, 64), partial(part, 19 - room))
    assert read[-1] == 19 - room and len(read) == 21
