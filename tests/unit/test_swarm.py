"""Swarms: sampled mixtures, tables of runs, regressions that recover a known law, and proposals within bounds."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import DomainConfig, MixtureConfig, ScheduleConfig, StageConfig, SwarmConfig
from mixtera_hpc.errors import ConfigError, DataError, MixtureError
from mixtera_hpc.swarm.cross_validation import choose_laws, constant_rmse, mean_loss, validate_regressions
from mixtera_hpc.swarm.mixture_file import fixed_mixture, mixture_text, written_weights
from mixtera_hpc.swarm.mixture_space import MixtureSpace, epoch_caps
from mixtera_hpc.swarm.proposal import estimate_uncertainty, propose_mixture, uniform_mixture
from mixtera_hpc.swarm.regression import LAWS, fit_losses
from mixtera_hpc.swarm.sampling import sample_mixtures, tempered
from mixtera_hpc.swarm.tables import SwarmTable, check_ratios, join_tables, read_table, table_text
from mixtera_hpc.swarm.training_phases import TrainingPhases, by_phase

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


def phases_of(size: int, limit: list[float], phases: tuple[float, ...] = (0.8, 0.2), high: float = 1.0) -> MixtureSpace:
    names = tuple(f"d{i}" for i in range(size))
    prior = np.full(size, 1 / size)
    bounds = (np.zeros(size), np.full(size, high))
    return MixtureSpace.of_domains(names, prior, *bounds, limit=np.array(limit), phases=phases)


def test_every_phase_is_sampled_within_the_limits_of_the_whole_run() -> None:
    space = phases_of(3, [0.1, 0.7, 1.0])
    mixtures = sample_mixtures(space, 400, SwarmConfig())
    shares = by_phase(mixtures, 2)
    assert shares.sum(axis=2) == pytest.approx(np.ones((400, 2)))
    run = space.whole_run(mixtures)
    assert run == pytest.approx(0.8 * shares[:, 0] + 0.2 * shares[:, 1])
    assert (run <= np.array([0.1, 0.7, 1.0]) + 1e-7).all()
    assert shares[:, 1, 0].max() > 0.35, "a small domain may be kept for a phase of a fifth of the run"
    assert abs(np.corrcoef(shares[:, 0, 2], shares[:, 1, 2])[0, 1]) < 0.5, "phases have mixtures of their own"
    assert np.array_equal(mixtures[:5], sample_mixtures(space, 5, SwarmConfig()))
    assert written_weights(sample_mixtures(space, 0, SwarmConfig()), 2).shape == (0, 6), "swarm.num_proxies=0"
    with pytest.raises(MixtureError, match=r"with the limits of epochs, to 0\.9"):
        phases_of(3, [0.1, 0.7, 0.1])


def test_limits_of_the_whole_run_change_only_what_they_must() -> None:
    space = phases_of(3, [0.2, 0.5, 1.0])
    within = np.array([0.1, 0.4, 0.5, 0.5, 0.4, 0.1])
    assert space.keep_limits(within).tolist() == within.tolist()
    first, last = by_phase(space.keep_limits(np.array([0.5, 0.3, 0.2, 0.1, 0.8, 0.1])), 2)
    assert 0.8 * first[0] + 0.2 * last[0] == pytest.approx(0.2)
    assert first[0] / last[0] == pytest.approx(5), "a domain above its limit keeps its ratio of the phases"
    # The last domain of a phase cannot take what the others leave, so both phases move towards one mixture.
    tight = phases_of(3, [0.2, 0.5, 0.35])
    moved = tight.keep_limits(np.array([0.05, 0.05, 0.9, 0.9, 0.05, 0.05]))
    assert by_phase(moved, 2).sum(axis=1) == pytest.approx(np.ones(2))
    assert tight.is_within_limits(moved)


def test_the_proposal_of_two_phases_is_the_known_optimum() -> None:
    """The last phase counts more for domain 0, of which there is too little for the whole run."""
    space = phases_of(3, [0.2, 1.0, 1.0])
    mixtures = sample_mixtures(space, 60, SwarmConfig(concentration=0.7))
    slopes = np.array([[-0.5, 0.0, 0.2, -2.0, 0.1, 0.2], [0.0, -1.5, 0.3, 0.0, -0.1, 0.1]])

    def losses_of(shares: Array) -> Array:
        return np.array([1.0, 0.5]) + np.exp(np.array([0.8, 0.6]) + shares @ slopes.T)

    objective = np.ones(2)
    fit = fit_losses(LAWS["exponential"], mixtures, losses_of(mixtures), 1e-5)
    proposal = propose_mixture(space, fit, mixtures, objective, penalty=0.0)
    first, last = by_phase(proposal, 2)
    assert first.sum() == pytest.approx(1)
    assert last.sum() == pytest.approx(1)
    assert space.is_within_limits(proposal)
    assert last[0] > 0.7 > 0.3 > first[0], "the rare domain comes last"
    assert first[1] > 0.7
    others = sample_mixtures(space, 2000, SwarmConfig(concentration=0.7, seed=5))
    inside = ((others <= mixtures.max(axis=0)) & (others >= mixtures.min(axis=0))).all(axis=1)
    measured = mean_loss(losses_of(others[inside]), objective)
    assert mean_loss(losses_of(proposal), objective) <= measured.min() + 1e-3


def test_phases_begin_at_chunks_and_are_files_of_schedules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["data.root=/data", "dataplane.vocab_size=9", "dataplane.chunk_steps=8", "training.num_steps=100"]
    config = compose([*words, "swarm.phases=[0.7,0.3]"])
    phases = TrainingPhases.of(config)
    assert phases.starts == (0, 72), "the nearest chunk"
    assert phases.shares == pytest.approx((0.72, 0.28))
    with pytest.raises(ConfigError, match="phase 2 has no chunk of its own"):
        TrainingPhases.of(compose([*words, "training.num_steps=96", "swarm.phases=[0.99,0.01]"]))
    for wrong in ("[]", "[0.5,0.6]", "[1,0]"):
        with pytest.raises(ConfigError, match="expected shares of the run above 0 that sum to 1"):
            compose([*words, f"swarm.phases={wrong}"])

    base = MixtureConfig(domains=[DomainConfig(key={"source": "a"}, max_epochs=2.0)], remainder=DomainConfig(cap=0.9))
    schedule = ScheduleConfig(stages=[StageConfig(start=0.0), StageConfig(start=72.0)])
    weights = np.array([0.25, 0.75, 0.1, 0.9])
    mixture = fixed_mixture(base, ({"source": ("a",)}, {}), weights, schedule)
    (tmp_path / "mixture").mkdir()
    (tmp_path / "mixture" / "phased.yaml").write_text(mixture_text(mixture, "Two phases."))
    monkeypatch.setenv("MIXTERA_CONF", str(tmp_path))
    read = compose([*words, "mixture=phased"]).mixture
    assert read == mixture
    assert [stage.domains[0].weight for stage in read.schedule.stages] == [0.25, 0.1]
    assert read.domains[0].max_epochs == 2.0
    assert read.remainder == DomainConfig(cap=0.9)


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
    chosen = min(validated, key=lambda candidate: candidate.rmse)
    assert chosen.laws[0].name == "exponential"
    assert chosen.rmse < 0.1 * constant_rmse(losses, objective)
    assert chosen.rank_correlation > 0.95
    fresh = sample_mixtures(space, 200, SwarmConfig(concentration=1.5, seed=9))
    fit = fit_losses(chosen.laws[0], mixtures, losses, chosen.ridge)
    assert np.abs(fit.predict(fresh) - known_losses(fresh)).mean() < 0.02


def test_every_metric_has_the_law_that_predicts_it_best() -> None:
    """One metric is linear in the logarithms of the shares, and one in the shares themselves."""
    mixtures = sample_mixtures(space_of([1, 1, 1, 1]), 24, SwarmConfig(concentration=0.7))
    power = 1.0 + np.exp(0.2 - 0.6 * np.log(mixtures[:, 0] + 0.01))
    exponential = 0.5 + np.exp(1.0 - 3.0 * mixtures[:, 1])
    losses = np.stack([power, exponential], axis=1)
    validated = validate_regressions(mixtures, losses, np.ones(2))
    chosen = choose_laws(validated, losses, np.ones(2))
    assert [law.name for law in chosen.laws] == ["power", "exponential"]
    assert chosen.rmse < 0.5 * min(candidate.rmse for candidate in validated)
    fit = chosen.fit(mixtures, losses)
    fresh = sample_mixtures(space_of([1, 1, 1, 1]), 50, SwarmConfig(seed=4))
    parts = [fit_losses(chosen.laws[m], mixtures, losses[:, [m]], float(chosen.ridge[m])) for m in range(2)]
    assert fit.predict(fresh) == pytest.approx(np.concatenate([part.predict(fresh) for part in parts], axis=1))
    slopes = np.concatenate([part.gradient(fresh[0]) for part in parts], axis=1)
    assert fit.gradient(fresh[0]) == pytest.approx(slopes)


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
    chosen = choose_laws(validate_regressions(mixtures, losses, np.ones(4)), losses, np.ones(4))
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
