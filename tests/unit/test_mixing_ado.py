"""The rules of ADO, one per test; `test_mixing_faults` tests the faults that it must not have."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.core.mixing.ado import LAW_UNKNOWN, Ado, AdoState
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.errors import ConfigError, MixtureError
from mixtera_hpc.testing.mixing import run_algorithm, synthetic_statistics, without_domains

PRIOR = np.array([0.5, 0.3, 0.2])
WARMUP = 40


def ado(**parameters: Any) -> Ado:
    return Ado(Ado.Config(**{"warmup": WARMUP, "refit_interval": 20, **parameters}))


def after(algorithm: Ado, num_steps: int) -> AdoState:
    return run_algorithm(algorithm, algorithm.start(PRIOR), synthetic_statistics(3, num_steps))


def share(statistics: DomainStatistics) -> np.ndarray:
    return statistics.num_sequences / statistics.num_sequences.sum()


def test_the_mixture_does_not_change_before_the_end_of_the_warmup() -> None:
    state = after(ado(), WARMUP)
    for values in (state.weights, state.credit, state.average):
        assert values.tolist() == PRIOR.tolist()
    assert after(ado(), WARMUP + 1).weights.tolist() != PRIOR.tolist()


@pytest.mark.parametrize("step", [WARMUP, WARMUP + 7, WARMUP + 20])
def test_a_step_follows_the_equations(step: int) -> None:
    """Equations (2) to (5) of arXiv 2410.11820, with realised shares, written out."""
    algorithm = ado()
    statistics = synthetic_statistics(3, step + 1)
    old = run_algorithm(algorithm, algorithm.start(PRIOR), statistics[:-1])
    new, weights = algorithm.update(old, statistics[-1])
    credit = 0.1 * share(statistics[-1]) + 0.9 * old.credit
    n = sum(int(s.num_sequences.sum()) for s in statistics)
    law = algorithm.describe(new)
    preference = PRIOR * np.sqrt(credit) * law["alpha"] * law["beta"] * n ** (-law["alpha"]) / n
    preference /= preference.sum()
    mixture = 0.1 * preference + 0.9 * old.average
    assert new.credit == pytest.approx(credit, rel=1e-14)
    assert mixture.min() > 0.01, "the floor must not hide the equations"
    assert weights == pytest.approx(mixture, rel=1e-12)
    assert new.average == pytest.approx(preference / (step + 1) + (1 - 1 / (step + 1)) * old.average, rel=1e-12)
    assert law["speed"] == pytest.approx(law["alpha"] * law["beta"] * n ** (-law["alpha"]) / n, rel=1e-12)


def test_laws_are_fitted_at_the_end_of_the_warmup_and_every_interval_after() -> None:
    algorithm = ado()
    refits = []
    state = algorithm.start(PRIOR)
    for statistics in synthetic_statistics(3, 100):
        before = state.laws.theta.tobytes()
        state, _ = algorithm.update(state, statistics)
        if state.laws.theta.tobytes() != before:
            refits.append(statistics.step)
    assert refits == [40, 60, 80]


def test_losses_before_the_first_fitted_step_are_ignored() -> None:
    early = after(ado(first_fitted_step=30), 30)
    assert not early.history.arrays()["history_key"].size
    assert after(ado(first_fitted_step=30), 36).history.arrays()["history_num_steps"].sum() == 6


def test_without_any_law_the_prior_is_served() -> None:
    algorithm = ado()
    state = run_algorithm(
        algorithm, algorithm.start(PRIOR), (without_domains(s, range(3)) for s in synthetic_statistics(3, 80))
    )
    assert state.law_status.tolist() == [LAW_UNKNOWN] * 3
    assert state.weights.tolist() == PRIOR.tolist()


def test_paper_credit_follows_the_weights_and_default_credit_the_shares_served() -> None:
    statistics = synthetic_statistics(3, 60)
    lopsided = [without_domains(s, [2]) if s.step >= WARMUP else s for s in statistics]
    credits = {}
    for variant in ("default", "paper"):
        algorithm = ado(variant=variant)
        credits[variant] = run_algorithm(algorithm, algorithm.start(PRIOR), lopsided).credit
    assert credits["default"][2] == pytest.approx(0.2 * 0.9**20)
    assert credits["paper"][2] > 0.15


def test_a_domain_without_a_law_gets_the_mean_speed() -> None:
    algorithm = ado()
    statistics = [without_domains(s, [2]) for s in synthetic_statistics(3, WARMUP + 1)]
    old = run_algorithm(algorithm, algorithm.start(PRIOR), statistics[:-1])
    new, _ = algorithm.update(old, statistics[-1])
    speed = algorithm.describe(new)["speed"]
    assert np.isnan(speed).tolist() == [False, False, True]
    speed[2] = (0.5 * speed[0] + 0.3 * speed[1]) / 0.8
    preference = PRIOR * np.sqrt(new.credit) * speed
    preference /= preference.sum()
    assert (new.average - PRIOR) * (WARMUP + 1) == pytest.approx(preference - PRIOR, abs=1e-9)


@pytest.mark.parametrize(
    ("variant", "factor"),
    [("authors", np.sqrt), ("authors-first", lambda credit: np.sqrt(credit * (1 - credit)))],
)
def test_authors_credit_is_a_root_and_was_a_spread_in_their_first_commit(variant: str, factor: Any) -> None:
    algorithm = ado(variant=variant, delta_min=0.0)
    statistics = synthetic_statistics(3, WARMUP + 1)
    state = run_algorithm(algorithm, algorithm.start(PRIOR), statistics)
    preference = PRIOR * factor(state.credit) * algorithm.describe(state)["speed"]
    preference /= preference.sum()
    assert (state.average - PRIOR) * (WARMUP + 1) == pytest.approx(preference - PRIOR, abs=1e-9)


def test_authors_credit_moves_during_the_warmup() -> None:
    state = after(ado(variant="authors"), 1)
    statistics = synthetic_statistics(3, 1)
    assert state.credit == pytest.approx(0.1 * share(statistics[0]) + 0.9 * PRIOR)
    assert state.weights.tolist() == PRIOR.tolist()


@pytest.mark.parametrize("factor", [2, 10, 1000])
def test_what_counts_as_a_sequence_does_not_matter(factor: int) -> None:
    """Ten times as many sequences of the same losses give the same mixture."""
    algorithm = ado()
    names = ("num_sequences", "num_tokens", "loss_sum")
    scaled = [replace(s, **{n: getattr(s, n) * factor for n in names}) for s in synthetic_statistics(3, 100)]
    state = run_algorithm(algorithm, algorithm.start(PRIOR), scaled)
    assert state.weights == pytest.approx(after(algorithm, 100).weights, abs=1e-9)
    speeds = algorithm.describe(state)["speed"] * factor
    assert speeds == pytest.approx(algorithm.describe(after(algorithm, 100))["speed"], rel=1e-6)


def test_the_description_says_how_well_the_laws_fit() -> None:
    algorithm = ado()
    described = algorithm.describe(after(algorithm, 100))
    assert (described["residual"] < 0.04).all(), "noise of 0.02 nats at losses of 2 to 4 nats"
    arrays = algorithm.state_arrays(after(algorithm, 100))
    arrays["theta"] = np.array([[6.5, 0.3, 1.0], [1.0, 0.8, 1.0], [1.0, 0.0, 1.0]])
    assert algorithm.describe(algorithm.state_from_arrays(arrays))["law_bounds"].tolist() == [2, 8, 4]


def test_a_flagged_bound_is_the_exponent_of_the_best_fit() -> None:
    algorithm = ado()
    arrays = algorithm.state_arrays(after(algorithm, 100))
    arrays["theta"] = np.array([[1.0, 0.3, 1.0], [1.0, 0.8, 1.0], [1.0, 0.0, 1.0]])
    arrays["averaged_theta"] = np.array([[1.0, 0.35, 1.0], [1.0, 0.6, 1.0], [1.0, 0.2, 1.0]])
    described = algorithm.describe(algorithm.state_from_arrays(arrays))
    assert described["alpha"].tolist() == [0.35, 0.6, 0.2], "speeds have averaged exponents"
    assert described["best_alpha"].tolist() == [0.3, 0.8, 0.0]
    assert described["law_bounds"].tolist() == [0, 8, 4]
    assert "best_alpha" not in ado(variant="paper").describe(after(ado(variant="paper"), 50)), "nothing is averaged"


def test_authors_speed_has_a_minimum_exponent() -> None:
    algorithm = ado(variant="authors")
    arrays = algorithm.state_arrays(after(algorithm, 41))
    arrays["theta"] = np.tile([2.0, 0.01, 1.0], (3, 1))
    state = algorithm.state_from_arrays(arrays)
    reducible = np.exp(2.0) * state.num_seen**-0.01
    assert algorithm.describe(state)["speed"] == pytest.approx(np.full(3, 0.05 * reducible / state.num_seen))


def test_mixtera_counts_steps_from_one() -> None:
    paper, mixtera = (after(ado(variant=v), WARMUP + 1) for v in ("paper", "mixtera"))
    preference = (paper.average - PRIOR) * (WARMUP + 1) + PRIOR
    assert mixtera.average == pytest.approx(preference / (WARMUP + 2) + (1 - 1 / (WARMUP + 2)) * PRIOR)


def test_only_variants_with_an_exact_floor_report_one() -> None:
    assert [ado(variant=v).floor(3) for v in ("default", "paper", "authors", "mixtera")] == [0.01, 0.01, 0.0, 0.0]


def test_first_fitted_step_is_half_of_the_warmup_unless_given() -> None:
    assert Ado.Config().first_fitted == 500
    assert Ado.Config(warmup=20).first_fitted == 10
    assert Ado.Config(warmup=20, first_fitted_step=3).first_fitted == 3


def test_a_warmup_that_ends_before_the_first_fitted_step_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"first_fitted_step is 500, after the warm-up of 20"):
        Ado.Config(warmup=20, first_fitted_step=500)


@pytest.mark.parametrize("prior", [[0.5, 0.6], [1.5, -0.5], [np.nan, 1.0], []])
def test_an_invalid_prior_is_refused(prior: list[float]) -> None:
    with pytest.raises(MixtureError, match="initial mixture"):
        ado().start(np.array(prior))


def test_state_of_another_variant_is_refused() -> None:
    arrays = ado(variant="paper").state_arrays(after(ado(variant="paper"), 3))
    with pytest.raises(ConfigError, match=r"is ado variant=default, but .* written by ado variant=paper"):
        ado().state_from_arrays(arrays)
