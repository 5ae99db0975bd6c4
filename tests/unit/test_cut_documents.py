"""The rests of documents are stored until they are wanted."""

import numpy as np
import pytest
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.texts import cut_documents
from mixtera_hpc.dataplane.reading.texts.cut_documents import UNREAD, CutDocuments
from mixtera_hpc.tokens.token_memory import TokenMemory


def array(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


@pytest.fixture
def cut() -> CutDocuments:
    """Return the rests of three documents: the last 2 of 5 tokens, the last 3 of 3, and none of 4."""
    cut = CutDocuments()
    tokens = np.arange(100, 120, dtype=np.uint32)
    cut.store(array(7, 9, 8), array(3, 0, 4), tokens, array(3, 10, 17), array(5, 13, 17))
    return cut


def test_a_rest_is_where_the_whole_document_would_be(cut: CutDocuments) -> None:
    memory = TokenMemory()
    memory.append(np.arange(2, dtype=np.uint32))
    starts = cut.take(array(9, 6, 7, 8), array(1, 0, 3, 4), memory)
    assert memory.tokens.tolist() == [0, 1, 110, 111, 112, 103, 104]
    assert starts.tolist() == [2, UNREAD, 5 - 3, 7 - 4]
    assert (memory.tokens[starts[0] + 1], memory.tokens[starts[2] + 3]) == (111, 103)


def test_a_document_is_read_again_if_tokens_before_its_rest_are_wanted(cut: CutDocuments) -> None:
    assert cut.take(array(7), array(2), TokenMemory()).tolist() == [UNREAD]


def test_a_rest_is_there_once(cut: CutDocuments) -> None:
    for expected in (0, UNREAD):
        assert cut.take(array(9), array(0), TokenMemory()).tolist() == [expected]


def test_the_rests_stored_first_are_forgotten(cut: CutDocuments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_documents, "MAX_BYTES", 16)
    tokens = np.arange(200, 203, dtype=np.uint32)
    cut.store(array(5), array(0), tokens, array(0), array(1))
    starts = cut.take(array(7, 9, 8, 5), array(3, 0, 4, 0), TokenMemory())
    assert starts.tolist() == [UNREAD, 0, 3 - 4, 3]


def test_a_document_larger_than_the_budget_stays(cut: CutDocuments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_documents, "MAX_BYTES", 4)
    cut.store(array(5), array(0), np.zeros(50, np.uint32), array(0), array(50))
    assert cut.take(array(7, 9, 8, 5), array(3, 0, 4, 0), TokenMemory()).tolist() == [UNREAD, UNREAD, UNREAD, 0]
