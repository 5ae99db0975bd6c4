"""Query expressions have the meaning of the same Python expression, whether blocks decide them or samples are read."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtera_hpc.core.domains import select
from mixtera_hpc.core.properties import Kind
from mixtera_hpc.core.query import cell_selection
from mixtera_hpc.core.query.parse import parse_predicate
from mixtera_hpc.core.query.predicate import Entries
from mixtera_hpc.testing.fabricated_tables import Sample, make_block_reader, make_index_tables

KINDS = {"language": Kind.CATEGORY, "tags": Kind.CATEGORIES, "quality": Kind.NUMBER, "year": Kind.NUMBER}
LANGUAGES = ["en", "de", "x y", "7"]
TAGS = ["a", "b", ""]
NUMBERS = [-1.0, 0.0, 0.25, 0.5, 1.0, math.inf]


@dataclass(frozen=True)
class Expression:
    text: str
    holds: Callable[[Sample], bool]


samples = st.builds(
    lambda language, tags, quality, year, tokens: Sample(
        categories={"language": frozenset(() if language is None else (language,)), "tags": frozenset(tags)},
        numbers={"quality": quality, "year": year},
        tokens=tokens,
    ),
    st.sampled_from([None, *LANGUAGES]),
    st.lists(st.sampled_from(TAGS), max_size=2),
    st.sampled_from([None, *NUMBERS]),
    st.sampled_from([None, 2020.0, 2021.0]),
    st.integers(0, 5),
)
every_value = [
    Sample(categories={"language": frozenset([x]), "tags": frozenset(TAGS)}, numbers={"quality": 0.5, "year": None})
    for x in LANGUAGES
]
corpora = st.lists(st.lists(samples, min_size=1, max_size=6), min_size=0, max_size=6).map(lambda b: [every_value, *b])


def language(sample: Sample) -> str | None:
    return next(iter(sample.categories["language"]), None)


def is_one_of(values: list[str | None], negate: bool) -> Expression:
    text = f"language {'not in' if negate else 'in'} {values!r}"
    return Expression(text, lambda s: (language(s) in values) != negate)


def equals(value: str | None, negate: bool) -> Expression:
    operator = {(True, True): "is not", (True, False): "is"}.get((value is None, negate), "!=" if negate else "==")
    return Expression(f"language {operator} {value!r}", lambda s: (language(s) == value) != negate)


def has_tag(value: str, negate: bool) -> Expression:
    return Expression(
        f"{value!r} {'not in' if negate else 'in'} tags", lambda s: (value in s.categories["tags"]) != negate
    )


def matches_language(pattern: str) -> Expression:
    return Expression(
        f"matches(language, {pattern!r})",
        lambda s: any(re.fullmatch(pattern, value) for value in s.categories["language"]),
    )


def no_tags(negate: bool) -> Expression:
    return Expression(f"tags {'!=' if negate else '=='} None", lambda s: (not s.categories["tags"]) != negate)


COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
}


def compares(name: str, operator: str, bound: float, mirrored: bool) -> Expression:
    number = "1e999" if bound == math.inf else repr(bound)
    holds = COMPARISONS[operator]

    def test(sample: Sample) -> bool:
        value = sample.numbers[name]
        return value is not None and (holds(bound, value) if mirrored else holds(value, bound))

    return Expression(f"{number} {operator} {name}" if mirrored else f"{name} {operator} {number}", test)


def is_unequal(bound: float) -> Expression:
    return Expression(f"quality != {bound!r}", lambda s: s.numbers["quality"] != bound)


def between(low: float, high: float) -> Expression:
    def test(sample: Sample) -> bool:
        value = sample.numbers["quality"]
        return value is not None and low <= value < high

    return Expression(f"{low!r} <= quality < {high!r}", test)


def is_number_in(values: list[float | None], negate: bool) -> Expression:
    text = f"quality {'not in' if negate else 'in'} {values!r}"
    return Expression(text, lambda s: (s.numbers["quality"] in values) != negate)


finite = st.sampled_from([n for n in NUMBERS if n != math.inf])
atoms = st.one_of(
    st.builds(is_one_of, st.lists(st.sampled_from([None, *LANGUAGES]), max_size=3), st.booleans()),
    st.builds(equals, st.sampled_from([None, *LANGUAGES]), st.booleans()),
    st.builds(has_tag, st.sampled_from(TAGS), st.booleans()),
    st.builds(no_tags, st.booleans()),
    st.builds(matches_language, st.sampled_from(["e.", "en|de", ".*", "x y", "[0-9]+", "nothing|7"])),
    st.builds(
        compares,
        st.sampled_from(["quality", "year"]),
        st.sampled_from(list(COMPARISONS)),
        st.sampled_from([*NUMBERS, 2020.0]),
        st.booleans(),
    ),
    st.builds(is_unequal, finite),
    st.builds(between, finite, finite),
    st.builds(is_number_in, st.lists(st.one_of(st.none(), finite), max_size=3), st.booleans()),
    st.sampled_from([Expression("True", lambda s: True), Expression("False", lambda s: False)]),
)
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.builds(lambda a: Expression(f"not ({a.text})", lambda s: not a.holds(s)), inner),
        st.builds(
            lambda a, b: Expression(f"({a.text}) and ({b.text})", lambda s: a.holds(s) and b.holds(s)), inner, inner
        ),
        st.builds(
            lambda a, b: Expression(f"({a.text}) or ({b.text})", lambda s: a.holds(s) or b.holds(s)), inner, inner
        ),
    ),
    max_leaves=5,
)


@pytest.fixture(params=["one range", "many ranges"], scope="module", autouse=True)
def range_size(request: pytest.FixtureRequest) -> Iterator[None]:
    """Process the whole histogram and all samples at once, or a few cells and one block at a time."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "many ranges":
            patch.setattr(cell_selection, "CELLS_PER_RANGE", 2)
            patch.setattr(cell_selection, "SAMPLES_PER_READ", 1)
        yield


@given(corpora, expressions)
@settings(max_examples=300, deadline=None)
def test_samples_match_as_in_python(blocks: list[list[Sample]], expression: Expression) -> None:
    tables, read_block = make_index_tables(blocks, KINDS)
    predicate = parse_predicate(expression.text, tables.properties)
    for number, block in enumerate(blocks):
        columns = read_block(number)
        mask = predicate.evaluate(Entries.of_samples(tables.combos, columns.combo, columns.numbers))
        expected = [expression.holds(s) for s in block]
        assert mask.must_match.tolist() == expected
        assert mask.may_match.tolist() == expected


@given(corpora, expressions)
@settings(max_examples=300, deadline=None)
def test_zones_decide_a_cell_only_if_all_its_samples_agree(blocks: list[list[Sample]], expression: Expression) -> None:
    tables, read_block = make_index_tables(blocks, KINDS)
    predicate = parse_predicate(expression.text, tables.properties)
    histogram = tables.histogram
    zones = tables.blocks.zones
    block_of_cell = np.repeat(np.arange(len(blocks)), np.diff(histogram.indptr))
    cells = Entries(
        combos=tables.combos,
        combo=histogram.combo,
        low={n: zones[n].low[block_of_cell] for n in zones},
        high={n: zones[n].high[block_of_cell] for n in zones},
        has_null={n: zones[n].has_null[block_of_cell] for n in zones},
    )
    mask = predicate.evaluate(cells)
    assert not (mask.must_match & ~mask.may_match).any(), "must_match implies may_match"
    for cell, (block, combo) in enumerate(zip(block_of_cell, histogram.combo, strict=True)):
        inside = [s for s, c in zip(blocks[block], read_block(block).combo, strict=True) if c == combo]
        holds = [expression.holds(s) for s in inside]
        assert not mask.must_match[cell] or all(holds)
        assert mask.may_match[cell] or not any(holds)


@given(corpora, expressions)
@settings(max_examples=300, deadline=None)
def test_decided_blocks_and_scanned_samples_together_count_all_matches(
    blocks: list[list[Sample]], expression: Expression
) -> None:
    tables, read_block = make_index_tables(blocks, KINDS)
    scanned: list[int] = []

    def read(block: int) -> Any:
        scanned.append(block)
        return read_block(block)

    predicate = parse_predicate(expression.text, tables.properties)
    selection = select(tables, predicate, [{}], make_block_reader(read))
    hits = [[s for s in block if expression.holds(s)] for block in blocks]
    assert selection.selected == (sum(map(len, hits)), sum(s.tokens for block in hits for s in block))
    expected = [(b, len(block), sum(s.tokens for s in block)) for b, block in enumerate(hits) if block]
    table = selection.table
    assert list(zip(table.block.tolist(), table.rows.tolist(), table.tokens.tolist(), strict=True)) == expected
    assert len(scanned) == len(set(scanned)) == selection.pruning.scanned_blocks
    if not predicate.numbers:
        assert not scanned
    pruning = selection.pruning
    assert pruning.blocks == len(blocks) and pruning.scanned_samples == sum(len(blocks[b]) for b in scanned)
    possible = sum(any(map(expression.holds, block)) for block in blocks)
    assert pruning.decided_whole + pruning.scanned_blocks >= possible, "every block with a match is counted"
