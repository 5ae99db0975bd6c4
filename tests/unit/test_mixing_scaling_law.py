"""Laws are fitted to the global minimum of the objective, all domains at once; their speeds must be right."""

import numpy as np
import pytest

from mixtera_hpc.core.mixing.laws.law_averaging import average_exponents
from mixtera_hpc.core.mixing.laws.law_objective import LawBounds, LossPoints, huber_objective, predict
from mixtera_hpc.core.mixing.laws.scaling_law import ScalingLaws, fit_laws

N = np.geomspace(32_000, 640_000, 60)
BOUNDS = LawBounds()


def random_laws(num_domains: int, seed: int = 0) -> ScalingLaws:
    random = np.random.Generator(np.random.Philox(seed))
    log_beta = random.uniform(0.5, 6.0, num_domains)
    alpha = random.uniform(0.08, 0.7, num_domains)
    epsilon = random.uniform(0.0, 2.5, num_domains)
    return ScalingLaws(theta=np.stack([log_beta, alpha, epsilon], axis=1))


def points_of(laws: ScalingLaws, noise: float = 0.0) -> LossPoints:
    random = np.random.Generator(np.random.Philox(1))
    loss = laws.epsilon[:, None] + laws.beta[:, None] * N ** -laws.alpha[:, None]
    return LossPoints.of(np.log(N), loss * np.exp(noise * random.standard_normal(loss.shape)), np.ones_like(loss))


def unknown(points: LossPoints) -> ScalingLaws:
    return ScalingLaws.unknown(len(points.log_loss))


def score(laws: ScalingLaws, points: LossPoints) -> np.ndarray:
    return huber_objective(predict(laws.theta, points).residual, points.weight)


def test_exact_losses_give_the_speeds_of_three_hundred_laws() -> None:
    laws = random_laws(300)
    points = points_of(laws)
    fitted = fit_laws(points, BOUNDS, unknown(points))
    assert score(fitted, points).max() < 1e-5
    reducible = laws.beta * N[-1] ** -laws.alpha
    visible = reducible > 0.003
    assert visible.sum() > 200
    assert fitted.speed(N[-1])[visible] == pytest.approx(laws.speed(N[-1])[visible], rel=0.01)


@pytest.mark.slow
def test_a_general_optimizer_finds_no_better_law_from_any_start() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    points = points_of(random_laws(3, seed=3), noise=0.004)
    ours = score(fit_laws(points, BOUNDS, unknown(points)), points)
    box = [(-20, BOUNDS.max_log_beta), (0, BOUNDS.max_alpha), (0, 5)]
    for k in range(3):
        one = points.take(np.array([k]))
        starts = [(b, a, e) for b in (1.0, 5.0) for a in (0.15, 0.5) for e in (0.1, 1.0)]
        minima = [
            optimize.minimize(
                lambda t, one=one: score(ScalingLaws(theta=t[None]), one)[0], s, bounds=box, method="L-BFGS-B"
            )
            for s in starts
        ]
        assert ours[k] <= min(f.fun for f in minima) * (1 + 1e-5)


def test_the_fit_of_a_domain_does_not_depend_on_other_domains() -> None:
    points = points_of(random_laws(20), noise=0.004)
    together = fit_laws(points, BOUNDS, unknown(points))
    for k in (0, 7, 19):
        alone = fit_laws(points.take(np.array([k])), BOUNDS, ScalingLaws.unknown(1))
        assert score(alone, points.take(np.array([k])))[0] == pytest.approx(score(together, points)[k], rel=1e-4)


def test_a_bad_old_law_does_not_change_the_fit() -> None:
    points = points_of(random_laws(5), noise=0.004)
    bad = ScalingLaws(theta=np.tile([100.0, -3.0, 50.0], (5, 1)))
    assert fit_laws(points, BOUNDS, bad).theta.tolist() == fit_laws(points, BOUNDS, unknown(points)).theta.tolist()


def test_a_good_old_law_is_never_made_worse() -> None:
    points = points_of(random_laws(200), noise=0.02)
    fresh = best = fit_laws(points, BOUNDS, unknown(points))
    for _ in range(4):
        best = fit_laws(points, BOUNDS, best)
    assert (score(best, points) < score(fresh, points)).any(), "nothing left to keep"
    assert (score(fit_laws(points, BOUNDS, best), points) <= score(best, points)).all()


def test_laws_stay_within_their_bounds() -> None:
    bounds = LawBounds(max_alpha=0.3, max_log_beta=2.0, min_epsilon=1.5)
    points = points_of(random_laws(50), noise=0.01)
    theta = fit_laws(points, bounds, unknown(points)).theta
    assert (theta >= bounds.low).all()
    assert (theta <= bounds.high).all()
    assert (theta == bounds.low).any()
    assert (theta == bounds.high).any()


def test_averaging_leaves_exact_laws_as_they_are() -> None:
    points = points_of(random_laws(50))
    best = fit_laws(points, BOUNDS, unknown(points))
    averaged = ScalingLaws(theta=average_exponents(best.theta, points, BOUNDS))
    assert averaged.speed(N[-1]) == pytest.approx(best.speed(N[-1]), rel=1e-3, abs=1e-12)


def test_averaged_exponents_bring_speeds_nearer_to_the_truth() -> None:
    laws = random_laws(300)
    points = points_of(laws, noise=0.01)
    bounds = LawBounds(huber_delta=3e-2)
    best = fit_laws(points, bounds, unknown(points))
    averaged = ScalingLaws(theta=average_exponents(best.theta, points, bounds))
    visible = laws.beta * N[-1] ** -laws.alpha > 0.05
    errors = [np.mean((fit.speed(N[-1]) / laws.speed(N[-1]) - 1)[visible] ** 2) for fit in (best, averaged)]
    assert errors[1] < 0.8 * errors[0]
    assert (averaged.theta >= bounds.low).all() and (averaged.theta <= bounds.high).all()


def test_unknown_laws_stay_unknown() -> None:
    points = points_of(random_laws(3))
    theta = np.full((3, 3), np.nan)
    assert np.isnan(average_exponents(theta, points, BOUNDS)).all()


@pytest.mark.parametrize("trend", [0.0, 0.3], ids=["flat", "rising"])
def test_a_loss_that_does_not_fall_has_speed_zero(trend: float) -> None:
    loss = np.exp(trend * np.log(N / N[0]))[None]
    points = LossPoints.of(np.log(N), loss, np.ones_like(loss))
    laws = fit_laws(points, BOUNDS, unknown(points))
    assert laws.known.all()
    assert laws.speed(N[-1])[0] * N[-1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_losses_without_a_logarithm_are_ignored(bad: float) -> None:
    points = points_of(random_laws(2))
    loss = np.exp(points.log_loss)
    loss[1, ::2] = bad
    mixed = LossPoints.of(np.log(N), loss, np.ones_like(loss))
    fitted = fit_laws(mixed, BOUNDS, unknown(mixed))
    assert fitted.speed(N[-1]) == pytest.approx(fit_laws(points, BOUNDS, unknown(points)).speed(N[-1]), rel=1e-3)


def test_too_few_points_leave_only_their_own_domain_unknown() -> None:
    points = points_of(random_laws(3))
    weight = np.ones_like(points.weight)
    weight[1, 2:] = 0
    laws = fit_laws(LossPoints.of(points.log_n, np.exp(points.log_loss), weight), BOUNDS, unknown(points))
    assert laws.known.tolist() == [True, False, True]


def test_without_points_no_law_is_known() -> None:
    empty = np.zeros((2, 0))
    points = LossPoints.of(np.zeros(0), empty, empty)
    assert not fit_laws(points, BOUNDS, unknown(points)).known.any()


def test_one_outlier_changes_a_speed_only_a_little() -> None:
    points = points_of(random_laws(1, seed=5), noise=0.002)
    wild = points.log_loss.copy()
    wild[0, 40] += 1.0
    robust = fit_laws(LossPoints(log_n=points.log_n, log_loss=wild, weight=points.weight), BOUNDS, unknown(points))
    assert robust.speed(N[-1]) == pytest.approx(fit_laws(points, BOUNDS, unknown(points)).speed(N[-1]), rel=0.1)
