"""Exponentiated gradient as in DoReMi and Sheared-LLaMA, compared with the written-out formulas."""

from typing import Any

import numpy as np
import pytest

from mixtera_hpc.core.mixing.exponentiated_gradient import ExponentiatedGradient
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.testing.mixing import run_algorithm

PRIOR = np.array([0.5, 0.3, 0.2])
ZERO = (0.0, 0.0, 0.0)


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


def test_sheared_llama_has_the_same_score_less_smoothing_and_held_out_losses() -> None:
    algorithm = gradient(variant="sheared-llama", reference_losses=(2.0, 2.0, 2.0))
    _, weights = algorithm.update(algorithm.start(PRIOR), statistics([2.5, 1.0, 2.0]))
    raised = PRIOR * np.exp([0.5, 0.0, 0.0])
    assert weights == pytest.approx(0.9999 * raised / raised.sum() + 0.0001 / 3)
    assert (algorithm.statistics, gradient(reference_losses=(2.0,)).statistics) == ("heldout", "train")


@pytest.mark.parametrize("variant", ["doremi", "sheared-llama"])
def test_a_mixture_turns_round_as_fast_after_any_number_of_steps(variant: str) -> None:
    for num_steps in (100, 1_000, 5_000):
        algorithm = ExponentiatedGradient(
            ExponentiatedGradient.Config(variant=variant, reference_losses=(2.0, 2.0))  # type: ignore[arg-type]
        )
        state = algorithm.start(np.array([0.5, 0.5]))
        for _ in range(num_steps):
            state, _ = algorithm.update(state, behind(0, 0.3))
        for turned in range(1, 21):  # noqa: B007
            state, weights = algorithm.update(state, behind(1, 0.5))
            if weights[1] > 0.5:
                break
        assert weights[1] > 0.5, f"domain 1 has {weights[1]} of the mixture 20 steps after {num_steps} steps"


def behind(domain: int, nats: float) -> DomainStatistics:
    loss = np.full(2, 2.0)
    loss[domain] += nats
    return DomainStatistics(
        step=0,
        loss_sum=loss * 10,
        num_tokens=np.full(2, 10),
        num_sequences=np.ones(2, np.int64),
        num_nonfinite=np.zeros(2, np.int64),
    )


def test_without_references_it_is_refused_with_the_ways_to_get_them() -> None:
    with pytest.raises(ConfigError, match=r"noisiest(.|\n)*from_run=RUN(.|\n)*reference_losses=FILE\.json"):
        gradient().start(PRIOR)


def test_the_average_is_the_mean_of_all_weights_so_far() -> None:
    algorithm = gradient(eta=0.1, reference_losses=ZERO)
    served = []
    state = algorithm.start(PRIOR)
    for loss in ([1.0, 2.0, 3.0], [2.0, 2.0, 1.0], [1.0, 0.5, 3.0]):
        state, weights = algorithm.update(state, statistics(loss))
        served.append(weights)
    assert algorithm.describe(state)["average_weight"] == pytest.approx(np.mean(served, axis=0))


def test_a_domain_without_sequences_keeps_its_last_score() -> None:
    algorithm = gradient(reference_losses=ZERO)
    first, _ = algorithm.update(algorithm.start(PRIOR), statistics([1.0, 2.0, 3.0]))
    state = run_algorithm(algorithm, first, [statistics([0.5, 0.5, 0.0], (5, 5, 0))] * 3)
    assert state.score.tolist() == [0.5, 0.5, 3.0]
    assert state.weights[2] > first.weights[2], "a starved domain with a high loss recovers"


def test_a_long_run_does_not_overflow() -> None:
    algorithm = gradient(eta=1000.0, reference_losses=ZERO)
    state = run_algorithm(algorithm, algorithm.start(PRIOR), [statistics([9.0, 8.0, 7.0])] * 200)
    assert np.isfinite(state.weights).all()


def test_references_for_another_number_of_domains_are_refused() -> None:
    with pytest.raises(ConfigError, match="reference_losses has 2 numbers, but the mixture has 3 domains"):
        gradient(reference_losses=(1.0, 2.0)).start(PRIOR)
