"""Losses per domain: rounded once, summed exactly, and excluded if they are not finite."""

import numpy as np
import pytest

from mixtera_hpc.core.measures.scalars import ROWS_PER_SCALAR
from mixtera_hpc.core.statistics import (
    MAX_SEQUENCE_LOSS,
    NUM_BUFFER_ROWS,
    DomainStatistics,
    ZeroStatistics,
    accumulate_losses,
    dequantise_losses,
    quantise_losses,
    statistics_from_buffer,
)


def statistics_of(domain_ids: list[int], losses: list[float], tokens: list[int], num_domains: int) -> DomainStatistics:
    return statistics_from_buffer(
        7, accumulate_losses(np.array(domain_ids), np.array(losses), np.array(tokens), num_domains)
    )


def test_losses_tokens_and_sequences_are_summed_per_domain() -> None:
    statistics = statistics_of([2, 0, 2], [3.5, 1.25, 0.5], [10, 4, 6], 3)
    assert statistics.step == 7
    assert statistics.loss_sum.tolist() == [1.25, 0.0, 4.0]
    assert statistics.num_tokens.tolist() == [4, 0, 16]
    assert statistics.num_sequences.tolist() == [1, 0, 2]
    assert statistics.num_nonfinite.tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300, 2 * MAX_SEQUENCE_LOSS])
def test_a_sequence_with_a_non_finite_loss_is_excluded_and_counted(bad: float) -> None:
    statistics = statistics_of([1, 1], [bad, 2.0], [10, 4], 2)
    assert statistics.loss_sum.tolist() == [0.0, 2.0]
    assert statistics.num_tokens.tolist() == [0, 4]
    assert statistics.num_sequences.tolist() == [0, 2]
    assert statistics.num_nonfinite.tolist() == [0, 1]


def test_the_mean_is_weighted_by_tokens_and_nan_without_observations() -> None:
    statistics = statistics_of([0, 0, 2], [8.0, 1.0, np.nan], [8, 2, 5], 3)
    assert np.array_equal(statistics.loss_mean, [0.9, np.nan, np.nan], equal_nan=True)
    assert statistics.observed.tolist() == [True, False, False]


def test_the_rounding_error_is_at_most_half_a_unit() -> None:
    losses = np.random.default_rng(0).uniform(0, 2**17, 1000)
    assert np.abs(dequantise_losses(quantise_losses(losses)) - losses).max() <= 0.5 * 2.0**-24


def test_quantising_saturates_instead_of_wrapping_around() -> None:
    assert dequantise_losses(quantise_losses(np.array([1e30, -1e30]))).tolist() == [
        MAX_SEQUENCE_LOSS,
        -MAX_SEQUENCE_LOSS,
    ]


def test_the_documented_number_of_largest_losses_does_not_overflow() -> None:
    most = 2**15 - 1
    statistics = statistics_from_buffer(
        0, accumulate_losses(np.zeros(most, np.int64), np.full(most, MAX_SEQUENCE_LOSS), np.ones(most), 1)
    )
    assert statistics.loss_sum[0] == most * MAX_SEQUENCE_LOSS


def test_sums_keep_bits_that_float64_would_lose() -> None:
    losses = np.array([*[MAX_SEQUENCE_LOSS] * 64, 2.0**-24])
    buffer = accumulate_losses(np.zeros(65, np.int64), losses, np.ones(65, np.int64), 1)
    assert buffer[0, 0].item() == 2**54 + 1


def test_token_counts_can_exceed_int32() -> None:
    buffer = accumulate_losses(
        np.array([0, 0], np.int32), np.array([1.0, 1.0]), np.array([2**31 - 1, 2**31 - 1], np.int32), 1
    )
    assert statistics_from_buffer(0, buffer + buffer).num_tokens[0] == 4 * (2**31 - 1)


def test_the_buffer_of_no_sequences_is_zero() -> None:
    assert not accumulate_losses(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64), 4).any()


@pytest.mark.parametrize("domain", [-1, 2])
def test_a_domain_id_out_of_range_is_refused(domain: int) -> None:
    with pytest.raises(ValueError, match="expected 0 to 1"):
        accumulate_losses(np.array([domain]), np.ones(1), np.ones(1, np.int64), 2)


@pytest.mark.parametrize("scales", [{}, {"gradient_norm": 1.0, "reward": 4.0}])
def test_statistics_without_losses_are_those_of_a_buffer_of_zeros(scales: dict[str, float]) -> None:
    zeros = np.zeros((NUM_BUFFER_ROWS + ROWS_PER_SCALAR * len(scales), 5), np.int64)
    reduced = statistics_from_buffer(3, zeros, scales)
    none = ZeroStatistics(5, scales).of_step(3)
    assert repr(none) == repr(reduced)
    for name in ("loss_sum", "num_tokens", "num_sequences", "num_nonfinite"):
        assert getattr(none, name).dtype == getattr(reduced, name).dtype, name
        # Other steps share it.
        with pytest.raises(ValueError, match="read-only"):
            getattr(none, name)[0] = 1
    assert not any(scalar.total.flags.writeable or scalar.count.flags.writeable for scalar in none.scalars.values())
