"""Encoding raw values as categories."""

from typing import Any

import numpy as np
import pytest

from mixtera_hpc.formats.category_codes import encode_categories


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        (["b", "a", None, "b"], [("b",), ("a",), (), ("b",)]),
        (["", None], [("",), ()]),
        ([1, True, 1.0, "1", "true", False, 0], [("1",), ("true",), ("1.0",), ("1",), ("true",), ("false",), ("0",)]),
        ([("b", "a"), ("a", "b", "b"), (), None, "a"], [("a", "b"), ("a", "b"), (), (), ("a",)]),
        ([(1, True), (True, 1), ("x", None)], [("1", "true"), ("1", "true"), ("x",)]),
        ([10**30, -5, 0.1], [(str(10**30),), ("-5",), ("0.1",)]),
    ],
)
def test_values_become_sorted_texts(values: list[Any], expected: list[tuple[str, ...]]) -> None:
    column = encode_categories(values)
    assert [column.values[c] for c in column.code] == expected
    assert len(set(column.values)) == len(column.values), "no value has two codes"
    assert column.code.dtype == np.int32
