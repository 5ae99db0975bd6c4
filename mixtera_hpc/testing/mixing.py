"""What every mixing algorithm promises, as checks that fail with AssertionError.

Hand a check an algorithm that is configured to move within `NUM_STEPS` steps, with whatever interval it works in at most
`NUM_STEPS // 4`:

    for check in CHECKS:
        check(make_algorithm("ado", {"warmup": 40, "refit_interval": 15}))
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

NUM_STEPS = 60
SEQ_LEN = 128


def synthetic_statistics(num_domains: int, num_steps: int = NUM_STEPS, seed: int = 0) -> list[DomainStatistics]:
    """Steps of a made-up run: each domain's loss follows a power law of its own, with noise; all domains in every step."""
    random = np.random.Generator(np.random.Philox(seed))
    epsilon, beta = random.uniform(0.5, 2.5, num_domains), random.uniform(3.0, 9.0, num_domains)
    alpha, batch = random.uniform(0.1, 0.5, num_domains), 64 + num_domains
    steps = []
    for step in range(num_steps):
        sequences = 1 + random.multinomial(batch - num_domains, np.full(num_domains, 1 / num_domains))
        loss = epsilon + beta * ((step + 1) * batch) ** -alpha + 0.02 * random.standard_normal(num_domains)
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
    """The same step without the sequences of `domains`."""
    kept = ~np.isin(np.arange(len(statistics.loss_sum)), list(domains))
    return replace(
        statistics,
        loss_sum=statistics.loss_sum * kept,
        num_tokens=statistics.num_tokens * kept,
        num_sequences=statistics.num_sequences * kept,
    )


def run_algorithm(algorithm: MixingAlgorithm[Any], state: Any, steps: Iterable[DomainStatistics]) -> Any:
    """The state after `steps`; every mixture on the way is checked."""
    for statistics in steps:
        state, weights = algorithm.update(state, statistics)
        _assert_mixture(weights)
        assert np.array_equal(weights, state.weights), "update returns other weights than its state holds"
    return state


def round_trip_npz(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """What comes back after `arrays` were written as an npz file and read without pickle."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    file.seek(0)
    with np.load(file, allow_pickle=False) as stored:
        return dict(stored)


def check_starts_with_the_prior(algorithm: MixingAlgorithm[Any]) -> None:
    prior = _prior(5)
    state = algorithm.start(prior)
    assert state.step == 0
    assert np.array_equal(state.weights, prior)


def check_weights_are_valid(algorithm: MixingAlgorithm[Any]) -> None:
    """Finite, of sum 1, and at or above the floor once they have moved."""
    prior = _prior(5)
    state = algorithm.start(prior)
    for statistics in synthetic_statistics(5):
        state = run_algorithm(algorithm, state, [statistics])
        if not np.array_equal(state.weights, prior):
            assert state.weights.min() >= algorithm.floor(5) - 1e-15, (
                f"{state.weights} falls below {algorithm.floor(5)}"
            )


def check_weights_move(algorithm: MixingAlgorithm[Any]) -> None:
    """Without this the other checks would say nothing."""
    prior = _prior(5)
    state = run_algorithm(algorithm, algorithm.start(prior), synthetic_statistics(5))
    assert np.abs(state.weights - prior).max() > 1e-4, f"after {NUM_STEPS} steps the weights are still {prior}"
    assert state.step == NUM_STEPS


def check_state_is_immutable(algorithm: MixingAlgorithm[Any]) -> None:
    """`update` changes neither the state nor the statistics it is given, and repeats itself bit for bit."""
    steps = synthetic_statistics(5)
    early = run_algorithm(algorithm, algorithm.start(_prior(5)), steps[:45])
    before = _copied(algorithm.state_arrays(early))
    first = algorithm.state_arrays(run_algorithm(algorithm, early, steps[45:]))
    _assert_same(before, algorithm.state_arrays(early))
    _assert_same(first, algorithm.state_arrays(run_algorithm(algorithm, early, synthetic_statistics(5)[45:])))


def check_resume_equals_no_resume(algorithm: MixingAlgorithm[Any]) -> None:
    """Written to npz and read back after any step, the state goes on as if nothing had happened, bit for bit."""
    steps = synthetic_statistics(5)
    expected = algorithm.state_arrays(run_algorithm(algorithm, algorithm.start(_prior(5)), steps))
    for stop in (0, 1, NUM_STEPS // 2, NUM_STEPS - 1):
        early = run_algorithm(algorithm, algorithm.start(_prior(5)), steps[:stop])
        restored = algorithm.state_from_arrays(round_trip_npz(algorithm.state_arrays(early)))
        _assert_same(expected, algorithm.state_arrays(run_algorithm(algorithm, restored, steps[stop:])))


def check_absent_domain_keeps_learned_values(algorithm: MixingAlgorithm[Any]) -> None:
    """No sequence of a domain, no change in what is learned of it, while the others go on.

    For the first quarter without it an algorithm may still take in what it has seen before.
    """
    steps, quarter = synthetic_statistics(5), NUM_STEPS // 4
    without = [without_domains(s, [0]) for s in steps]
    state = run_algorithm(algorithm, algorithm.start(_prior(5)), steps[: 2 * quarter])
    state = run_algorithm(algorithm, state, without[2 * quarter : 3 * quarter])
    before = algorithm.describe(state)
    after = algorithm.describe(run_algorithm(algorithm, state, without[3 * quarter :]))
    assert any(not np.array_equal(before[name][1:], after[name][1:]) for name in algorithm.learned)
    for name in algorithm.learned:
        assert np.array_equal(before[name][0], after[name][0], equal_nan=True), f"{name} of an absent domain changed"


def check_a_domain_may_never_appear(algorithm: MixingAlgorithm[Any]) -> None:
    state = run_algorithm(
        algorithm, algorithm.start(_prior(5)), (without_domains(s, [2]) for s in synthetic_statistics(5))
    )
    assert np.abs(state.weights - _prior(5)).max() > 1e-4


def check_a_step_may_have_no_sequences(algorithm: MixingAlgorithm[Any]) -> None:
    steps = synthetic_statistics(5)
    for at in (0, NUM_STEPS // 2):
        steps[at] = without_domains(steps[at], range(5))
    run_algorithm(algorithm, algorithm.start(_prior(5)), steps)


def check_nonfinite_losses_are_counted(algorithm: MixingAlgorithm[Any]) -> None:
    """A NaN that was excluded is counted, and one that reaches the sums stays in its domain and step."""
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


def check_one_domain(algorithm: MixingAlgorithm[Any]) -> None:
    state = run_algorithm(algorithm, algorithm.start(np.ones(1)), synthetic_statistics(1))
    assert np.allclose(state.weights, [1.0], rtol=0, atol=1e-12)


def check_many_domains(algorithm: MixingAlgorithm[Any]) -> None:
    """A thousand domains: still a mixture, still above the floor."""
    state = run_algorithm(algorithm, algorithm.start(_prior(1000)), synthetic_statistics(1000, 45))
    assert state.weights.min() >= algorithm.floor(1000) - 1e-15


def check_description_is_per_domain(algorithm: MixingAlgorithm[Any]) -> None:
    for num_steps in (0, NUM_STEPS):
        state = run_algorithm(algorithm, algorithm.start(_prior(5)), synthetic_statistics(5, num_steps))
        described = algorithm.describe(state)
        assert {"weight", "num_nonfinite", *algorithm.learned} <= set(described)
        assert {name: values.shape for name, values in described.items()} == dict.fromkeys(described, (5,))


CHECKS: tuple[Callable[[MixingAlgorithm[Any]], None], ...] = (
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


def _prior(num_domains: int) -> NDArray[np.float64]:
    weights = np.arange(1.0, num_domains + 1)
    return weights / weights.sum()


def _assert_mixture(weights: NDArray[np.float64]) -> None:
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
