"""Wrong settings of packing, balancing and budgets are refused with a cure."""

from dataclasses import replace
from typing import Any

import pytest

from mixtera_hpc.config.packing.check_packing import balance_group, packing_problems
from mixtera_hpc.config.schema import BatchStageConfig, DataPlaneConfig, MixtureConfig
from mixtera_hpc.dataplane.reading.packing.sequence_order import packing_identity

PLANE = DataPlaneConfig(global_batch_size=24)


@pytest.mark.parametrize(
    ("unit", "changes", "problem"),
    [
        ("tokens", {"pack_group": 1}, "pack_group is 1, expected 2 to 4096"),
        ("samples", {"pack": "best_fit"}, "only tokens are packed"),
        ("tokens", {"pack": "best_fit", "shuffle": "sequence"}, "Set dataplane.shuffle=window"),
        ("samples", {"balance": "attention"}, "Set mixture.unit=tokens, or dataplane.balance=cost"),
        ("samples", {"balance": "cost"}, "sample_cost is not set"),
        ("tokens", {"balance": "attention", "balance_group": 5}, "does not divide dataplane.global_batch_size=24"),
        ("tokens", {"balance_group": 1}, "balance_group"),
        ("tokens", {"balance": "attention", "global_batch_size": 67}, "set dataplane.balance_group=67"),
        ("tokens", {"sample_cost": "tokens"}, "Set mixture.unit=samples"),
        ("samples", {"sample_budget": 100.0}, "sample_cost is not"),
        ("samples", {"sample_cost": "tokens", "sample_budget": 0.0}, "expected more than 0"),
    ],
)
def test_a_wrong_setting_is_refused(unit: Any, changes: dict[str, Any], problem: str) -> None:
    problems = packing_problems(replace(PLANE, **changes), MixtureConfig(unit=unit))
    assert any(problem in text for text in problems)


def test_settings_that_fit_are_accepted() -> None:
    tokens = replace(PLANE, pack="best_fit", balance="attention", balance_group=8)
    samples = replace(PLANE, shuffle="sequence", balance="cost", sample_cost="bytes", sample_budget=10.0)
    assert not packing_problems(tokens, MixtureConfig())
    assert not packing_problems(samples, MixtureConfig(unit="samples"))


def test_a_group_must_divide_every_batch_of_a_ramp() -> None:
    plane = replace(PLANE, balance_group=8, batch_schedule=[BatchStageConfig(start=10, size=36)])
    [problem] = packing_problems(plane, MixtureConfig())
    assert "batch_schedule[0].size=36" in problem


@pytest.mark.parametrize(("size", "group"), [(24, 24), (64, 64), (96, 48), (1024, 64), (67, 1), (1, 1)])
def test_the_default_group_is_the_largest_divisor_up_to_64(size: int, group: int) -> None:
    assert balance_group(PLANE, size) == group


def test_only_what_decides_the_content_of_positions_is_the_identity_of_a_run() -> None:
    budget = replace(PLANE, sample_cost="tokens", sample_budget=5.0)
    assert packing_identity(budget) == packing_identity(PLANE) == {"pack": "concat", "balance": "none"}
    assert packing_identity(replace(budget, balance="cost")) != packing_identity(PLANE)
