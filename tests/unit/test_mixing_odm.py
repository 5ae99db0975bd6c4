"""Online data mixing, compared with the written-out formulas."""

from dataclasses import replace

import numpy as np
import pytest

from mixtera_hpc.core.mixing.odm import OnlineDataMixing
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.testing.mixing import run_algorithm


def statistics(loss: list[float], num_tokens: list[int]) -> DomainStatistics:
    tokens = np.array(num_tokens)
    return DomainStatistics(
        step=0, loss_sum=np.array(loss) * tokens, num_tokens=tokens, num_sequences=tokens, num_nonfinite=tokens * 0
    )


def odm(**parameters: float) -> OnlineDataMixing:
    return OnlineDataMixing(OnlineDataMixing.Config(**parameters))


def test_the_second_step_follows_the_formulas() -> None:
    algorithm = odm(delta_min=0.0)
    uniform = np.full(3, 1 / 3)
    state, weights = algorithm.update(algorithm.start(uniform), statistics([3.0, 2.0, 1.0], [5, 5, 5]))
    assert weights == pytest.approx(uniform)
    assert state.reward == pytest.approx([0.9, 0.6, 0.3])
    for _ in range(3):
        previous, weights = weights, state.weights
        expected_reward = 0.9 * state.reward + 0.1 * np.array([3.0, 2.0, 1.0]) / previous
        before, now = (min(1 / 3, np.sqrt(np.log(3) / (3 * t))) for t in (state.step, state.step + 1))
        sharp = np.exp(before * expected_reward)
        state, weights = algorithm.update(state, statistics([3.0, 2.0, 1.0], [5, 5, 5]))
        assert state.reward == pytest.approx(expected_reward)
        assert weights == pytest.approx((1 - 3 * now) * sharp / sharp.sum() + now)


def test_the_reward_is_divided_by_the_weights_in_force() -> None:
    """Those that the step was served with, not those that were decided since."""
    algorithm = odm(delta_min=0.0)
    step = replace(statistics([3.0, 3.0], [5, 5]), weights=np.array([0.9, 0.1]))
    state, _ = algorithm.update(algorithm.start(np.full(2, 0.5)), step)
    assert state.reward == pytest.approx([0.1 * 3 / 0.9, 0.1 * 3 / 0.5]), "bounded by the exploration of 1/2"
    later, _ = algorithm.update(replace(state, step=100_000), step)
    assert later.reward[1] == pytest.approx(0.9 * state.reward[1] + 0.1 * 3 / 0.1)


def test_the_released_form_takes_exponentials_and_does_not_divide() -> None:
    algorithm = OnlineDataMixing(OnlineDataMixing.Config(variant="released", delta_min=0.0))
    state = replace(algorithm.start(np.array([0.9, 0.1])), step=100)
    state, weights = algorithm.update(state, statistics([1.0, 2.0], [5, 5]))
    assert state.reward == pytest.approx(0.1 * np.exp([1.0, 2.0]))
    exploration = np.sqrt(np.log(2) / (2 * 101))
    assert weights == pytest.approx((1 - 2 * exploration) * state.reward / state.reward.sum() + exploration)


def test_the_domain_with_the_highest_loss_is_served_most() -> None:
    algorithm = odm()
    state = run_algorithm(algorithm, algorithm.start(np.full(3, 1 / 3)), [statistics([1.0, 4.0, 2.0], [5, 5, 5])] * 50)
    assert state.weights[1] > state.weights[2] > state.weights[0]


def test_a_domain_without_sequences_keeps_its_reward() -> None:
    algorithm = odm()
    state, _ = algorithm.update(algorithm.start(np.full(2, 0.5)), statistics([3.0, 2.0], [5, 5]))
    later, _ = algorithm.update(state, statistics([0.0, 2.0], [0, 5]))
    assert later.reward[0] == state.reward[0]
    assert later.reward[1] != state.reward[1]


def test_large_rewards_do_not_overflow() -> None:
    algorithm = odm(decay=0.0)
    state = run_algorithm(
        algorithm, algorithm.start(np.array([1 - 1e-12, 1e-12])), [statistics([1e6, 1e6], [5, 5])] * 5
    )
    assert np.isfinite(state.reward).all()
