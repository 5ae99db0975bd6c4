"""Conformance suite for tokenizers: call every function of `CHECKS` with the tokenizer; each raises AssertionError.

A tokenizer returns flat arrays of the documented dtypes, encodes each document independently of the others, uses token
ids below `vocab_size`, and may be called from several threads at once.
"""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mixtera_hpc.tokens.joined_texts import BORDER
from mixtera_hpc.tokens.token_memory import TokenMemory
from mixtera_hpc.tokens.tokenizer import Tokenizer

__all__ = [
    "CHECKS",
    "DOCUMENTS",
    "check_arrays_have_documented_dtypes_and_shapes",
    "check_concurrent_calls_give_equal_tokens",
    "check_documents_are_encoded_independently",
    "check_encode_documents_adds_special_tokens",
    "check_encode_each_equals_encode_batch",
    "check_ids_are_below_vocab_size",
]

DOCUMENTS = [
    *(
        f"The quick brown fox no. {i} doesn't jump; naïve 漢字 🙂\n\n  {'tab' * i}\t<|endoftext|> end"
        for i in range(60)
    ),
    *("", " ", "\x00", "a" * 5000, "é" * 300),
]
"""Several scripts, white space, a special token as text, an empty document, a NUL character and long repetitions."""
BORDER_TEXTS = [BORDER, f"one{BORDER}two"]
"""Texts with what a tokenizer may put between documents."""


def check_arrays_have_documented_dtypes_and_shapes(tokenizer: Tokenizer) -> None:
    """Check the arrays of `encode_batch`: flat uint32 tokens and ascending int64 offsets."""
    for documents in ([], [""], ["a"], ["", "b", ""], DOCUMENTS * 4):
        tokens, offsets = tokenizer.encode_batch(documents)
        assert tokens.dtype == np.uint32 and tokens.ndim == 1
        assert offsets.dtype == np.int64 and offsets.shape == (len(documents) + 1,)
        assert offsets[0] == 0 and offsets[-1] == len(tokens) and (np.diff(offsets) >= 0).all()


def check_documents_are_encoded_independently(tokenizer: Tokenizer) -> None:
    """Check that the tokens of a document do not depend on the documents encoded in the same batch."""
    alone = [tokenizer.encode_batch([document])[0].tolist() for document in DOCUMENTS]
    for copies in (1, 4):
        assert _split_tokens(tokenizer, DOCUMENTS * copies) == alone * copies


def check_encode_each_equals_encode_batch(tokenizer: Tokenizer) -> None:
    """Check that `encode_each` and `count_each` agree with `encode_batch`."""
    for documents in (DOCUMENTS, [*DOCUMENTS, *BORDER_TEXTS], [""], ["", ""], DOCUMENTS * 20):
        each = tokenizer.encode_each(documents)
        assert all(tokens.dtype == np.uint32 and tokens.ndim == 1 for tokens in each)
        assert [tokens.tolist() for tokens in each] == _split_tokens(tokenizer, documents)
        counts = tokenizer.count_each(documents)
        assert counts.dtype == np.int64 and counts.tolist() == [len(tokens) for tokens in each]
    assert tokenizer.encode_each([]) == [] and tokenizer.count_each([]).dtype == np.int64


def check_encode_documents_adds_special_tokens(tokenizer: Tokenizer) -> None:
    """Check that `encode_documents` returns the tokens of `encode_each`, with `added` at both ends of a document."""
    added = tokenizer.added
    for documents in ([], [""], ["", ""], ["", " a", "b "], DOCUMENTS, DOCUMENTS * 20, [*DOCUMENTS, *BORDER_TEXTS]):
        expected = [[*added.before, *ids.tolist(), *added.after] for ids in tokenizer.encode_each(documents)]
        memory = TokenMemory()
        memory.append(np.arange(3, dtype=np.uint32))
        for own_memory in (None, memory, memory):
            tokens, starts, sizes = tokenizer.encode_documents(documents, own_memory)
            each = [tokens[start : start + size].tolist() for start, size in zip(starts, sizes, strict=True)]
            assert each == expected
        assert np.array_equal(tokens, memory.tokens)
        assert memory.tokens[:3].tolist() == [0, 1, 2]
    assert all(tokenizer.vocab_size not in ids for ids in tokenizer.encode_each(BORDER_TEXTS))


def check_ids_are_below_vocab_size(tokenizer: Tokenizer) -> None:
    """Check that all token ids are below `vocab_size`, and that the fingerprint is a string."""
    tokens, _ = tokenizer.encode_batch(DOCUMENTS)
    assert len(tokens) and int(tokens.max()) < tokenizer.vocab_size
    assert tokenizer.eos_id is None or 0 <= tokenizer.eos_id < tokenizer.vocab_size
    assert tokenizer.fingerprint == str(tokenizer.fingerprint) != ""


def check_concurrent_calls_give_equal_tokens(tokenizer: Tokenizer) -> None:
    """Check that several threads can use one tokenizer at the same time."""
    expected = tokenizer.encode_batch(DOCUMENTS)[0].tolist()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: tokenizer.encode_batch(DOCUMENTS)[0].tolist(), range(20)))
    assert results == [expected] * 20


def _split_tokens(tokenizer: Tokenizer, documents: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each document."""
    tokens, offsets = tokenizer.encode_batch(documents)
    return [tokens[start:end].tolist() for start, end in itertools.pairwise(offsets)]


CHECKS: tuple[Callable[[Tokenizer], None], ...] = (
    check_arrays_have_documented_dtypes_and_shapes,
    check_documents_are_encoded_independently,
    check_encode_each_equals_encode_batch,
    check_encode_documents_adds_special_tokens,
    check_ids_are_below_vocab_size,
    check_concurrent_calls_give_equal_tokens,
)
