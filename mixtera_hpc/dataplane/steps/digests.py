"""Digests of the sequences and samples that the trainer gets, for audit logs and `plan`."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["PADDING_DIGEST", "batch_digests", "sample_digest", "sequence_digest"]

PADDING_DIGEST = "0" * 16
"""Digest of a row without a sequence."""


def sequence_digest(tokens: NDArray[np.integer[Any]]) -> str:
    """Return 16 hex digits that depend on the tokens of one sequence."""
    return hashlib.blake2b(np.ascontiguousarray(tokens, "<i4").tobytes(), digest_size=8).hexdigest()


def batch_digests(contents: Iterable[Any], is_padding: NDArray[np.bool_], digest: Callable[[Any], str]) -> list[str]:
    """Return the digest of every row of a batch, `PADDING_DIGEST` for rows that stand for no sequence.

    Args:
        contents: the tokens or the sample of every row.
        is_padding: which rows stand for no sequence; shape (B,).
        digest: `sequence_digest` or `sample_digest`.
    """
    rows = zip(contents, is_padding.tolist(), strict=True)
    return [PADDING_DIGEST if padding else digest(content) for content, padding in rows]


def sample_digest(payload: Any) -> str:
    """Return 16 hex digits that depend on the content of a sample."""
    try:
        # Msgpack and not JSON: payloads may hold bytes.
        raw = msgspec.msgpack.encode(payload, enc_hook=_plain_value)
    except OverflowError:  # An integer of more than 64 bits.
        raw = repr(payload).encode()
    return hashlib.blake2b(raw, digest_size=8).hexdigest()


def _plain_value(value: Any) -> Any:
    """Return msgpack types that represent an array, or an object that msgpack cannot encode."""
    return [value.dtype.str, list(value.shape), value.tobytes()] if isinstance(value, np.ndarray) else repr(value)
