"""From sequences of several steps to the arrays of their batches, where all shards hold token ids.

Documents are cut at the borders of sequences and sorted as the rows of the batches are. Tokens are then copied once, to
where the trainer gets them. Price: beside the copy about 10 bytes written per token.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.stored.token_gather import TokenGather
from mixtera_hpc.tokens.chat_tokens import NOT_TRAINED

__all__ = ["StoredSequences", "read_sequences"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSequences:
    """Rows of several batches, one after the other; see `Batch`."""

    tokens: NDArray[np.int64]
    """Shape (rows, length)."""
    document_ids: NDArray[np.int32]
    """Shape (rows, length)."""
    loss_mask: NDArray[np.bool_]
    """Shape (rows, length - 1)."""


def read_sequences(
    source: Source, gather: TokenGather, documents: Documents, rows: NDArray[np.int64], shape: tuple[int, int]
) -> StoredSequences:
    """Read the tokens of sequences, special tokens included.

    Args:
        source: says which tokens count.
        gather: reads the documents.
        documents: the parts of documents that each sequence consists of, sequence by sequence.
        rows: row of each sequence, all different; the other rows are zeros.
        shape: number of rows, and tokens of a sequence.

    Raises:
        DataError: see `TokenGather.read_into`.
    """
    num_rows, length = shape
    # Every sequence has `length` tokens, so the position of a part tells its sequence.
    lengths = documents.last - documents.first
    sequence, begin = np.divmod(np.cumsum(lengths) - lengths, length)
    row = rows[sequence]
    order = np.argsort(row, kind="stable")
    documents = documents.select(order)
    lengths = lengths[order]
    begin = begin[order]
    row = row[order]

    # Number of each part in its row: the part that begins a row has the number 0.
    part = np.arange(len(row))
    number = (part - np.maximum.accumulate(np.where(begin == 0, part, 0))).astype(np.int32)
    document_ids = np.repeat(number, lengths)

    tokens = np.empty(len(rows) * length, np.int64)
    gather.read_into(documents, tokens)

    loss_mask = np.ones((num_rows, length - 1), np.bool_)
    plane = source.config.dataplane
    if not plane.predict_across_documents:
        # The first token of a row is input only: targets begin one token later.
        is_beginning = begin > 0
        loss_mask[row[is_beginning], begin[is_beginning] - 1] = False
    tokens_of_rows = _with_padding(tokens.reshape(-1, length), rows, num_rows)
    if source.layout.chat_blocks is not None:
        # A store may have marks that this run ignores.
        if plane.chat_loss != "all":
            loss_mask &= tokens_of_rows[:, 1:] < NOT_TRAINED
        tokens_of_rows &= NOT_TRAINED - 1
    return StoredSequences(
        tokens=tokens_of_rows,
        document_ids=_with_padding(document_ids.reshape(-1, length), rows, num_rows),
        loss_mask=_without_padding(loss_mask, rows),
    )


def _with_padding(values: NDArray[Any], rows: NDArray[np.int64], num_rows: int) -> NDArray[Any]:
    """Return the rows in ascending order, with zeros for those that no sequence has."""
    if len(rows) == num_rows:
        return values
    padded = np.zeros((num_rows, values.shape[1]), values.dtype)
    padded[np.sort(rows)] = values
    return padded


def _without_padding(loss_mask: NDArray[np.bool_], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Clear the rows that no sequence has."""
    if len(rows) < len(loss_mask):
        is_padding = np.ones(len(loss_mask), np.bool_)
        is_padding[rows] = False
        loss_mask[is_padding] = False
    return loss_mask
