"""Many epochs of a small domain at once: the same words and the same order as one epoch after the other."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixtera_hpc.core.order import Shuffle, ShuffleOrder
from mixtera_hpc.core.repeats.epoch_rows import epoch_rows, is_one_window
from mixtera_hpc.core.repeats.philox import philox_words

WORD = st.integers(0, 2**63 - 1)


@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.tuples(WORD, WORD), st.lists(st.tuples(WORD, WORD, WORD), min_size=1, max_size=4), st.integers(1, 11))
def test_words_are_those_of_numpy(key: tuple[int, int], counters: list[tuple[int, int, int]], count: int) -> None:
    streams = np.array([[0, *counter] for counter in counters], np.uint64)
    expected = [np.random.Philox(key=np.array(key, np.uint64), counter=c).random_raw(count) for c in streams]
    assert (philox_words(key, streams, count) == np.array(expected)).all()


@pytest.mark.parametrize("shuffle", ["none", "block", "window", "sequence"])
@pytest.mark.parametrize("rows", [[1], [2], [3, 1, 4], [1, 1, 1, 1, 1]])
def test_rows_have_the_order_of_every_epoch(shuffle: Shuffle, rows: list[int]) -> None:
    order = ShuffleOrder(seed=5, shuffle=shuffle, window_bytes=100)
    sizes = np.array(rows)
    blocks = np.arange(70, 70 + 2 * len(rows), 2, np.int32)
    block_bytes = 20 * np.ones(len(rows), np.int64)
    assert is_one_window(order, block_bytes)
    epochs = np.array([0, 1, 2, 1000, 2**40])
    block_of_sample = np.repeat(np.arange(len(rows)), sizes)
    first = np.cumsum(sizes) - sizes
    for epoch, own in zip(epochs.tolist(), epoch_rows(order, 3, epochs, block_of_sample, blocks), strict=True):
        expected: list[int] = []
        of_epoch = order.epoch(epoch, blocks, sizes, block_bytes)
        for window in range(len(of_epoch.starts) - 1):
            samples = np.concatenate([first[b] + np.arange(rows[b]) for b in of_epoch.blocks_of(window)])
            expected += samples[order.rows(3, epoch, window, len(samples))].tolist()
        assert own.tolist() == expected
