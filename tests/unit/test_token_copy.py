"""Tokens that are copied in rows are those that are copied segment by segment."""

import mmap
import os
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.lookup.window_table import WindowTable
from mixtera_hpc.dataplane.reading.stored import token_copy
from mixtera_hpc.dataplane.reading.stored.token_copy import TokenCopies

MEMORY = np.arange(1, 60_001, dtype=np.uint16)
SIZES = [9, 0, 21, 3]
"""Rows of each output."""
LONG = 1 << 22
"""Tokens of a long segment."""


def copied(begin: np.ndarray, lengths: np.ndarray, sizes: list[int], memory: np.ndarray = MEMORY) -> list[list[int]]:
    """Return the tokens of each output."""
    table = WindowTable({}, has_unit_items=False)
    first = np.full(len(begin), 2)
    documents = Documents(windows=table, number=first, first=first, last=first + lengths)
    copies = TokenCopies(memory, begin - first, documents, sizes)
    outputs: list[Any] = [np.zeros(size, np.int64) for size in sizes]
    for number, output in enumerate(outputs):
        copies.write(number, output)
    return [output.tolist() for output in outputs]


@pytest.mark.parametrize("tokens_per_copy", [1, 100, 1 << 16])
@pytest.mark.parametrize("max_view_bytes", [0, 1 << 62])
@pytest.mark.parametrize("length", [1, 40])
def test_segments_of_one_length_are_copied_to_their_places(
    length: int, max_view_bytes: int, tokens_per_copy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_copy, "MAX_VIEW_BYTES", max_view_bytes)
    monkeypatch.setattr(token_copy, "TOKENS_PER_COPY", tokens_per_copy)
    random = np.random.Generator(np.random.Philox(length))
    # The last tokens of memory are among them.
    begin = np.append(random.integers(2, len(MEMORY) - length, sum(SIZES) - 1), len(MEMORY) - length)
    found = copied(begin, np.full(len(begin), length), [size * length for size in SIZES])
    expected = np.concatenate([MEMORY[first : first + length] for first in begin.tolist()]).tolist()
    assert [token for output in found for token in output] == expected
    assert [len(output) for output in found] == [size * length for size in SIZES]


def test_segments_of_several_lengths_are_copied_to_their_places() -> None:
    # The first output has segments of one length.
    lengths = np.array([7, 7, 5, 9])
    begin = np.array([300, 20, 4000, 100])
    expected = [MEMORY[first : first + length].tolist() for first, length in zip(begin, lengths, strict=True)]
    assert copied(begin, lengths, [14, 14]) == [expected[0] + expected[1], expected[2] + expected[3]]


def test_memory_may_be_larger_than_numpy_can_address_as_rows() -> None:
    num_bytes = 1 << 42
    fd = os.memfd_create("sparse")
    os.ftruncate(fd, num_bytes)
    os.pwrite(fd, np.arange(LONG, dtype=np.uint16).tobytes(), num_bytes - 2 * LONG)
    memory = np.frombuffer(mmap.mmap(fd, num_bytes, prot=mmap.PROT_READ), np.uint16)
    os.close(fd)
    begin = np.array([len(memory) - LONG, 0])
    found = copied(begin, np.array([LONG, LONG]), [LONG, LONG], memory)
    assert found == [np.arange(LONG, dtype=np.uint16).tolist(), [0] * LONG]
