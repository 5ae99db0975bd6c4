"""Decoded rows in memory: which stay objects, and that all are served as they were decoded."""

import gc
import sys
import weakref
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from mixtera_hpc.dataplane.reading.residency.packed_rows import packed

NESTED: list[dict[str, Any]] = [
    {"text": "a", "meta": {"source": "web", "scores": [1.5, None]}},
    {"text": "b", "when": datetime(2026, 11, 29, tzinfo=UTC), "meta": {}},
]


class Counted:
    """A value with a pickle, to which weak references are possible."""


def test_the_garbage_collector_does_not_visit_rows_with_nested_values() -> None:
    rows = packed([NESTED])
    assert not any(map(gc.is_tracked, rows.values))
    assert rows.unpack is not None
    assert rows.unpack(rows.values) == NESTED


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kinds", ["nn", "ttnnt", "tn tt", "tnut", "ut", "tu"])
def test_rows_of_all_groups_stay_in_memory_in_one_way(kinds: str, size: int) -> None:
    kind_rows = {"t": {"text": "a"}, "n": NESTED[0], " ": {}, "u": {"text": "c", "meta": [memoryview(b"c")]}}
    rows = [{**kind_rows[kind], "number": number} for number, kind in enumerate(kinds)]
    stored = packed(rows[first : first + size] for first in range(0, len(rows), size))
    assert (stored.unpack is not None) == ("n" in kinds and "u" not in kinds)
    assert (stored.values if stored.unpack is None else list(stored.unpack(stored.values))) == rows


def test_the_objects_of_two_groups_exist_at_most() -> None:
    values: list[weakref.ref[Counted]] = []

    def groups() -> Iterator[list[dict[str, Any]]]:
        for _ in range(4):
            assert not any(value() for value in values[:-1])
            value = Counted()
            values.append(weakref.ref(value))
            yield [{"value": value}]
            del value

    assert packed(groups()).unpack is not None


@pytest.mark.parametrize("rows", [["a", "b"], []])
def test_texts_stay_as_they_are(rows: list[str]) -> None:
    assert packed([rows]) == (rows, None)


def test_rows_with_a_value_that_has_no_pickle_stay_objects() -> None:
    rows = [*NESTED, {"text": "c", "meta": [memoryview(b"c")]}]
    assert packed([rows]) == (rows, None)


def test_rows_that_are_nested_too_deeply_for_a_pickle_stay_objects() -> None:
    nested: list[Any] = []
    for _ in range(2000):
        nested = [nested]
    rows = [*NESTED, {"text": "c", "meta": nested}]
    # Libraries that other tests import raise the limit.
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    try:
        stored = packed([rows])
    finally:
        sys.setrecursionlimit(limit)
    assert stored.unpack is None
    assert all(value is row for value, row in zip(stored.values, rows, strict=True))


def test_rows_of_few_large_values_stay_objects() -> None:
    rows = [{"image": {"bytes": bytes(100_000), "path": f"{number}.jpg"}, "label": number} for number in range(20)]
    assert packed([rows]) == (rows, None)
    # A long list is many objects for the garbage collector.
    scores = [{"scores": {"of_tokens": [0.5] * 10_000}}] * 20
    assert packed([scores]).unpack is not None
