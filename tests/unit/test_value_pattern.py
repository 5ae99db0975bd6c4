"""Patterns over category values: which are allowed, and what they match."""

import pytest

from mixtera_hpc.core.value_pattern import match_values


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("(a+)+", "repeats a group"),
        ("(a|a)*b", "repeats a group"),
        ("(a){2}", "repeats a group"),
        (r"(.)\1", "refers back"),
        ("(?P<x>a)(?P=x)", "refers back"),
        ("a?" * 30 + "a" * 30, "has 30 repeats, 3 are allowed"),
        ("(a|a)" * 50 + "b", "has 50 groups, 3 are allowed"),
        (".*" * 4, "has 4 repeats, 3 are allowed"),
        ("a" * 501, "has 501 characters, 500 are allowed"),
    ],
)
def test_a_pattern_that_could_take_exponential_time_is_refused(pattern: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        match_values(pattern, ["a" * 40])


@pytest.mark.parametrize(
    ("pattern", "values"),
    [
        (r"\(a\+\)\*", ["(a+)*"]),
        ("[*+?{(]", ["*", "+", "?", "{", "("]),
        ("a.*?b", ["ab", "axb", "a\nb"]),
        ("(?:en|de)-?[A-Z]*", ["en", "de-CH"]),
    ],
)
def test_characters_that_only_look_like_repeats_are_allowed(pattern: str, values: list[str]) -> None:
    assert match_values(pattern, [*values, "other"]) == list(range(len(values)))
