"""The published preparation of losses: filled forward, smoothed as scipy does it, thinned."""

import numpy as np
import pytest

from mixtera_hpc.core.mixing.laws.loss_series import LossSeries, smooth
from mixtera_hpc.core.statistics import DomainStatistics


def series_of(losses: np.ndarray, first_fitted: int = 0) -> LossSeries:
    series = LossSeries(num_domains=losses.shape[1], first_fitted=first_fitted)
    for step, row in enumerate(losses):
        tokens = np.where(np.isnan(row), 0, 4)
        statistics = DomainStatistics(
            step=step, loss_sum=row * 4, num_tokens=tokens, num_sequences=tokens, num_nonfinite=tokens * 0
        )
        series = series.observe((step + 1) * 64, statistics)
    return series


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [101, 102, 400])
def test_smoothing_is_the_savitzky_golay_filter(num_steps: int) -> None:
    signal = pytest.importorskip("scipy.signal")
    values = np.random.default_rng(0).standard_normal((num_steps, 3)).cumsum(axis=0)
    assert smooth(values) == pytest.approx(signal.savgol_filter(values, 101, 3, axis=0), abs=1e-10)


def test_a_short_series_is_smoothed_with_the_window_that_fits() -> None:
    signal = pytest.importorskip("scipy.signal")
    values = np.random.default_rng(0).standard_normal((40, 2))
    assert smooth(values) == pytest.approx(signal.savgol_filter(values, 39, 3, axis=0), abs=1e-10)
    assert smooth(values[:4]).tolist() == values[:4].tolist()


def test_every_tenth_step_from_the_first_fitted_one_is_kept() -> None:
    losses = np.full((60, 1), 2.0)
    points = series_of(losses, first_fitted=25).points()
    assert np.exp(points.log_n).round().astype(int).tolist() == [26 * 64, 36 * 64, 46 * 64, 56 * 64]
    assert np.exp(points.log_loss) == pytest.approx(np.full((1, 4), 2.0))


def test_gaps_are_filled_forward_from_the_first_observation_on() -> None:
    losses = np.full((121, 2), 3.0)
    losses[:55, 1] = np.nan
    losses[55:, 1] = 5.0
    losses[60:90, 1] = np.nan
    points = series_of(losses).points()
    assert (points.weight[1] > 0).tolist() == [False] * 6 + [True] * 7
    assert np.exp(points.log_loss[1, 6:]) == pytest.approx(np.full(7, 5.0))


def test_a_domain_without_losses_has_no_points() -> None:
    losses = np.full((30, 2), 3.0)
    losses[:, 1] = np.nan
    assert series_of(losses).points().weight[1].tolist() == [0.0] * 3
