"""Counting domains from block tables gives the same result as counting them sample by sample."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtera_hpc.core.domain_keys import NumberRange, ranges_of_bounds
from mixtera_hpc.core.domains import DomainKey, keys_for_group_by, select
from mixtera_hpc.core.properties import Kind
from mixtera_hpc.core.query import cell_selection
from mixtera_hpc.core.query.parse import parse_predicate
from mixtera_hpc.testing.fabricated_tables import Sample, make_block_reader, make_index_tables

KINDS = {"source": Kind.CATEGORY, "tags": Kind.CATEGORIES, "quality": Kind.NUMBER, "age": Kind.NUMBER}
SOURCES = ["a", "b", "c"]
TAGS = ["x", "y", "z"]

samples = st.builds(
    lambda source, tags, quality, age, tokens: Sample(
        categories={"source": frozenset([source] if source else []), "tags": frozenset(tags)},
        numbers={"quality": quality, "age": age},
        tokens=tokens,
    ),
    st.sampled_from([None, *SOURCES]),
    st.lists(st.sampled_from(TAGS), max_size=3),
    st.sampled_from([None, -1.0, 0.0, 0.25, 0.5, 1.0]),
    st.sampled_from([None, 0.0, 7.0]),
    st.integers(0, 9),
)
all_values = [
    Sample(categories={"source": frozenset([s]), "tags": frozenset(TAGS)}, numbers={"quality": 0.5, "age": 7.0})
    for s in SOURCES
]
corpora = st.lists(st.lists(samples, min_size=1, max_size=8), max_size=5).map(lambda blocks: [all_values, *blocks])
RANGES = [
    NumberRange(low=0.5),
    NumberRange(low=0.0, high=0.5, closed=False),
    NumberRange(low=0.25, high=0.25),
    NumberRange(high=0.0),
    NumberRange(),
]
values: dict[str, list[Any]] = {"source": SOURCES, "tags": TAGS, "quality": RANGES, "age": RANGES}
keys = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            n: st.lists(st.sampled_from([None, *v]), min_size=1, max_size=2).map(tuple) for n, v in values.items()
        },
    ),
    min_size=1,
    max_size=4,
)
queries = st.sampled_from([None, "quality >= 0.5", "'x' not in tags", "source != 'a' or quality is None"])


def matches(key: DomainKey, sample: Sample) -> bool:
    return all(
        in_ranges(wanted, sample.numbers[name])
        if name in sample.numbers
        else bool(sample.categories[name] & {v for v in wanted if v})
        or (None in wanted and not sample.categories[name])
        for name, wanted in key.items()
    )


def in_ranges(wanted: tuple[Any, ...], number: float | None) -> bool:
    if number is None:
        return None in wanted
    return any(r.low <= number and (number < r.high or (r.closed and number == r.high)) for r in wanted if r)


def passes(query: str | None, sample: Sample) -> bool:
    quality = sample.numbers["quality"]
    source = sample.categories["source"]
    return {
        None: True,
        "quality >= 0.5": quality is not None and quality >= 0.5,
        "'x' not in tags": "x" not in sample.categories["tags"],
        "source != 'a' or quality is None": source != {"a"} or quality is None,
    }[query]


@pytest.fixture(params=["one range", "many ranges"], scope="module", autouse=True)
def range_size(request: pytest.FixtureRequest) -> Iterator[None]:
    """Process the whole histogram and all samples at once, or a few cells and one block at a time."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "many ranges":
            patch.setattr(cell_selection, "CELLS_PER_RANGE", 2)
            patch.setattr(cell_selection, "SAMPLES_PER_READ", 1)
        yield


@given(corpora, keys, queries)
@settings(max_examples=300, deadline=None)
def test_counts_equal_those_of_a_loop_over_all_samples(
    blocks: list[list[Sample]], keys: list[DomainKey], query: str | None
) -> None:
    tables, read_block = make_index_tables(blocks, KINDS)
    answer = select(tables, parse_predicate(query, tables.properties), keys, make_block_reader(read_block))
    rows: Counter[tuple[int, int]] = Counter()
    tokens: Counter[tuple[int, int]] = Counter()
    overlaps: Counter[tuple[int, int]] = Counter()
    # Samples and tokens.
    selected = [0, 0]
    unassigned = [0, 0]
    for number, block in enumerate(blocks):
        domains = []
        for sample in block:
            hits = [d for d, key in enumerate(keys) if passes(query, sample) and matches(key, sample)]
            domains.append(hits[0] if hits else -1)
            for total in (selected, unassigned) if not hits else (selected,):
                if passes(query, sample):
                    total[0] += 1
                    total[1] += sample.tokens
            if hits:
                rows[hits[0], number] += 1
                tokens[hits[0], number] += sample.tokens
                overlaps.update((hits[0], other) for other in hits[1:] if keys[hits[0]] and keys[other])
        assert answer.domain_of(tables.combos, read_block(number)).tolist() == domains
    table = answer.table
    domain = np.repeat(np.arange(len(keys)), np.diff(table.indptr))
    cells = list(zip(domain.tolist(), table.block.tolist(), strict=True))
    assert cells == sorted(rows)
    assert table.rows.tolist() == [rows[c] for c in cells]
    assert table.tokens.tolist() == [tokens[c] for c in cells]
    assert list(answer.selected) == selected and list(answer.unassigned) == unassigned
    assert answer.overlaps == tuple((a, b, n) for (a, b), n in sorted(overlaps.items()))


@given(corpora, st.lists(st.sampled_from(["source", "quality"]), unique=True), st.booleans())
@settings(max_examples=100, deadline=None)
def test_buckets_partition_the_numbers_between_their_bounds(
    blocks: list[list[Sample]], names: list[str], remainder: bool
) -> None:
    tables, read_block = make_index_tables(blocks, KINDS)
    ranges = {"quality": ranges_of_bounds([0.0, 0.5, 1.0])} if "quality" in names else {}
    keys = keys_for_group_by(names, tables.combos, ranges) + [{}] * remainder
    answer = select(tables, parse_predicate(None, tables.properties), keys, make_block_reader(read_block))
    outside = [s for block in blocks for s in block if s.numbers["quality"] in (None, -1.0) and ranges]
    assert not answer.overlaps
    assert answer.unassigned[0] == (0 if remainder else len(outside))
    assert sum(answer.table.totals()[0]) == answer.selected[0] - answer.unassigned[0]


@given(corpora, st.lists(st.sampled_from(["source", "tags"]), unique=True))
@settings(max_examples=100, deadline=None)
def test_keys_for_group_by_leave_no_sample_unassigned(blocks: list[list[Sample]], names: list[str]) -> None:
    tables, read_block = make_index_tables(blocks, KINDS)
    keys = keys_for_group_by(names, tables.combos)
    answer = select(tables, parse_predicate(None, tables.properties), keys, make_block_reader(read_block))
    assert answer.unassigned == (0, 0)
    assert len({tuple(k.items()) for k in keys}) == len(keys)
    if "tags" not in names:
        assert not answer.overlaps and (answer.table.totals()[0] > 0).all()
