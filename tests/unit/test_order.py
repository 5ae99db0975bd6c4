"""The order of blocks depends on seed and epoch, that of rows also on domain and window, and on nothing else."""

import numpy as np
import pytest

from mixtera_hpc.core.order import EpochOrder, ShuffleOrder
from mixtera_hpc.core.planner import Planner
from mixtera_hpc.core.sequence_grid import SequenceGrid

SIZES = np.arange(1, 41)
RECORDED_BLOCKS = [25, 0, 12, 38, 34, 35]
RECORDED_ROWS = [2, 7, 4, 6, 0, 5, 3, 1]


BYTES = np.full(40, 100)
BLOCKS = np.arange(100, 140)


def order(shuffle: str = "window", seed: int = 0, window_bytes: int = 800) -> ShuffleOrder:
    return ShuffleOrder(seed=seed, shuffle=shuffle, window_bytes=window_bytes)


def epoch_of(shuffle: ShuffleOrder, epoch: int = 0) -> EpochOrder:
    return shuffle.epoch(epoch, BLOCKS, SIZES, BYTES)


def test_the_order_equals_the_recorded_one() -> None:
    """The recorded numbers must never change, because saved runs depend on them."""
    assert epoch_of(order()).block_order[:6].tolist() == RECORDED_BLOCKS
    assert order().rows(3, 2, 1, 8).tolist() == RECORDED_ROWS


def test_every_block_occurs_once_per_epoch() -> None:
    assert sorted(epoch_of(order(), 5).block_order) == list(range(40))


@pytest.mark.parametrize("other", [(1, 0), (0, 1)], ids=["seed", "epoch"])
def test_another_seed_or_epoch_gives_another_order_of_blocks(other: tuple[int, int]) -> None:
    seed, epoch = other
    first = epoch_of(order()).block_order
    assert not np.array_equal(first, epoch_of(order(seed=seed), epoch).block_order)


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["seed", "domain", "epoch"])
def test_another_seed_domain_or_epoch_gives_another_order_of_rows(other: tuple[int, int, int]) -> None:
    seed, domain, epoch = other
    first = order().rows(0, 0, 0, 40)
    assert not np.array_equal(first, order(seed=seed).rows(domain, epoch, 0, 40))


def test_the_rows_of_several_windows_follow_each_other() -> None:
    windows = [(0, 0, 0), (3, 2, 1), (3, 2, 5), (7, 0, 1)]
    sizes = [40, 8, 0, 3]
    together = order().rows_of_windows(windows, sizes)
    starts = np.cumsum(sizes) - sizes
    own = [order().rows(*window, size) + start for window, size, start in zip(windows, sizes, starts, strict=True)]
    assert together.tolist() == np.concatenate(own).tolist()


def test_domains_pass_through_the_blocks_that_they_share_in_one_order() -> None:
    chosen = np.flatnonzero(np.arange(40) % 3)
    of_all = BLOCKS[epoch_of(order()).block_order]
    of_some = BLOCKS[chosen][order().epoch(0, BLOCKS[chosen], SIZES[chosen], BYTES[chosen]).block_order]
    assert of_some.tolist() == [block for block in of_all.tolist() if block in BLOCKS[chosen]]


def test_the_order_of_blocks_is_random() -> None:
    """Neighbours in the index are as far apart as in a random permutation, and every block moves."""
    blocks = np.arange(20_000)
    ones = np.ones(20_000, np.int64)
    places = np.argsort(order().epoch(3, blocks, ones, ones).block_order)
    assert np.abs(np.diff(places)).mean() == pytest.approx(20_000 / 3, rel=0.03)
    assert np.corrcoef(blocks, places)[0, 1] == pytest.approx(0, abs=0.03)
    assert np.mean(places == blocks) < 0.001


def test_windows_cover_the_epoch_without_gaps() -> None:
    epoch = epoch_of(order())
    assert epoch.starts[0] == 0
    assert epoch.starts[-1] == SIZES.sum()
    for window in range(len(epoch.starts) - 1):
        assert SIZES[epoch.blocks_of(window)].sum() == epoch.starts[window + 1] - epoch.starts[window]


def test_an_item_is_found_in_its_window() -> None:
    epoch = epoch_of(order())
    for window, (first, end) in enumerate(zip(epoch.starts[:-1], epoch.starts[1:], strict=True)):
        assert epoch.window_at(int(first)) == window
        assert epoch.window_at(int(end) - 1) == window


def test_shuffle_none_keeps_the_order_of_blocks_and_rows() -> None:
    plain = order("none")
    assert epoch_of(plain, 3).block_order.tolist() == list(range(40))
    assert plain.rows(0, 3, 0, 5).tolist() == [0, 1, 2, 3, 4]


def test_shuffle_block_permutes_blocks_and_keeps_the_order_of_rows() -> None:
    blocks = order("block")
    assert epoch_of(blocks).block_order.tolist() != list(range(40))
    assert blocks.rows(0, 0, 0, 5).tolist() == [0, 1, 2, 3, 4]


def test_a_domain_without_blocks_has_an_empty_epoch() -> None:
    assert order().epoch(0, *[np.zeros(0, np.int64)] * 3).starts.tolist() == [0]


def test_overlapping_sequences_share_one_token() -> None:
    grid = SequenceGrid.of_tokens(seq_len=10, overlap=True)
    assert grid.span(0, 1) == (0, 11)
    assert grid.span(1, 1) == (10, 21)
    assert grid.span(0, 2) == (0, 21)


def test_capacity_counts_only_whole_sequences() -> None:
    items = np.array([0, 10, 11, 20, 21])
    assert SequenceGrid.of_tokens(10, overlap=True).capacity(items, np.full(5, 1.0)).tolist() == [0, 0, 1, 1, 2]
    assert SequenceGrid.of_tokens(10, overlap=False).capacity(items, np.full(5, 2.0)).tolist() == [0, 1, 2, 3, 3]
    assert SequenceGrid.of_samples().capacity(items, np.full(5, 0.5)).tolist() == [0, 5, 5, 10, 10]
    assert SequenceGrid.of_samples().capacity(items, np.full(5, np.inf)).tolist() == [0, *[Planner.UNLIMITED] * 4]
    for grid in (SequenceGrid.of_samples(), SequenceGrid.of_tokens(10, overlap=True)):
        assert (grid.capacity(items, np.full(5, 1e300))[1:] > 1 << 57).all(), "no overflow"
