"""Write the arrays of the batches of several steps from the documents of their sequences.

The parts of documents of all batches are computed together, in the order of the rows. Tokens are then copied once, to
where the trainer gets them. Price: beside the copy about 10 bytes written per token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.domain_streams import Documents
from mixtera_hpc.dataplane.reading.processes.batch_memory import TokenArrays
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.reading.step_sequences import StepContent
from mixtera_hpc.dataplane.reading.stored.token_gather import TokenWriter
from mixtera_hpc.tokens.chat_tokens import NOT_TRAINED

__all__ = ["StoredSequences"]

Ints = NDArray[np.int64]


class StoredSequences:
    """The sequences of several batches, ready to be copied to one batch after the other."""

    def __init__(
        self, source: Source, writer: TokenWriter, documents: Documents, batches: Sequence[StepContent]
    ) -> None:
        """Compute what is copied.

        Args:
            source: says which tokens count.
            writer: copies the tokens of each batch.
            documents: the parts of documents that each sequence consists of, row by row of the batches.
            batches: the sequences of each batch.
        """
        length = source.grid.length
        self._source = source
        self._batches = batches
        self._writer = writer

        self._lengths = documents.wanted
        stops = documents.wanted_stops
        counts = [batch.num_sequences for batch in batches]
        first_rows = np.cumsum([0, *counts])
        parts_stop = _parts_before_row_ends(documents, length)
        num_parts = np.diff(parts_stop, prepend=0)
        # Number of each part in its row: the part that begins a row has the number 0.
        part = np.arange(len(stops), dtype=np.int32)
        self._number = part - np.repeat((parts_stop - num_parts).astype(np.int32), num_parts)
        self._first_parts: list[int] = np.append(0, parts_stop)[first_rows].tolist()

        # Parts that begin inside a row, and the place of the prediction of their first token in the loss mask of their
        # batch. Such a part begins where the one before it ends, and a row has one prediction less than tokens.
        row = np.arange(first_rows[-1])
        row_of_batch = row - np.repeat(first_rows[:-1], counts)
        begins_inside = np.ones(len(stops), np.bool_)
        begins_inside[parts_stop - 1] = False
        predictions = stops - np.repeat(row * length + 1 - row_of_batch * (length - 1), num_parts)
        self._first_predictions = predictions[begins_inside]
        # Each row has one part that does not begin inside of it.
        self._prediction_borders: list[int] = (self._first_parts - first_rows).tolist()

    def shards_of(self, numbers: range) -> NDArray[np.integer[Any]]:
        """Return the different mapped shards that `write` reads for some batches."""
        return self._writer.shards_of(numbers)

    def write(self, number: int, memory: TokenArrays | None = None) -> TokenArrays:
        """Return the arrays of a batch: its sequences, special tokens included, and zeros in rows of padding.

        Args:
            number: of the batch.
            memory: where to write them, at least as many rows as the batch has; None for new arrays.
        """
        batch = self._batches[number]
        count = batch.num_sequences
        size = len(batch.domain_ids)
        length = self._source.grid.length
        own = slice(*self._first_parts[number : number + 2])
        document_ids = np.repeat(self._number[own], self._lengths[own]).reshape(count, length)
        if memory is None and count == size:
            tokens = np.empty((count, length), np.int64)
            arrays = served = TokenArrays(tokens, document_ids, np.empty((count, length - 1), np.bool_))
        else:
            arrays = TokenArrays.new(size, length) if memory is None else memory.rows(size)
            served = arrays.rows(count)
            served.document_ids[...] = document_ids
            for array in arrays:
                array[count:] = 0
        if count:
            self._writer.write(number, served.tokens.reshape(-1))
            self._set_loss_mask(number, served)
        return arrays

    def _set_loss_mask(self, number: int, batch: TokenArrays) -> None:
        """Write which tokens count, and clear the marks of conversations.

        Args:
            number: of the batch.
            batch: the arrays of whole sequences, with all tokens.
        """
        plane = self._source.config.dataplane
        tokens = batch.tokens
        loss_mask = batch.loss_mask
        loss_mask.fill(True)
        if not plane.predict_across_documents:
            own = slice(*self._prediction_borders[number : number + 2])
            loss_mask.reshape(-1)[self._first_predictions[own]] = False
        if self._source.layout.chat_blocks is None:
            return
        # A store may have marks that this run ignores.
        if plane.chat_loss != "all":
            np.logical_and(loss_mask, tokens[:, 1:] < NOT_TRAINED, out=loss_mask)
        np.bitwise_and(tokens, NOT_TRAINED - 1, out=tokens)


def _parts_before_row_ends(documents: Documents, length: int) -> Ints:
    """Return the number of parts of documents up to the end of each row of `length` tokens."""
    sizes = documents.part_sizes
    # A row ends where a part of a window does.
    num_parts = np.arange(1, len(documents.number) + 1) if sizes is None else sizes.cumsum()
    is_row_end = documents.wanted_stops.take(num_parts - 1) % length == 0
    return num_parts.compress(is_row_end)
