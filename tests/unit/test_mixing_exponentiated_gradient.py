"""Exponentiated gradient as in DoReMi and Sheared-LLaMA, compared with the written-out formulas."""

from typing import Any

import numpy as np
import pytest

from mixtera_hpc.core.mixing.exponentiated_gradient import ExponentiatedGradient
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.testing.mixing import run_algorithm

PRIOR = np.array([0.5, 0.3, 0.2])


def statistics(loss: list[float], num_tokens: tuple[int, int, int] = (5, 5, 5)) -> DomainStatistics:
    tokens = np.array(num_tokens)
    return DomainStatistics(
        step=0, loss_sum=np.array(loss) * tokens, num_tokens=tokens, num_sequences=tokens, num_nonfinite=tokens * 0
    )


def gradient(**parameters: Any) -> ExponentiatedGradient:
    return ExponentiatedGradient(ExponentiatedGradient.Config(delta_min=0.0, **parameters))


def test_doremi_multiplies_by_the_positive_excess_and_smooths() -> None:
    algorithm = gradient(reference_losses=(2.0, 2.0, 2.0))
    _, weights = algorithm.update(algorithm.start(PRIOR), statistics([2.5, 1.0, 2.0]))
    raised = PRIOR * np.exp([0.5, 0.0, 0.0])
    assert weights == pytest.approx(0.999 * raised / raised.sum() + 0.001 / 3)


def test_sheared_llama_takes_weight_from_domains_below_the_reference() -> None:
    algorithm = gradient(variant="sheared-llama", reference_losses=(2.0, 2.0, 2.0))
    _, weights = algorithm.update(algorithm.start(PRIOR), statistics([2.5, 1.0, 2.0]))
    raised = PRIOR * np.exp([0.5, -1.0, 0.0])
    assert weights == pytest.approx(raised / raised.sum())


def test_the_average_is_the_mean_of_all_weights_so_far() -> None:
    algorithm = gradient(eta=0.1)
    served = []
    state = algorithm.start(PRIOR)
    for loss in ([1.0, 2.0, 3.0], [2.0, 2.0, 1.0], [1.0, 0.5, 3.0]):
        state, weights = algorithm.update(state, statistics(loss))
        served.append(weights)
    assert algorithm.describe(state)["average_weight"] == pytest.approx(np.mean(served, axis=0))


def test_a_domain_without_sequences_keeps_its_unnormalised_weight() -> None:
    algorithm = gradient()
    state = run_algorithm(algorithm, algorithm.start(PRIOR), [statistics([1.0, 2.0, 0.0], (5, 5, 0))] * 3)
    assert state.log_weight[2] == np.log(0.2)
    assert state.log_weight[0] == pytest.approx(np.log(0.5) + 3.0)


def test_a_long_run_does_not_overflow() -> None:
    algorithm = gradient(eta=1000.0)
    state = run_algorithm(algorithm, algorithm.start(PRIOR), [statistics([9.0, 8.0, 7.0])] * 200)
    assert np.isfinite(state.weights).all()


def test_references_for_another_number_of_domains_are_refused() -> None:
    with pytest.raises(ConfigError, match="reference_losses has 2 numbers, but the mixture has 3 domains"):
        gradient(reference_losses=(1.0, 2.0)).start(PRIOR)
