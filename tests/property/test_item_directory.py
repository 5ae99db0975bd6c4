"""A search in the directory of the window table returns what a binary search over all documents returns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtera_hpc.dataplane.reading.lookup import item_directory
from mixtera_hpc.dataplane.reading.lookup.item_directory import DOCUMENTS_PER_CELL, ItemDirectory

from .examples import whole_runs

LENGTHS = st.lists(st.integers(0, 3) | st.integers(0, 5000), max_size=40)
"""Items of documents; some have none."""


@whole_runs(200)
@given(st.lists(LENGTHS, min_size=1, max_size=5), st.integers(0, 1 << 32))
def test_a_directory_finds_what_a_search_over_all_documents_finds(added: list[list[int]], seed: int) -> None:
    random = np.random.Generator(np.random.Philox(seed))
    directory = ItemDirectory()
    stops = np.zeros(1, np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(item_directory, "MIN_DOCUMENTS", 1)
        for lengths in added:
            stops = np.append(stops, stops[-1] + np.cumsum(np.array(lengths, np.int64)))
            if not stops[-1]:
                continue
            # The borders of documents, and items between them.
            items = np.append(stops[stops < stops[-1]], random.integers(0, stops[-1], 20))
            expected = np.searchsorted(stops, items, side="right")
            assert np.array_equal(directory.search(stops, items), expected)
            # Alone, an item does not gain from the steps that others need.
            for number in random.integers(0, len(items), 5).tolist():
                one = slice(number, number + 1)
                assert np.array_equal(directory.search(stops, items[one]), expected[one])
            assert not len(directory.search(stops, items[:0]))


def test_a_directory_is_smaller_than_its_documents() -> None:
    directory = ItemDirectory()
    lengths = np.concatenate([np.full(40_000, 3), np.full(40_000, 10**6)])
    for count in (40_000, 60_000, 80_000):
        stops = np.cumsum(lengths[:count])
        items = np.arange(0, stops[-1], stops[-1] // 1000)
        assert np.array_equal(directory.search(stops, items), np.searchsorted(stops, items, side="right"))
        assert len(directory._cells) <= count // DOCUMENTS_PER_CELL + 2
