"""Initial weights, from domain sizes and written weights."""

import numpy as np
import pytest

from mixtera_hpc.core.mixing.weights import WeightNode, check_available, natural_weights, tree_weights, unimax_weights
from mixtera_hpc.errors import MixtureError

SIZES = np.array([800, 0, 150, 50])


def leaf(domain: int, weight: float | None = None) -> WeightNode:
    return WeightNode(weight=weight, domain=domain)


def test_natural_weights_are_shares_of_the_size() -> None:
    assert natural_weights(SIZES).tolist() == [0.8, 0.0, 0.15, 0.05]


def test_temperature_takes_the_root_of_the_size() -> None:
    roots = np.sqrt(SIZES)
    assert natural_weights(SIZES, 2.0) == pytest.approx(roots / roots.sum())
    assert natural_weights(SIZES, 1e6) == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3], abs=1e-4)


def test_unimax_gives_equal_shares_where_the_epochs_allow_them() -> None:
    """Computed by hand: 300 items over 4 domains, at most 1 pass. 0 takes 0, 50 takes 50, then 125 each."""
    assert unimax_weights(SIZES, 1.0, 300) == pytest.approx([125 / 300, 0, 125 / 300, 50 / 300])


def test_unimax_with_more_budget_than_passes_is_natural() -> None:
    assert unimax_weights(SIZES, 2.0, 1e9) == pytest.approx(natural_weights(SIZES))


def test_the_weight_of_a_leaf_is_the_product_along_its_path() -> None:
    tree = [WeightNode(weight=0.6, members=(leaf(2, 0.75), leaf(0, 0.25))), leaf(3, 0.4)]
    assert tree_weights(tree, SIZES) == pytest.approx([0.15, 0, 0.45, 0.4])


def test_weights_count_relative_to_their_siblings() -> None:
    tree = [WeightNode(weight=3, members=(leaf(0, 1), leaf(2, 1))), leaf(3, 1)]
    assert tree_weights(tree, SIZES) == pytest.approx([0.375, 0, 0.375, 0.25])


def test_members_without_weights_share_the_weight_of_their_group_by_size() -> None:
    tree = [WeightNode(weight=0.5, members=(leaf(2), leaf(3))), leaf(0, 0.5)]
    assert tree_weights(tree, SIZES) == pytest.approx([0.5, 0, 0.375, 0.125])


def test_a_group_without_samples_keeps_its_weight_and_can_be_refused() -> None:
    tree = [WeightNode(weight=0.5, members=(leaf(1), leaf(1))), leaf(0, 0.5)]
    assert tree_weights(tree, SIZES) == pytest.approx([0.5, 0.5, 0, 0])
    assert tree_weights([WeightNode(weight=1.0, members=(leaf(1),))], SIZES) == pytest.approx([0, 1, 0, 0])


def test_a_weight_on_an_empty_domain_is_refused() -> None:
    with pytest.raises(MixtureError, match=r"Domain b has weight 0\.5"):
        check_available(np.array([0.5, 0.5, 0, 0]), SIZES, ["a", "b", "c", "d"])


def test_weights_without_any_data_are_refused() -> None:
    for ask in (
        lambda: natural_weights(0 * SIZES),
        lambda: unimax_weights(0 * SIZES, 1, 1),
        lambda: check_available(SIZES, 0 * SIZES, []),
    ):
        with pytest.raises(MixtureError, match="selects no sample"):
            ask()
