"""Domains: which samples belong to which key, and how the others are counted."""

import pytest

from mixtera_hpc.core.domains import DomainKey, Selection, keys_for_group_by, select
from mixtera_hpc.core.properties import Kind
from mixtera_hpc.core.query.parse import parse_predicate
from mixtera_hpc.errors import MixtureError
from mixtera_hpc.testing.fabricated_tables import Sample, make_block_reader, make_index_tables

KINDS = {"source": Kind.CATEGORY, "tags": Kind.CATEGORIES, "quality": Kind.NUMBER}


def sample(source: str | None, tags: str = "", quality: float | None = 0.5, tokens: int = 10) -> Sample:
    known = frozenset([] if source is None else [source])
    return Sample(categories={"source": known, "tags": frozenset(tags)}, numbers={"quality": quality}, tokens=tokens)


BLOCKS = [
    [sample("C4", "ab"), sample("C4", quality=0.1), sample("Book", "a", tokens=7)],
    [sample(None, "b"), sample("ArXiv", quality=None)],
    [sample("Book", quality=0.9, tokens=3)],
]
TABLES, READ = make_index_tables(BLOCKS, KINDS)


def ask(keys: list[DomainKey], where: str | None = None) -> Selection:
    return select(TABLES, parse_predicate(where, TABLES.properties), keys, make_block_reader(READ))


def test_a_sample_belongs_to_the_first_key_it_matches() -> None:
    table = ask([{"tags": ("a",)}, {"source": ("C4", "Book")}]).table
    assert table.indptr.tolist() == [0, 1, 3]
    assert table.block.tolist() == [0, 0, 2]
    assert table.rows.tolist() == [2, 1, 1]
    assert table.tokens.tolist() == [17, 10, 3]


def test_the_order_of_keys_decides_between_keys_that_match() -> None:
    rows, _ = ask([{"source": ("C4", "Book")}, {"tags": ("a",)}]).table.totals()
    assert rows.tolist() == [4, 0]


def test_samples_that_match_no_key_are_counted_as_unassigned() -> None:
    answer = ask([{"source": ("C4",)}])
    assert answer.selected == (6, 50) and answer.unassigned == (4, 30)


def test_samples_that_the_query_excludes_do_not_count_as_unassigned() -> None:
    answer = ask([{"source": ("C4",)}], "quality >= 0.5")
    assert answer.selected == (4, 30) and answer.unassigned == (3, 20)
    assert answer.table.rows.tolist() == [1]


def test_overlaps_name_both_keys_and_count_samples() -> None:
    assert ask([{"source": ("C4",)}, {"tags": ("a",)}, {"tags": ("b",)}]).overlaps == ((0, 1, 1), (0, 2, 1))
    assert ask([{"source": ("C4",)}, {"source": ("Book",)}]).overlaps == ()


def test_none_matches_null_alone_or_among_values() -> None:
    rows, _ = ask([{"source": (None,)}, {"source": ("C4",), "tags": (None, "a")}]).table.totals()
    assert rows.tolist() == [1, 2]


def test_an_empty_key_matches_everything() -> None:
    answer = ask([{}])
    assert answer.table.totals()[0].tolist() == [6] and answer.unassigned == (0, 0)


def test_an_empty_domain_keeps_its_id() -> None:
    table = ask([{"source": ("C4",)}, {"source": ("C4",)}, {"source": ("ArXiv",)}]).table
    assert table.indptr.tolist() == [0, 1, 1, 2]


def test_a_query_that_selects_nothing_gives_empty_domains() -> None:
    answer = ask([{"source": ("C4",)}, {}], "quality > 5")
    assert answer.table.indptr.tolist() == [0, 0, 0] and answer.selected == (0, 0)


def test_only_undecided_blocks_are_scanned() -> None:
    assert ask([{}], "source == 'C4'").pruning.scanned_blocks == 0
    assert ask([{}], "quality >= 0.9").pruning.scanned_blocks == 0
    assert ask([{}], "quality >= 0.2").pruning.scanned_blocks == 2
    assert ask([{}], "quality >= 0.2 and source == 'C4'").pruning.scanned_blocks == 1


def test_the_domain_of_every_sample_can_be_looked_up() -> None:
    answer = ask([{"tags": ("a",)}, {"source": ("C4",)}], "quality >= 0.5")
    assert [answer.domain_of(TABLES.combos, READ(b)).tolist() for b in range(3)] == [[0, -1, 0], [-1, -1], [-1]]


def test_group_by_one_property_gives_a_key_per_value_with_null_last() -> None:
    assert keys_for_group_by(["source"], TABLES.combos) == [
        {"source": ("ArXiv",)},
        {"source": ("Book",)},
        {"source": ("C4",)},
        {"source": (None,)},
    ]


def test_group_by_several_properties_gives_the_combinations_that_occur() -> None:
    pairs = [(k["source"][0], k["tags"][0]) for k in keys_for_group_by(["source", "tags"], TABLES.combos)]
    assert pairs == [
        ("ArXiv", None),
        ("Book", "a"),
        ("Book", None),
        ("C4", "a"),
        ("C4", "b"),
        ("C4", None),
        (None, "b"),
    ]


def test_group_by_no_property_gives_one_key_that_matches_everything() -> None:
    assert keys_for_group_by([], TABLES.combos) == [{}]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ({"sauce": ("C4",)}, r"'sauce', which is not a categorical property of the index\. Did you mean 'source'\?"),
        ({"quality": ("1",)}, r"'quality', which is not a categorical property"),
        ({"source": ("c4",)}, r"names source = 'c4', but no sample matches\."),
    ],
)
def test_an_unknown_name_or_value_is_refused(key: DomainKey, message: str) -> None:
    with pytest.raises(MixtureError, match=message):
        ask([key])
