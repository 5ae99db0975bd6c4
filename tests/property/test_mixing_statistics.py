"""Sums over ranks are exact: any partition of the sequences over ranks, in any order, gives the same bits."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtera_hpc.core.statistics import NUM_BUFFER_ROWS, accumulate_losses, statistics_from_buffer

NUM_DOMAINS = 4
losses = st.floats(0, 2.0**17) | st.sampled_from([np.nan, np.inf, 1e300])
sequences = st.lists(st.tuples(st.integers(0, NUM_DOMAINS - 1), losses, st.integers(0, 2**20)), max_size=40)


def rank_buffer(rows: list[tuple[int, float, int]]) -> np.ndarray:
    """Return the buffer of a rank that has these (domain, loss, tokens)."""
    domains, sums, tokens = (np.array(column) for column in zip(*rows, strict=True)) if rows else (np.zeros(0),) * 3
    return accumulate_losses(domains.astype(np.int64), sums, tokens.astype(np.int64), NUM_DOMAINS)


@settings(deadline=None)
@given(sequences, st.data())
def test_any_partition_in_any_order_gives_the_same_bits(
    rows: list[tuple[int, float, int]], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(rows))
    rank_of = data.draw(st.lists(st.integers(0, 7), min_size=len(rows), max_size=len(rows)))
    total = np.zeros((NUM_BUFFER_ROWS, NUM_DOMAINS), np.int64)
    for rank in data.draw(st.permutations(range(8))):
        total += rank_buffer([row for row, owner in zip(shuffled, rank_of, strict=True) if owner == rank])
    assert np.array_equal(total, rank_buffer(rows))
    expected = statistics_from_buffer(0, rank_buffer(rows))
    statistics = statistics_from_buffer(0, total)
    assert expected.loss_sum.tobytes() == statistics.loss_sum.tobytes()


@settings(deadline=None)
@given(sequences)
def test_every_sequence_is_counted_once(rows: list[tuple[int, float, int]]) -> None:
    statistics = statistics_from_buffer(0, rank_buffer(rows))
    usable = [row for row in rows if np.isfinite(row[1]) and row[1] < 1e300]
    assert statistics.num_sequences.sum() == len(rows)
    assert statistics.num_nonfinite.sum() == len(rows) - len(usable)
    assert statistics.num_tokens.sum() == sum(tokens for _, _, tokens in usable)
    exact = sum(loss for _, loss, _ in usable)
    assert abs(statistics.loss_sum.sum() - exact) <= len(rows) * 2.0**-25 + 1e-12 * exact
