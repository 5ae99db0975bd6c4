"""Stopping anywhere and continuing from the saved arrays gives the same bits as not stopping, for any losses."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtera_hpc.core.mixing.algorithm import make_algorithm
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.testing.mixing import round_trip_npz, run_algorithm, synthetic_statistics, without_domains

NUM_STEPS = 40
QUICK = {"warmup": 12, "refit_interval": 7, "first_fitted_step": 4}
algorithms = st.sampled_from(
    [
        *(("ado", {**QUICK, "variant": variant}) for variant in ("default", "paper", "authors", "mixtera")),
        ("odm", {}),
        ("exponentiated-gradient", {"eta": 0.1}),
        *(("loss-proportional", {}), ("skill-it", {}), ("aioli", {}), ("odm", {"variant": "released"})),
    ]
)


@st.composite
def runs(draw: st.DrawFn) -> tuple[np.ndarray, list[DomainStatistics]]:
    """Return a prior, and steps in which some domains are missing and some losses are not finite."""
    size = draw(st.integers(1, 6))
    steps = synthetic_statistics(size, NUM_STEPS, seed=draw(st.integers(0, 2**32)))
    for step, domain in draw(st.lists(st.tuples(st.integers(0, NUM_STEPS - 1), st.integers(0, size - 1)), max_size=60)):
        steps[step] = without_domains(steps[step], [domain])
    for step in draw(st.lists(st.integers(0, NUM_STEPS - 1), max_size=3)):
        lost = steps[step]
        steps[step] = replace(lost, loss_sum=lost.loss_sum * np.nan, num_nonfinite=lost.num_sequences)
    weights = np.array(draw(st.lists(st.integers(1, 100), min_size=size, max_size=size)), np.float64)
    return weights / weights.sum(), steps


@settings(max_examples=60, deadline=None)
@given(algorithms, runs(), st.integers(0, NUM_STEPS))
def test_a_resumed_run_equals_one_that_did_not_stop(
    choice: tuple[str, dict[str, object]], made: tuple[np.ndarray, list[DomainStatistics]], stop: int
) -> None:
    prior, steps = made
    name, parameters = choice
    if name == "exponentiated-gradient":
        parameters = {**parameters, "reference_losses": [0.0] * len(prior)}
    algorithm = make_algorithm(name, parameters)
    expected = algorithm.state_arrays(run_algorithm(algorithm, algorithm.start(prior), steps))
    early = algorithm.state_arrays(run_algorithm(algorithm, algorithm.start(prior), steps[:stop]))
    restored = make_algorithm(name, parameters).state_from_arrays(round_trip_npz(early))
    got = algorithm.state_arrays(run_algorithm(algorithm, restored, steps[stop:]))
    assert {name: values.tobytes() for name, values in expected.items()} == {
        name: values.tobytes() for name, values in got.items()
    }
