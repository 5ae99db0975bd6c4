"""Domain keys: how they are parsed, written and matched."""

from typing import Any

import pytest

from mixtera_hpc.core.domain_keys import ValuePattern, canonical_key, domain_key_to_plain, domain_name, parse_domain_key
from mixtera_hpc.core.domains import select
from mixtera_hpc.core.properties import Kind
from mixtera_hpc.core.query.parse import parse_predicate
from mixtera_hpc.errors import MixtureError
from mixtera_hpc.testing.fabricated_tables import Sample, make_index_tables

VALUES = ["c4-en", "c4-de", "c4*", "cc", "c.4", None]
TABLES, READ = make_index_tables(
    [[Sample(categories={"source": frozenset([v] if v else []), "lang": frozenset(["en", "de"])}) for v in VALUES]],
    {"source": Kind.CATEGORY, "lang": Kind.CATEGORIES},
)


def matched(plain: dict[str, Any]) -> list[str | None]:
    selection = select(TABLES, parse_predicate(None, TABLES.properties), [parse_domain_key(plain)], READ)
    domain = selection.domain_of(TABLES.combos, READ(0))
    return [v for v, d in zip(VALUES, domain, strict=True) if d == 0]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("cc", ["cc"]),
        (["cc", None], ["cc", None]),
        (None, [None]),
        ("c4-*", ["c4-en", "c4-de"]),
        ("*c*", ["c4-en", "c4-de", "c4*", "cc", "c.4"]),
        (["c.*", "cc"], ["cc", "c.4"]),
        ("c*-*e*", ["c4-en", "c4-de"]),
        ("c4-e*en", []),
        ({"matches": "c.4"}, ["c.4"]),
        ({"matches": "c4-(en|de)|cc"}, ["c4-en", "c4-de", "cc"]),
        ({"matches": r"c4\*"}, ["c4*"]),
    ],
)
def test_a_value_matches_exactly_by_wildcard_or_by_pattern(value: Any, expected: list[str | None]) -> None:
    if expected:
        assert matched({"source": value}) == expected
    else:
        with pytest.raises(MixtureError, match="but no sample matches"):
            matched({"source": value})


def test_a_value_that_exists_is_not_treated_as_a_wildcard() -> None:
    assert matched({"source": "c4*"}) == ["c4*"]


def test_every_property_of_a_key_must_match_and_any_of_several_values_matches() -> None:
    assert matched({"source": "c4-*", "lang": "de"}) == ["c4-en", "c4-de"]
    assert matched({"source": "c4-*", "lang": None}) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("c5*", r"source like 'c5\*', but no sample matches"),
        ({"matches": "c("}, "A domain key's source: 'c\\(' is not a valid regular expression"),
        ({"matches": "(a*)*"}, "repeats a group"),
        ({"matches": "c"}, "source matching 'c'"),
        ("c4-", r"no sample matches. Did you mean"),
        (False, r"source = 'false', .*\n  YAML reads yes, on, no and off without quotes .*: 'no'\.$"),
        (750, r"source = '750', .*\n  If it stands in YAML: 01, 1e5 and 12:30 .*: '01'\.$"),
    ],
)
def test_a_key_that_matches_no_sample_is_refused(value: Any, message: str) -> None:
    with pytest.raises(MixtureError, match=message):
        matched({"source": value})


@pytest.mark.parametrize("value", [{"match": "x"}, {"matches": 3}, {}, [], [["a"]]])
def test_an_invalid_value_is_refused(value: Any) -> None:
    with pytest.raises(MixtureError, match="source"):
        parse_domain_key({"source": value})


def test_a_key_is_written_as_it_was_parsed() -> None:
    plain = {"source": ["a*", None, {"matches": "b?"}], "lang": "en", "flag": "true"}
    assert domain_key_to_plain(parse_domain_key(plain)) == plain
    assert parse_domain_key({"flag": True, "year": 2020}) == {"flag": ("true",), "year": ("2020",)}
    assert parse_domain_key(plain)["source"][2] == ValuePattern("b?")


def test_the_name_of_a_key_shows_its_values() -> None:
    assert domain_name(parse_domain_key({"lang": "en", "source": ["a*", None]})) == "lang=en source=a*|null"
    assert domain_name({}) == "all"


def test_keys_are_equal_in_any_order_of_properties_and_values() -> None:
    assert canonical_key(parse_domain_key({"a": ["x", "y"], "b": 1})) == canonical_key(
        parse_domain_key({"b": "1", "a": ["y", "x"]})
    )
    assert canonical_key(parse_domain_key({"a": "x*"})) != canonical_key(parse_domain_key({"a": {"matches": "x*"}}))
