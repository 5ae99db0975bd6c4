"""Whatever is wished for, the projection is a mixture within its bounds, and nothing closer exists."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mixtera_hpc.core.mixing.bounds import project_to_bounds

sizes = st.integers(1, 30)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    size = draw(sizes)
    unit = st.floats(0, 1, allow_subnormal=False)
    wish = draw(hnp.arrays(np.float64, size, elements=st.just(0.0) | st.floats(1e-9, 1e9)))
    low = draw(hnp.arrays(np.float64, size, elements=unit))
    low = low * draw(unit) / max(low.sum(), 1.0)
    high = low + draw(hnp.arrays(np.float64, size, elements=unit))
    missing = max(0.0, 1.0 - high.sum())
    return wish, low, high + missing / size * 1.001


@settings(deadline=None)
@given(problems())
def test_the_result_is_a_mixture_within_its_bounds(problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    wish, low, high = problem
    got = project_to_bounds(wish, low, high)
    assert abs(got.sum() - 1) <= 1e-12
    assert (got >= low).all()
    assert (got <= high).all()


@settings(deadline=None)
@given(problems())
def test_domains_between_their_bounds_keep_their_ratios(problem: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """The optimality condition of the projection: one factor for the free, beyond it for those at a bound."""
    wish, low, high = problem
    got = project_to_bounds(wish, low, high)
    loose = (wish > 0) & (low < high)
    free = loose & (got > low) & (got < high)
    if not free.any():
        return
    factors = got[free] / wish[free]
    assert factors.max() <= factors.min() * (1 + 1e-9)
    scaled = wish * factors.max()
    assert (scaled <= low * (1 + 1e-9))[loose & (got == low)].all()
    assert (scaled >= high * (1 - 1e-9))[loose & (got == high)].all()


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=300), st.floats(0, 1))
def test_the_floor_holds_to_the_last_bit(wish: list[float], part: float) -> None:
    floor = part / len(wish)
    got = project_to_bounds(np.array(wish), floor)
    assert got.min() >= floor
    assert abs(got.sum() - 1) <= 1e-13
