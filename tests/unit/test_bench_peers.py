"""The table of `python -m bench peers`: medians, ratios per round, and systems that were not run."""

import importlib
import inspect

import pytest

from bench._peers.environments import OURS, PEERS
from bench._peers.goals import BEST_PEER, BEST_PUBLISHED, GOALS, goal_rows
from bench._peers.page import aligned
from bench._peers.ratios import ratios, rounded, table_rows
from bench._peers.rounds import Measured
from bench._peers.systems import SECTIONS


def measured(name: str, rates: list[float], order: str = "shuffled", reason: str = "") -> Measured:
    return Measured(name=name, order=order, rates=rates, cpu_s=4.5, reason=reason)


def test_a_ratio_is_formed_in_every_round_before_the_median() -> None:
    # The machine was half as fast in the second round, for both systems.
    spread = ratios(measured("a", [300, 150, 330]), measured("b", [100, 50, 100]))
    assert spread is not None
    assert (spread.median, spread.smallest, spread.largest) == (3, 3, pytest.approx(3.3))


def test_a_system_that_was_not_run_stays_in_the_table_without_a_ratio() -> None:
    absent = measured("b", [], reason="no wheel")
    assert ratios(measured("a", [1]), absent) is None
    rows = table_rows("rows", [measured("a", [200, 100, 400]), absent, measured("c", [50, 50, 50])])
    assert rows[1] == ["a", "shuffled", "200 (100–400)", "5M", "1", "4.5"]
    assert rows[2] == ["b", "shuffled", "not run", "", "", ""]
    assert rows[3][4] == "4 (2–8)"


def test_ratios_are_empty_if_the_reference_was_not_run() -> None:
    assert table_rows("rows", [measured("a", []), measured("b", [10])])[2][4] == ""


def test_a_series_has_no_column_for_the_order() -> None:
    rows = table_rows("tokens", [measured("1 ranks", [100], order=""), measured("4 ranks", [50], order="")])
    assert rows[0] == ["system", "tokens per CPU second", "CPU ns per token", "cost ÷ 1 ranks", "CPU s"]
    assert rows[2][3] == "2 (2–2)"


@pytest.mark.parametrize(
    ("value", "text"), [(0.012345, "0.0123"), (12.34, "12.3"), (1234.0, "1,230"), (1.234e6, "1.23M"), (5e9, "5,000M")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert rounded(value) == text


def test_a_markdown_table_has_columns_of_equal_width() -> None:
    assert aligned([["a", "b"], ["ccc", "d"]], markdown=True).splitlines() == [
        "| a   | b |",
        "| --- | - |",
        "| ccc | d |",
    ]


def test_every_system_names_a_function_that_takes_its_options() -> None:
    for section in SECTIONS:
        assert len({system.name for system in section.systems}) == len(section.systems)
        for system in section.systems:
            assert system.environment in {OURS, *PEERS}
            module, _, function = system.call.partition(".")
            start = getattr(importlib.import_module(f"bench._peers.{module}"), function)
            inspect.signature(start).bind(None, **system.options)


def test_goals_are_compared_with_the_ratios_of_the_rounds() -> None:
    systems = [
        measured("Mixtera-HPC", [160, 80, 170]),
        measured("a positioned read and msgspec per row", [200, 100, 200]),
        measured("torchdata, msgspec", [120, 60, 110]),
        measured("torchdata, json", [80, 40, 100]),
        measured("LitData, msgspec", [90, 50, 100]),
        measured("msgspec, line by line", [240, 120, 220]),
        measured("Grain, msgspec", [], reason="no wheel"),
    ]
    shards = [measured("10 shards", [100, 50, 90], ""), measured("5,000 shards", [40, 30, 40], "")]
    rows = goal_rows({"documents": systems, "shards": shards, "packed": [measured("Mixtera-HPC", [1])]})
    assert rows[1][2:] == ["0.8 (0.8–0.85)", "≥ 0.8", "✓"]
    assert rows[2][1:] == [
        "Mixtera-HPC ÷ the fastest other system as published, torchdata, json",
        "2 (1.7–2)",
        "≥ 1.5",
        "✓",
    ]
    assert rows[3][1:] == [
        "Mixtera-HPC ÷ the fastest other system, torchdata, msgspec",
        "1.33 (1.33–1.55)",
        "≥ 1.5",
        "✗",
    ]
    assert rows[4][1:] == [
        "msgspec, line by line ÷ the fastest other system, torchdata, msgspec",
        "2 (2–2)",
        "the most",
        "",
    ]
    assert rows[5][2:] == ["not run", "≥ 0.85", ""]
    assert rows[7][1:] == ["cost of 5,000 shards ÷ 10 shards", "2.25 (1.67–2.5)", "≤ 2", "✗"]


def test_every_goal_names_a_system_of_its_section() -> None:
    names = {(section.key, system.name) for section in SECTIONS for system in section.systems}
    assert {(goal.section, goal.other) for goal in GOALS} - names == {
        ("documents", BEST_PEER),
        ("documents", BEST_PUBLISHED),
    }
    assert {(goal.section, goal.of) for goal in GOALS if goal.of} <= names
