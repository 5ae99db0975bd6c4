"""From sequences of several steps to the arrays of their batches, where all shards hold token ids.

Documents are cut at the borders of sequences and sorted as the rows of the batches are. Tokens are then copied once, to
where the trainer gets them. Price: beside the copy about 10 bytes written per token.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.processes.batch_memory import TokenArrays
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.stored.token_gather import TokenGather
from mixtera_hpc.tokens.chat_tokens import NOT_TRAINED

__all__ = ["read_sequences"]

Ints = NDArray[np.int64]


def read_sequences(
    source: Source, gather: TokenGather, documents: Documents, rows: Ints, batches: Sequence[TokenArrays]
) -> None:
    """Write the tokens of sequences, special tokens included, to the arrays of their batches.

    Args:
        source: says which tokens count.
        gather: reads the documents.
        documents: the parts of documents that each sequence consists of, sequence by sequence.
        rows: row of each sequence, counted over all batches, all different; shape (sequences,).
        batches: the arrays of each batch. Rows that no sequence has, which are the last ones of a batch, become zeros.

    Raises:
        DataError: see `TokenGather.read_into`.
    """
    length = source.grid.length
    # Every sequence has `length` tokens, so the position of a part tells its sequence.
    lengths = documents.last - documents.first
    order = np.argsort(rows[(np.cumsum(lengths) - lengths) // length], kind="stable")
    documents = documents.select(order)
    lengths = lengths[order]
    starts = np.cumsum(lengths) - lengths
    sequence, begin = np.divmod(starts, length)
    # Number of each part in its row: the part that begins a row has the number 0.
    part = np.arange(len(starts))
    number = (part - np.maximum.accumulate(np.where(begin == 0, part, 0))).astype(np.int32)

    first_rows = np.cumsum([0, *(len(batch.tokens) for batch in batches)])
    num_sequences = np.diff(np.searchsorted(np.sort(rows), first_rows))
    served = [batch.rows(count) for batch, count in zip(batches, num_sequences.tolist(), strict=True)]
    gather.read_into(documents, [batch.tokens.reshape(-1) for batch in served])

    first_sequences = np.cumsum(np.append(0, num_sequences))
    parts = pairwise(np.searchsorted(starts, first_sequences * length).tolist())
    for batch, first_sequence, (first, last) in zip(served, first_sequences[:-1].tolist(), parts, strict=True):
        own = slice(first, last)
        batch.document_ids.reshape(-1)[:] = np.repeat(number[own], lengths[own])
        _set_loss_mask(source, batch, sequence[own] - first_sequence, begin[own])
    _clear_padding(batches, num_sequences.tolist())


def _clear_padding(batches: Sequence[TokenArrays], num_sequences: Sequence[int]) -> None:
    """Set the rows behind the sequences of each batch to 0."""
    for batch, count in zip(batches, num_sequences, strict=True):
        for array in batch:
            array[count:] = 0


def _set_loss_mask(source: Source, batch: TokenArrays, row: Ints, begin: Ints) -> None:
    """Write which tokens count, and clear the marks of conversations.

    Args:
        source: says which tokens count.
        batch: the arrays of whole sequences, with all tokens.
        row: row of each part of a document in the batch; shape (parts,).
        begin: position of each part in its row, in tokens; shape (parts,).
    """
    plane = source.config.dataplane
    tokens = batch.tokens
    loss_mask = batch.loss_mask
    loss_mask[...] = True
    if not plane.predict_across_documents:
        # The first token of a row is input only: targets begin one token later.
        inside = np.flatnonzero(begin)
        loss_mask[row[inside], begin[inside] - 1] = False
    if source.layout.chat_blocks is None:
        return
    # A store may have marks that this run ignores.
    if plane.chat_loss != "all":
        np.logical_and(loss_mask, tokens[:, 1:] < NOT_TRAINED, out=loss_mask)
    np.bitwise_and(tokens, NOT_TRAINED - 1, out=tokens)
