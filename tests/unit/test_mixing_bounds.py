"""The projection is exact: the sum is 1, floors and caps hold, and free domains keep their ratios."""

import numpy as np
import pytest

from mixtera_hpc.core.mixing.bounds import project_to_bounds, weight_floor
from mixtera_hpc.errors import MixtureError


def test_a_mixture_above_the_floor_does_not_change() -> None:
    assert project_to_bounds(np.array([0.5, 0.3, 0.2]), 0.01) == pytest.approx([0.5, 0.3, 0.2], abs=1e-16)


def test_the_share_of_a_raised_domain_is_taken_in_proportion() -> None:
    assert project_to_bounds(np.array([0.6, 0.399, 0.001]), 0.01) == pytest.approx(
        [0.6 * 0.99 / 0.999, 0.399 * 0.99 / 0.999, 0.01]
    )


def test_lowering_a_domain_may_bring_it_to_the_floor() -> None:
    got = project_to_bounds(np.array([0.8, 0.11, 0.09]), np.array([0.0, 0.1, 0.2]))
    assert got == pytest.approx([0.7, 0.1, 0.2])


def test_the_share_above_a_cap_is_distributed_in_proportion() -> None:
    assert project_to_bounds(np.array([0.6, 0.3, 0.1]), 0.0, np.array([0.4, 1.0, 1.0])) == pytest.approx(
        [0.4, 0.45, 0.15]
    )


def test_a_requested_weight_of_zero_becomes_the_floor() -> None:
    assert project_to_bounds(np.array([0.0, 0.75, 0.25]), 0.1) == pytest.approx([0.1, 0.675, 0.225])


def test_domains_with_weight_zero_take_what_full_domains_cannot() -> None:
    got = project_to_bounds(np.array([1.0, 0.0, 0.0]), 0.0, np.array([0.5, 1.0, 1.0]))
    assert got == pytest.approx([0.5, 0.25, 0.25])


def test_bounds_that_allow_one_mixture_return_it_despite_rounding() -> None:
    only = np.full(14, 1 / 14)
    assert only.sum() < 1
    assert project_to_bounds(np.zeros(14), only, only).tolist() == only.tolist()


def test_all_weights_zero_count_as_equal_weights() -> None:
    assert project_to_bounds(np.zeros(4), 0.1) == pytest.approx([0.25] * 4)


def test_floors_that_sum_to_one_give_the_uniform_mixture() -> None:
    assert project_to_bounds(np.array([0.9, 0.1]), 0.5) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(("floor", "cap"), [(0.4, 1.0), (0.0, 0.3)])
def test_bounds_that_leave_no_mixture_are_refused(floor: float, cap: float) -> None:
    with pytest.raises(MixtureError, match="No mixture of 3 domains"):
        project_to_bounds(np.array([0.5, 0.3, 0.2]), floor, cap)


@pytest.mark.parametrize(("num_domains", "floor"), [(3, 0.01), (22, 0.01), (25, 0.01), (200, 0.00125), (1000, 0.00025)])
def test_floors_never_take_more_than_their_share(num_domains: int, floor: float) -> None:
    assert weight_floor(num_domains, delta_min=0.01, floor_share=0.25) == pytest.approx(floor)
