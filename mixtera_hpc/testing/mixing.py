"""Conformance suite for mixing algorithms: checks that raise AssertionError.

Configure the algorithm so that its weights change within `NUM_STEPS` steps, and every interval it has is at most
`NUM_STEPS // 4`. Then run all checks:

    for check in CHECKS:
        check(make_algorithm("ado", {"warmup": 40, "refit_interval": 15}))

An algorithm with a parameter per domain is given as a function of the number of domains.
"""

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.algorithm import MixingAlgorithm
from mixtera_hpc.core.statistics import DomainStatistics

__all__ = [
    "CHECKS",
    "NUM_STEPS",
    "AlgorithmOrFactory",
    "check_a_domain_may_never_appear",
    "check_a_step_may_have_no_sequences",
    "check_absent_domain_keeps_learned_values",
    "check_description_is_per_domain",
    "check_many_domains",
    "check_nonfinite_losses_are_counted",
    "check_one_domain",
    "check_resume_equals_no_resume",
    "check_starts_with_the_prior",
    "check_state_is_immutable",
    "check_weights_are_valid",
    "check_weights_move",
    "round_trip_npz",
    "run_algorithm",
    "synthetic_statistics",
    "without_domains",
]

AlgorithmOrFactory = MixingAlgorithm[Any] | Callable[[int], MixingAlgorithm[Any]]
"""An algorithm, or a function that returns one for a number of domains."""

NUM_STEPS = 60
"""Number of steps that most checks run an algorithm for."""
SEQ_LEN = 128


def synthetic_statistics(num_domains: int, num_steps: int = NUM_STEPS, seed: int = 0) -> list[DomainStatistics]:
    """Return the statistics of a fabricated run.

    The loss of each domain follows a separate power law, with noise. Every step has sequences of every domain.
    """
    random = np.random.Generator(np.random.Philox(seed))
    epsilon = random.uniform(0.5, 2.5, num_domains)
    beta = random.uniform(3.0, 9.0, num_domains)
    alpha = random.uniform(0.1, 0.5, num_domains)
    batch_size = 64 + num_domains
    uniform = np.full(num_domains, 1 / num_domains)
    steps = []
    for step in range(num_steps):
        # One sequence per domain, the others at random.
        sequences = 1 + random.multinomial(batch_size - num_domains, uniform)
        noise = 0.02 * random.standard_normal(num_domains)
        loss = epsilon + beta * ((step + 1) * batch_size) ** -alpha + noise
        tokens = sequences * SEQ_LEN
        steps.append(
            DomainStatistics(
                step=step,
                loss_sum=loss * tokens,
                num_tokens=tokens,
                num_sequences=sequences,
                num_nonfinite=np.zeros(num_domains, np.int64),
            )
        )
    return steps


def without_domains(statistics: DomainStatistics, domains: Iterable[int]) -> DomainStatistics:
    """Return the same step without the sequences of `domains`."""
    present = ~np.isin(np.arange(len(statistics.loss_sum)), list(domains))
    return replace(
        statistics,
        loss_sum=statistics.loss_sum * present,
        num_tokens=statistics.num_tokens * present,
        num_sequences=statistics.num_sequences * present,
    )


def run_algorithm(algorithm: MixingAlgorithm[Any], state: Any, steps: Iterable[DomainStatistics]) -> Any:
    """Return the state after `steps`; assert after every step that the weights are valid."""
    for statistics in steps:
        state, weights = algorithm.update(state, statistics)
        _assert_valid_weights(weights)
        assert np.array_equal(weights, state.weights), "update() returned weights that differ from state.weights"
    return state


def round_trip_npz(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Write `arrays` as an npz file and read it back, both without pickle."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    file.seek(0)
    with np.load(file, allow_pickle=False) as stored:
        return dict(stored)


def check_starts_with_the_prior(algorithm: AlgorithmOrFactory) -> None:
    """Check that the initial weights are the prior."""
    algorithm = _algorithm_of(algorithm, 5)
    prior = _prior(5)
    state = algorithm.start(prior)
    assert state.step == 0
    assert np.array_equal(state.weights, prior)


def check_weights_are_valid(algorithm: AlgorithmOrFactory) -> None:
    """Check that weights are finite, sum to 1, and are at or above the floor once they differ from the prior."""
    algorithm = _algorithm_of(algorithm, 5)
    prior = _prior(5)
    state = algorithm.start(prior)
    for statistics in synthetic_statistics(5):
        state = run_algorithm(algorithm, state, [statistics])
        if not np.array_equal(state.weights, prior):
            floor = algorithm.floor(5)
            assert state.weights.min() >= floor - 1e-15, f"{state.weights} has a weight below the floor {floor}"


def check_weights_move(algorithm: AlgorithmOrFactory) -> None:
    """Check that the weights change; the other checks would otherwise prove nothing."""
    algorithm = _algorithm_of(algorithm, 5)
    prior = _prior(5)
    state = run_algorithm(algorithm, algorithm.start(prior), synthetic_statistics(5))
    assert np.abs(state.weights - prior).max() > 1e-4, f"after {NUM_STEPS} steps the weights are still {prior}"
    assert state.step == NUM_STEPS


def check_state_is_immutable(algorithm: AlgorithmOrFactory) -> None:
    """Check that `update` changes neither its state nor its statistics, and is deterministic bit for bit."""
    algorithm = _algorithm_of(algorithm, 5)
    steps = synthetic_statistics(5)
    early = run_algorithm(algorithm, algorithm.start(_prior(5)), steps[:45])
    before = _copied(algorithm.state_arrays(early))
    first = algorithm.state_arrays(run_algorithm(algorithm, early, steps[45:]))
    _assert_same(before, algorithm.state_arrays(early))
    _assert_same(first, algorithm.state_arrays(run_algorithm(algorithm, early, synthetic_statistics(5)[45:])))


def check_resume_equals_no_resume(algorithm: AlgorithmOrFactory) -> None:
    """Check that a run that is saved to npz and resumed equals an uninterrupted run, bit for bit."""
    algorithm = _algorithm_of(algorithm, 5)
    steps = synthetic_statistics(5)
    expected = algorithm.state_arrays(run_algorithm(algorithm, algorithm.start(_prior(5)), steps))
    for stop in (0, 1, NUM_STEPS // 2, NUM_STEPS - 1):
        early = run_algorithm(algorithm, algorithm.start(_prior(5)), steps[:stop])
        restored = algorithm.state_from_arrays(round_trip_npz(algorithm.state_arrays(early)))
        _assert_same(expected, algorithm.state_arrays(run_algorithm(algorithm, restored, steps[stop:])))


def check_absent_domain_keeps_learned_values(algorithm: AlgorithmOrFactory) -> None:
    """Check that values learned about a domain do not change while it is absent, but those of other domains do.

    During the first quarter without the domain, the algorithm may still process what it has seen before.
    """
    algorithm = _algorithm_of(algorithm, 5)
    steps = synthetic_statistics(5)
    quarter = NUM_STEPS // 4
    without = [without_domains(s, [0]) for s in steps]
    state = run_algorithm(algorithm, algorithm.start(_prior(5)), steps[: 2 * quarter])
    state = run_algorithm(algorithm, state, without[2 * quarter : 3 * quarter])
    before = algorithm.describe(state)
    after = algorithm.describe(run_algorithm(algorithm, state, without[3 * quarter :]))
    assert any(not np.array_equal(before[name][1:], after[name][1:]) for name in algorithm.learned)
    for name in algorithm.learned:
        assert np.array_equal(before[name][0], after[name][0], equal_nan=True), f"{name} of an absent domain changed"


def check_a_domain_may_never_appear(algorithm: AlgorithmOrFactory) -> None:
    """Check that the algorithm works if a domain has no sequence in the whole run."""
    algorithm = _algorithm_of(algorithm, 5)
    state = run_algorithm(
        algorithm, algorithm.start(_prior(5)), (without_domains(s, [2]) for s in synthetic_statistics(5))
    )
    assert np.abs(state.weights - _prior(5)).max() > 1e-4


def check_a_step_may_have_no_sequences(algorithm: AlgorithmOrFactory) -> None:
    """Check that the algorithm works if a step has no sequences, be it the first or a later one."""
    algorithm = _algorithm_of(algorithm, 5)
    steps = synthetic_statistics(5)
    for step in (0, NUM_STEPS // 2):
        steps[step] = without_domains(steps[step], range(5))
    run_algorithm(algorithm, algorithm.start(_prior(5)), steps)


def check_nonfinite_losses_are_counted(algorithm: AlgorithmOrFactory) -> None:
    """Check that an excluded NaN is counted, and that a NaN in the sums affects only its domain and step."""
    algorithm = _algorithm_of(algorithm, 5)
    steps = synthetic_statistics(5)
    excluded = without_domains(steps[30], [1])
    steps[30] = replace(excluded, num_sequences=steps[30].num_sequences, num_nonfinite=np.array([0, 3, 0, 0, 0]))
    poisoned = steps[45].loss_sum.copy()
    poisoned[3] = np.nan
    steps[45] = replace(steps[45], loss_sum=poisoned)
    state = run_algorithm(algorithm, algorithm.start(_prior(5)), steps)
    described = algorithm.describe(state)
    assert described["num_nonfinite"][1] == 3
    for name in algorithm.learned:
        assert np.isfinite(described[name]).all(), f"{name} is {described[name]} after one NaN"


def check_one_domain(algorithm: AlgorithmOrFactory) -> None:
    """Check that a single domain always has weight 1."""
    algorithm = _algorithm_of(algorithm, 1)
    state = run_algorithm(algorithm, algorithm.start(np.ones(1)), synthetic_statistics(1))
    assert np.allclose(state.weights, [1.0], rtol=0, atol=1e-12)


def check_many_domains(algorithm: AlgorithmOrFactory) -> None:
    """Check that the weights of 1,000 domains are valid and at or above the floor."""
    algorithm = _algorithm_of(algorithm, 1000)
    state = run_algorithm(algorithm, algorithm.start(_prior(1000)), synthetic_statistics(1000, 45))
    assert state.weights.min() >= algorithm.floor(1000) - 1e-15


def check_description_is_per_domain(algorithm: AlgorithmOrFactory) -> None:
    """Check that `describe` returns one value per domain for every name."""
    algorithm = _algorithm_of(algorithm, 5)
    for num_steps in (0, NUM_STEPS):
        state = run_algorithm(algorithm, algorithm.start(_prior(5)), synthetic_statistics(5, num_steps))
        described = algorithm.describe(state)
        assert {"weight", "num_nonfinite", *algorithm.learned} <= set(described)
        assert {name: values.shape for name, values in described.items()} == dict.fromkeys(described, (5,))


CHECKS: tuple[Callable[[AlgorithmOrFactory], None], ...] = (
    check_a_domain_may_never_appear,
    check_a_step_may_have_no_sequences,
    check_absent_domain_keeps_learned_values,
    check_description_is_per_domain,
    check_many_domains,
    check_nonfinite_losses_are_counted,
    check_one_domain,
    check_resume_equals_no_resume,
    check_starts_with_the_prior,
    check_state_is_immutable,
    check_weights_are_valid,
    check_weights_move,
)


def _algorithm_of(algorithm: AlgorithmOrFactory, num_domains: int) -> MixingAlgorithm[Any]:
    # Algorithms are not callable.
    return algorithm(num_domains) if callable(algorithm) else algorithm


def _prior(num_domains: int) -> NDArray[np.float64]:
    weights = np.arange(1, num_domains + 1, dtype=np.float64)
    prior: NDArray[np.float64] = weights / weights.sum()
    return prior


def _assert_valid_weights(weights: NDArray[np.float64]) -> None:
    assert weights.dtype == np.float64
    assert np.isfinite(weights).all(), f"weights are {weights}"
    assert (weights >= 0).all(), f"weights are {weights}"
    assert abs(weights.sum() - 1) <= 1e-12, f"weights sum to {weights.sum()!r}"


def _copied(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name: values.copy() for name, values in arrays.items()}


def _assert_same(expected: Mapping[str, NDArray[Any]], got: Mapping[str, NDArray[Any]]) -> None:
    assert set(expected) == set(got)
    for name, values in expected.items():
        assert values.dtype == got[name].dtype, f"{name} is {got[name].dtype}, was {values.dtype}"
        assert values.tobytes() == got[name].tobytes(), f"{name} differs"
