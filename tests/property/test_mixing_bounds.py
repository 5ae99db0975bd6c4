"""For any weights the projection is a mixture within its bounds, and no closer one exists."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mixtera_hpc.core.mixing.bounds import project_to_bounds

sizes = st.integers(1, 30)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    size = draw(sizes)
    unit = st.floats(0, 1, allow_subnormal=False)
    weights = draw(hnp.arrays(np.float64, size, elements=st.just(0.0) | st.floats(1e-9, 1e9)))
    low = draw(hnp.arrays(np.float64, size, elements=unit))
    low = low * draw(unit) / max(low.sum(), 1.0)
    high = low + draw(hnp.arrays(np.float64, size, elements=unit))
    missing = max(0.0, 1.0 - high.sum())
    return weights, low, high + missing / size * 1.001


THREE_HEAVY = np.array([1.5e6, 1e-9, 1.5e6, 1.5e6])
CAPS_THAT_SUM_TO_ONE = np.array([0.33333333333333315, 0.33333333333333337, 0.3333333333333335, 0.33333333333333337])
"""Three heavy domains reach their caps, which leave less to the light one than the rounding of the sums."""


@settings(deadline=None)
@given(problems())
@example((THREE_HEAVY, np.zeros(4), CAPS_THAT_SUM_TO_ONE))
def test_the_result_is_a_mixture_within_its_bounds(problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    weights, low, high = problem
    projected = project_to_bounds(weights, low, high)
    assert abs(projected.sum() - 1) <= 1e-12
    assert (projected >= low).all()
    assert (projected <= high).all()


@settings(deadline=None)
@given(problems())
def test_domains_between_their_bounds_keep_their_ratios(problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """The optimality condition of the projection: all free domains have one factor, domains at a bound exceed it."""
    weights, low, high = problem
    projected = project_to_bounds(weights, low, high)
    free_candidates = (weights > 0) & (low < high)
    free = free_candidates & (projected > low) & (projected < high)
    if not free.any():
        return
    factors = projected[free] / weights[free]
    assert factors.max() <= factors.min() * (1 + 1e-9)
    scaled = weights * factors.max()
    assert (scaled <= low * (1 + 1e-9))[free_candidates & (projected == low)].all()
    assert (scaled >= high * (1 - 1e-9))[free_candidates & (projected == high)].all()


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=300), st.floats(0, 1))
def test_the_floor_holds_to_the_last_bit(weights: list[float], part: float) -> None:
    floor = part / len(weights)
    projected = project_to_bounds(np.array(weights), floor)
    assert projected.min() >= floor
    assert abs(projected.sum() - 1) <= 1e-13
