"""Bins along log n keep exact sums, also after they merge."""

import numpy as np

from mixtera_hpc.core.mixing.laws.loss_history import MAX_BINS, LossHistory
from mixtera_hpc.core.statistics import DomainStatistics


def one_step(loss_sum: list[float], num_tokens: list[int]) -> DomainStatistics:
    tokens = np.array(num_tokens, np.int64)
    return DomainStatistics(
        step=0,
        loss_sum=np.array(loss_sum),
        num_tokens=tokens,
        num_sequences=np.ones_like(tokens),
        num_nonfinite=np.zeros_like(tokens),
    )


def test_means_are_weighted_by_tokens() -> None:
    history = LossHistory(num_domains=1)
    history = history.observe(10**9, one_step([10.0], [10])).observe(10**9 + 1, one_step([90.0], [30]))
    points = history.points()
    assert len(history.bins) == 1
    assert points.log_loss.tolist() == [[np.log(2.5)]]
    assert np.exp(points.log_n[0]) - 1e9 < 1


def test_a_domain_without_tokens_has_no_point_and_no_zero() -> None:
    history = LossHistory(num_domains=2).observe(64, one_step([7.0, 0.0], [7, 0]))
    history = history.observe(128, one_step([14.0, np.nan], [7, 5])).observe(256, one_step([7.0, 15.0], [7, 5]))
    points = history.points()
    assert (points.weight[1] > 0).tolist() == [False, False, True]
    assert points.log_loss[1, 2] == np.log(3.0)
    assert points.weight.sum(axis=1).tolist() == [1.0, 1.0]


def test_merged_bins_have_the_same_sums_and_equal_widths() -> None:
    history = LossHistory(num_domains=2)
    steps = np.unique(np.geomspace(100, 10**9, 3000).astype(np.int64))
    for n in steps:
        history = history.observe(int(n), one_step([float(n), 1.0], [3, 1]))
    arrays = history.arrays()
    assert MAX_BINS // 4 < len(history.bins) <= MAX_BINS
    assert history.bins_per_octave == 8
    assert arrays["history_loss_sum"].sum(axis=0).tolist() == [float(steps.sum()), float(len(steps))]
    assert arrays["history_num_tokens"].sum(axis=0).tolist() == [3 * len(steps), len(steps)]
    assert arrays["history_num_steps"].sum() == len(steps)
    assert arrays["history_key"].tolist() == sorted(set(np.floor(np.log2(steps) * 8).astype(int).tolist()))


def test_observing_does_not_change_older_histories() -> None:
    first = LossHistory(num_domains=1).observe(1000, one_step([1.0], [1]))
    before = {name: values.tobytes() for name, values in first.arrays().items()}
    first.observe(1001, one_step([5.0], [2]))
    assert before == {name: values.tobytes() for name, values in first.arrays().items()}
