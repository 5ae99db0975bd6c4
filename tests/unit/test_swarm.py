"""Swarms: sampled mixtures, tables of runs, regressions that recover a known law, and proposals within bounds."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mixtera_hpc.config.schema import SwarmConfig
from mixtera_hpc.errors import DataError, MixtureError
from mixtera_hpc.swarm.cross_validation import choose_regression, constant_rmse, mean_loss, validate_regressions
from mixtera_hpc.swarm.mixture_space import MixtureSpace, epoch_caps
from mixtera_hpc.swarm.proposal import estimate_uncertainty, propose_mixture, uniform_mixture
from mixtera_hpc.swarm.regression import LAWS, fit_losses
from mixtera_hpc.swarm.sampling import sample_mixtures, tempered
from mixtera_hpc.swarm.tables import SwarmTable, check_ratios, join_tables, read_table, table_text

Array = NDArray[np.float64]
NAMES = ("a", "b", "c", "d")


def space_of(prior: list[float], low: float = 0.0, high: float = 1.0) -> MixtureSpace:
    size = len(prior)
    names = tuple(f"d{i}" for i in range(size))
    return MixtureSpace.of_domains(names, np.array(prior) / sum(prior), np.full(size, low), np.full(size, high))


def test_samples_scatter_around_the_prior_and_spare_domains_of_weight_0() -> None:
    space = space_of([0.6, 0.3, 0.1, 0.0])
    mixtures = sample_mixtures(space, 4000, SwarmConfig(seed=1))
    assert mixtures.mean(axis=0) == pytest.approx([0.6, 0.3, 0.1, 0.0], abs=0.02)
    assert (mixtures[:, 3] == 0).all()
    few = sample_mixtures(space, 50, SwarmConfig(min_share=0.2))
    assert ((few == 0) | (few >= 0.2 - 1e-9)).all()
    assert not np.array_equal(mixtures[:5], sample_mixtures(space, 5, SwarmConfig(seed=2)))


def test_temperature_makes_the_domains_more_equal() -> None:
    assert tempered(np.array([0.8, 0.2, 0.0]), 1.0) == pytest.approx([0.8, 0.2, 0.0])
    assert tempered(np.array([0.8, 0.2, 0.0]), 2.0) == pytest.approx([2 / 3, 1 / 3, 0.0])


def test_epochs_limit_the_share_of_a_domain() -> None:
    caps = epoch_caps(np.array([100, 100, 0, 1000]), np.array([1.0, np.inf, np.inf, 2.0]), budget=400.0)
    assert caps == pytest.approx([0.25, 1.0, 0.0, 1.0])
    with pytest.raises(MixtureError, match=r"caps, with the limits of epochs, to 0\.5"):
        MixtureSpace.of_domains(("a", "b"), np.array([0.5, 0.5]), np.zeros(2), np.array([0.25, 0.25]))


def known_losses(mixtures: Array) -> Array:
    """Return losses of four metrics that follow the exponential law with different offsets."""
    slopes = np.array([[-3.0, 0.4, 0.1, 0.0], [0.2, -2.0, 0.0, 0.3], [0.1, 0.1, -0.3, 0.0], [0.0, 0.0, 0.0, 0.0]])
    return np.array([1.5, 0.5, 0.0, 2.5]) + np.exp(np.array([0.5, 0.8, 0.2, -3.0]) + mixtures @ slopes.T)


def test_the_regression_recovers_a_known_law_and_is_chosen() -> None:
    space = space_of([0.4, 0.3, 0.2, 0.1])
    mixtures = sample_mixtures(space, 24, SwarmConfig(concentration=1.5))
    losses = known_losses(mixtures)
    objective = np.ones(4)
    validated = validate_regressions(mixtures, losses, objective)
    chosen = choose_regression(validated)
    assert chosen.law.name == "exponential"
    assert chosen.rmse < 0.1 * constant_rmse(losses, objective)
    assert chosen.rank_correlation > 0.95
    fresh = sample_mixtures(space, 200, SwarmConfig(concentration=1.5, seed=9))
    fit = fit_losses(chosen.law, mixtures, losses, chosen.ridge)
    assert np.abs(fit.predict(fresh) - known_losses(fresh)).mean() < 0.02


def test_the_gradient_is_that_of_the_prediction() -> None:
    mixtures = sample_mixtures(space_of([1, 1, 1, 1]), 16, SwarmConfig())
    for law in LAWS.values():
        fit = fit_losses(law, mixtures, known_losses(mixtures), 1e-3)
        point = np.array([0.1, 0.2, 0.3, 0.4])
        for domain in range(4):
            step = np.zeros(4)
            step[domain] = 1e-6
            slope = (fit.predict(point + step) - fit.predict(point - step)) / 2e-6
            assert fit.gradient(point)[domain] == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_metrics_that_some_runs_lack_are_fitted_to_the_others() -> None:
    mixtures = sample_mixtures(space_of([1, 1, 1, 1]), 20, SwarmConfig())
    losses = known_losses(mixtures)
    partly = losses.copy()
    partly[:10, 2] = np.nan
    whole = fit_losses(LAWS["log-linear"], mixtures, losses, 1e-3)
    fit = fit_losses(LAWS["log-linear"], mixtures, partly, 1e-3)
    assert np.allclose(fit.coefficients[:, [0, 1, 3]], whole.coefficients[:, [0, 1, 3]])
    half = fit_losses(LAWS["log-linear"], mixtures[10:], losses[10:, 2:3], 1e-3)
    assert fit.coefficients[:, 2] == pytest.approx(half.coefficients[:, 0])
    partly[13:, 2] = np.nan
    with pytest.raises(DataError, match="values of 3 runs, expected at least 4"):
        fit_losses(LAWS["log-linear"], mixtures, partly, 1e-3)


def test_the_proposal_is_the_known_optimum_within_caps() -> None:
    mixtures = sample_mixtures(space_of([1, 1, 1, 1]), 40, SwarmConfig(concentration=0.7))
    losses = known_losses(mixtures)
    objective = np.ones(4)
    fit = fit_losses(LAWS["exponential"], mixtures, losses, 1e-5)
    # The best of many random mixtures within the caps stands for the optimum.
    for cap in (1.0, 0.45, 0.3):
        space = space_of([1, 1, 1, 1], low=0.02, high=cap)
        proposal = propose_mixture(space, fit, mixtures, objective, penalty=0.0)
        assert proposal.sum() == pytest.approx(1)
        assert (proposal <= cap + 1e-9).all()
        assert (proposal >= 0.02 - 1e-9).all()
        others = sample_mixtures(space, 3000, SwarmConfig(concentration=1.0, seed=5))
        assert mean_loss(fit.predict(proposal), objective) <= mean_loss(fit.predict(others), objective).min() + 1e-6
        assert mean_loss(known_losses(proposal), objective) < mean_loss(known_losses(uniform_mixture(space)), objective)


def test_the_proposal_stays_in_the_measured_range_and_near_the_prior_if_asked() -> None:
    mixtures = 0.5 * sample_mixtures(space_of([1, 1, 1, 1]), 30, SwarmConfig()) + 0.125
    fit = fit_losses(LAWS["exponential"], mixtures, known_losses(mixtures), 1e-4)
    space = space_of([1, 1, 1, 1])
    proposal = propose_mixture(space, fit, mixtures, np.ones(4), penalty=0.0)
    assert (proposal >= mixtures.min(axis=0) - 1e-9).all()
    assert (proposal <= mixtures.max(axis=0) + 1e-9).all()
    near = propose_mixture(space, fit, mixtures, np.ones(4), penalty=50.0)
    assert near == pytest.approx(np.full(4, 0.25), abs=0.02)


def test_the_uncertainty_of_a_clear_gain_is_small() -> None:
    mixtures = sample_mixtures(space_of([1, 1, 1, 1]), 30, SwarmConfig())
    losses = known_losses(mixtures)
    chosen = choose_regression(validate_regressions(mixtures, losses, np.ones(4)))
    candidates = np.array([[0.4, 0.4, 0.15, 0.05], [0.05, 0.05, 0.1, 0.8]])
    uncertainty = estimate_uncertainty(chosen, mixtures, losses, np.ones(4), candidates)
    assert uncertainty.gain_probability[0] == 0.5
    assert uncertainty.gain_probability[1] > 0.95
    assert (uncertainty.deviation < 0.1).all()


def test_groups_of_an_earlier_swarm_keep_their_ratio() -> None:
    basis = np.array([[0.5, 0.3, 0.2, 0.0], [0.0, 0.0, 0.0, 1.0]])
    prior = np.array([0.35, 0.21, 0.14, 0.3])
    space = MixtureSpace(names=NAMES, prior=prior, low=np.zeros(4), high=np.array([0.3, 1.0, 1.0, 1.0]), basis=basis)
    space.check()
    mixtures = sample_mixtures(space, 60, SwarmConfig())
    assert mixtures[:, 1] == pytest.approx(mixtures[:, 0] * 0.6)
    assert mixtures[:, 2] == pytest.approx(mixtures[:, 0] * 0.4)
    assert mixtures[:, 0].max() <= 0.3 + 1e-9
    fit = fit_losses(LAWS["exponential"], mixtures, known_losses(mixtures), 1e-4)
    proposal = propose_mixture(space, fit, mixtures, np.ones(4), penalty=0.0)
    assert proposal[1] == pytest.approx(proposal[0] * 0.6)
    assert proposal[0] <= 0.3 + 1e-9


def test_tables_are_read_back_and_joined(tmp_path: Path) -> None:
    table = SwarmTable(runs=("p0", "p1"), columns=("a", "b"), values=np.array([[0.1, 0.9], [1 / 3, np.nan]]))
    path = tmp_path / "ratios.csv"
    path.write_text(table_text(table))
    again = read_table(path)
    assert again.runs == table.runs
    assert np.array_equal(again.values, table.values, equal_nan=True)

    path.write_text("\ufeffrun_id,name,index,b,a\nx,first,0,0.25,0.7501\n\n")
    other = check_ratios(path, read_table(path), NAMES)
    assert other.values == pytest.approx(np.array([[0.75, 0.25, 0, 0]]), abs=1e-3)
    assert other.values.sum() == pytest.approx(1)
    joined = join_tables([table, other], ("a", "c"), 0.0)
    assert joined.runs == ("p0", "p1", "x")
    assert joined.values[:, 1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected one column `run`"),
        ("a,b\n0.5,0.5\n", "expected one column `run`"),
        ("run,run_id,a\nx,y,1\n", "expected one column `run`"),
        ("run,a,a\nx,1,0\n", "different"),
        ("run,a,b\nx,1\n", "line 2 has 2 cells, expected 3"),
        ("run,a,b\nx,one,0\n", "'one' in column 'a'"),
        ("run,a,b\nx,nan,1\n", "'nan' in column 'a'"),
        ("run,a,b\nx,1,0\nx,0,1\n", "two rows of run 'x'"),
        ("run,a,b\n,1,0\n", "a row without one"),
        ("run,a,bb\nx,1,0\n", "'bb', which is not a domain"),
        ("run,a,b\nx,0.5,0.2\n", "sum to 1"),
        ("run,a,b\nx,1.5,-0.5\n", "sum to 1"),
        ("run,a,b\nx,,1\n", "sum to 1"),
    ],
)
def test_wrong_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ratios.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        check_ratios(path, read_table(path), NAMES)
    with pytest.raises(DataError, match="cannot be read"):
        read_table(tmp_path / "none.csv")
